r"""A value now, its gradient later: ``recompute``, and what it is made of.

An attribution that averages over samples or path steps is a sum :math:`A = \sum_c A_c(x, \theta)`,
and so is its pullback: :math:`\nabla_\theta\langle v, A\rangle = \sum_c \nabla_\theta\langle v,
A_c\rangle`. ``recompute`` keeps no graph in the forward pass; its backward pass evaluates one term
at a time with its graph, pulls the cotangent through it and lets it go. Exact, in the memory of one
term, at the price of a second pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors.engine._torch import without_hooks
from captum_priors.engine.batch_norm import HeldStatistics
from captum_priors.engine.coupled import refuse_batch_statistics
from captum_priors.engine.gradients import nodes, without_graph
from captum_priors.engine.model import current_pass, resumed
from captum_priors.engine.modules import (
    ReluMode,
    current_beta,
    enter_exact_kernels,
    plainly_in,
    run_eagerly,
    run_modules,
)
from captum_priors.engine.random import GlobalState

Pullback = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[bool]], Sequence[Tensor | None]]
"""(cotangents of the values, sources, which sources want a gradient) to the sources' gradients."""


class Visit(Protocol):
    """Receives each term of the sum, and the rows of the output that it adds to."""

    def __call__(self, term: tuple[Tensor, ...], rows: slice = ...) -> tuple[Tensor, ...]:
        """Return the term as the program is to go on with it."""


Program = Callable[[tuple[Tensor, ...], Visit], tuple[Tensor, ...]]
"""Evaluates the sum from its explicit arguments, passing each term through ``visit``."""

# Forward and backward pass evaluate the same program; nondeterministic GPU kernels reorder sums,
# and torch has another formula for SiLU's derivative where gradients are recorded, which in eight
# bits moves the attributions of networks of 30 layers by up to 0.23.
_REPRODUCES, _IN_HALF = 1e-2, 0.3


def keep_graph(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
    """Visit that leaves the terms as they are: the sum keeps the graph of all of them."""
    return term


def recompute(
    program: Program,
    arguments: tuple[Tensor, ...],
    *,
    forward_func: Any,
    streams: Sequence[str] = ("torch",),
) -> tuple[Tensor, ...]:
    """Evaluate a sum whose backward pass evaluates it again, term by term.

    Args:
        program: The sum; it passes each of its terms through the ``visit`` that it is given.
        arguments: What it is a function of, besides leaf tensors such as parameters.
        forward_func: What refers to the modules that run.
        streams: The global streams that are drawn from.

    Returns:
        The values, as differentiable functions of the arguments and leaves.

    Raises:
        NotDifferentiableError: If examples influence each other, or something with a graph that was
            made before the call takes part.

    Example:
        >>> import torch
        >>> from captum_priors.engine import recompute
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> program = lambda args, visit: visit((w.square() * args[0],))
        >>> (value,) = recompute(program, (torch.tensor([3.0]),), forward_func=None)
        >>> value.item(), torch.autograd.grad(value, w)[0].item()
        (12.0, 12.0)
    """
    if not torch.is_grad_enabled():
        return program(arguments, keep_graph)
    conditions = Conditions(forward_func, streams)
    n_arguments = len(arguments)
    given = tuple(a.detach().requires_grad_(a.requires_grad) for a in arguments)
    with conditions, without_graph(returns_with_graph=True) as current:

        def let_go(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
            # Gradients are recorded up to here, so that nothing that a term depends on is missed.
            current.reach(term, given)
            return tuple(t.detach() for t in term)

        found = tuple(v.detach() for v in program(given, let_go))
    leaves = [*current.leaves.values()]

    def pullback(
        cotangents: Sequence[Tensor], sources: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        given = tuple(sources[i].detach().requires_grad_(wanted[i]) for i in range(n_arguments))
        total: list[Tensor | None] = [None] * len(sources)

        def visit(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
            weights = [c[rows] for c in cotangents]
            more = pull(term, [*given, *leaves], wanted, weights)
            for i, gradient in enumerate(more):
                if gradient is not None:
                    so_far = total[i]
                    total[i] = gradient if so_far is None else so_far + gradient
            return tuple(t.detach() for t in term)

        with conditions.again():
            for value, repeated in zip(found, program(given, visit), strict=True):
                _check_reproduced(value, repeated.detach())
        return total

    return with_pullback(found, [*arguments, *conditions.sources(leaves)], pullback)


def _check_reproduced(value: Tensor, repeated: Tensor) -> None:
    difference = (value - repeated).abs().amax() if value.numel() else value.new_zeros(())
    half = value.element_size() == 2 or torch.is_autocast_enabled(value.device.type)
    if difference > (_IN_HALF if half else _REPRODUCES) * value.abs().amax():
        raise NotDifferentiableError(
            "recompute: expected the same attributions in the backward pass as in the forward "
            f"pass, found a difference of {float(difference):.3g}. Something outside the model "
            "changed in between; keep it fixed until backward() is over, or use "
            "differentiation='double_backprop'."
        )


# ---- Known values with a gradient that is computed when it is asked for ---------------------


class _WithPullback(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pullback: Pullback, n_values: int, *tensors: Tensor) -> Any:
        known, sources = tensors[:n_values], tensors[n_values:]
        ctx.pullback, ctx.sources, ctx.n_values = pullback, sources, n_values
        # Unpacked in backward for torch's check that nobody changed them in place in between.
        ctx.save_for_backward(*sources)
        return tuple(value.detach() for value in known)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        # Torch's `once_differentiable` is silent where `autograd.grad` asks for leaves alone.
        if torch.is_grad_enabled():
            raise refusal(
                NotDifferentiableError,
                "second derivatives of attributions",
                "differentiation='double_backprop'",
                "create_graph=True in the backward pass of another, which keeps no graph",
                "Explain with double_backprop, or leave create_graph out.",
            )
        _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 + ctx.n_values :]
        gradients = ctx.pullback(cotangents, ctx.sources, wanted)
        return (None, None, *([None] * ctx.n_values), *gradients)


def with_pullback(
    known: Sequence[Tensor], sources: Sequence[Tensor], pullback: Pullback
) -> tuple[Tensor, ...]:
    """Return known values as differentiable functions of the sources, by their pullback."""
    if not any(source.requires_grad for source in sources):
        return tuple(known)
    apply: Callable[..., tuple[Tensor, ...]] = _WithPullback.apply
    return apply(pullback, len(known), *known, *sources)


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
    with without_hooks(wanted_sources):
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


# ---- The same forward pass, later ----------------------------------------------------------


class Conditions:
    """What decides the value of a forward pass besides its arguments and parameters.

    The backward pass of ``recompute`` and ``finite_difference`` runs the model again when the prior
    that held it still is long over; without this it would see another network. The block is the
    forward pass; afterwards ``modules`` are those that may have run, and ``stochastic`` says
    whether torch's random numbers were drawn.
    """

    modules: tuple[nn.Module, ...]
    stochastic: bool

    def __init__(self, forward_func: Any, streams: Sequence[str]) -> None:
        self._pass = current_pass()
        self._exact = self._pass is None or self._pass.exact
        held = None if self._pass is None else self._pass.statistics
        self._held = HeldStatistics() if held is None else held
        self._roots, self._hidden = plainly_in((forward_func,))
        refuse_batch_statistics(m for root in self._roots for m in root.modules())
        self._random, self._streams = GlobalState.now(streams), streams
        self._beta = current_beta()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._device = torch.get_default_device()  # of this thread; backward passes have their own

    def __enter__(self) -> "Conditions":
        with ExitStack() as stack:
            watch: Any = run_modules() if self._hidden else nullcontext(())
            self._running = stack.enter_context(watch)
            stack.enter_context(self._held.as_leaves())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        held = self._pass.modules if self._pass is not None else ()
        roots = (*self._roots, *self._running)
        self.modules = tuple({*held, *(m for root in roots for m in root.modules())})
        self.stochastic = self._random.moved()
        self._states = [
            (module, name, value)
            for module in self.modules
            for name, value in _state_of(module, self._held)
        ]

    def sources(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return what the leaves of the forward pass stand for: statistics have a graph."""
        return [self._held.source(leaf) for leaf in leaves]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Re-create the conditions, with gradients recorded."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(resumed(self._pass))
            if torch.get_default_device() != self._device:
                stack.enter_context(self._device)
            if self.stochastic or len(self._streams) > 1:
                stack.callback(GlobalState.now(self._streams).restore)
                self._random.restore()
            undo = [(module, name, getattr(module, name)) for module, name, _ in self._states]
            stack.callback(_set_all, undo)
            _set_all(self._states)
            if self._exact:
                enter_exact_kernels(stack, self.modules)
            if self._held.layers:
                run_eagerly(stack)
                stack.enter_context(self._held.as_leaves())
                stack.enter_context(self._held)
            if self._beta is not None or current_beta() is not None:
                stack.enter_context(ReluMode(self._beta))
            for device, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(
                        torch.autocast(
                            device, dtype=dtype, enabled=enabled, cache_enabled=self._autocast_cache
                        )
                    )
            yield


def _state_of(module: nn.Module, held: HeldStatistics) -> Iterator[tuple[str, Any]]:
    """Flags that decide how a module runs, and copies of the buffers that it may read."""
    yield "training", module.training
    if isinstance(module, nn.RNNBase):
        yield "dropout", module.dropout
    for name, buffer in module.named_buffers(recurse=False):
        yield name, buffer if buffer.requires_grad or held.knows(buffer) else buffer.clone()


def _set_all(states: Sequence[tuple[nn.Module, str, Any]]) -> None:
    for module, name, value in states:
        setattr(module, name, value)
