"""Known values with a gradient that is computed when it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_priors._engine._graph import nodes

Pullback = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[bool]], Sequence[Tensor | None]]
"""(cotangents of the values, sources, which sources want a gradient) to the sources' gradients."""


class _WithPullback(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pullback: Pullback, n_values: int, *tensors: Tensor) -> Any:
        values, sources = tensors[:n_values], tensors[n_values:]
        ctx.pullback, ctx.sources, ctx.n_values = pullback, sources, n_values
        # Unpacked in backward for torch's check that nobody changed them in place in between.
        ctx.save_for_backward(*sources)
        return tuple(value.detach() for value in values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 + ctx.n_values :]
        gradients = ctx.pullback(cotangents, ctx.sources, wanted)
        return (None, None, *([None] * ctx.n_values), *gradients)


def with_pullback(
    values: Sequence[Tensor], sources: Sequence[Tensor], pullback: Pullback
) -> tuple[Tensor, ...]:
    """Return the values as differentiable functions of the sources."""
    if not any(source.requires_grad for source in sources):
        return tuple(values)
    apply: Callable[..., tuple[Tensor, ...]] = _WithPullback.apply
    return apply(pullback, len(values), *values, *sources)


def pull(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradient of <cotangents, outputs> with respect to the wanted sources, None elsewhere."""
    found: list[Tensor | None] = [None] * len(sources)
    connected = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    places = [i for i, want in enumerate(wanted) if want]
    if not connected or not places:
        return found
    wanted_sources = [sources[i] for i in places]
    with _without_hooks(wanted_sources):
        gradients = torch.autograd.grad(
            [o for o, _ in connected],
            wanted_sources,
            [c for _, c in connected],
            # Terms of a sum may share a part of their graph. Compiled modules cannot keep theirs.
            retain_graph=not any(n.name() == "CompiledFunctionBackward" for n in nodes(outputs)),
            allow_unused=True,
        )
    for place, gradient in zip(places, gradients, strict=True):
        found[place] = gradient
    return found


@contextmanager
def _without_hooks(sources: Sequence[Tensor]) -> Iterator[None]:
    """Keep gradient hooks of the sources quiet: they run when the result reaches the sources."""
    hooks = [s._backward_hooks for s in sources if s._backward_hooks]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)


def accumulate(total: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    """Add gradients to a running total, None meaning zero."""
    for i, gradient in enumerate(more):
        if gradient is not None:
            so_far = total[i]
            total[i] = gradient if so_far is None else so_far + gradient
