"""One function for each law."""

import copy
import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_priors._slopes import beside
from captum_priors.engine import Stream


@contextmanager
def new_objects() -> Iterator[Callable[[], list[Any]]]:
    """Let objects that are made from here on be listed, those that only a cycle keeps among them.

    The others are out of the collector's sight meanwhile: looking at all of them takes longer than
    what is tested.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.get_objects
    finally:
        gc.enable()
        gc.unfreeze()


def resident() -> int:
    """Memory of this process in bytes, in which graphs that no collector sees show."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_same_numbers(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Equal structure, shapes and dtypes; values within a tolerance relative to the largest."""
    assert isinstance(actual, tuple) == isinstance(expected, tuple)
    for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(1e-30, float(b.detach().abs().max()))
        assert float((a - b).detach().abs().max()) <= tolerance * scale


def parameter_gradients(value: Any, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of a fixed nonlinear function of the attributions, zeros where there is none."""
    loss = torch.stack([(a.square() + torch.sin(3 * a)).sum() for a in as_tuple(value)]).sum()
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def gradients_of(value: Tensor, parameters: Sequence[Any]) -> list[Tensor]:
    """Gradient of a number, zeros where there is none."""
    found = torch.autograd.grad(value, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, target: int) -> Tensor:
    """Gradient of one output of each example, by torch alone."""
    leaf = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, target].sum(), leaf, create_graph=True)
    return gradient


def assert_is(
    value: Tensor,
    expected: Tensor,
    model: nn.Module,
    tolerance: float,
    of_gradients: float | None = None,
) -> None:
    """A number and its gradients by the parameters; ``expected`` says of what value."""
    assert value.shape == ()
    assert_same_numbers(value, expected, tolerance)
    parameters = [*model.parameters()]
    error = relative_error(gradients_of(value, parameters), gradients_of(expected, parameters))
    assert error < (of_gradients or tolerance)


def assert_slope(
    value: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    rtol: float = 1e-4,
    atol: float = 1e-7,
) -> None:
    """The gradient is the slope of the value along a random direction of all parameters.

    ``check_gradient`` looks at each by itself, which takes twice as many evaluations for each.
    The tolerance is for the truncation of the difference, and of ``finite_difference`` itself.
    """
    directions, step = [torch.randn_like(p) for p in parameters], 1e-5
    pairs = zip(gradients_of(value(), parameters), directions, strict=True)
    slope = sum(float((g * d).sum()) for g, d in pairs)
    moves = zip(parameters, (step * d for d in directions), strict=True)
    above, below = beside(value, *moves)
    assert slope == pytest.approx((above - below) / (2 * step), rel=rtol, abs=atol)


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Distance of two gradients, relative to the second, all tensors together."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(actual, expected, strict=True))
    size = sum(float(b.square().sum()) for b in expected)
    assert size > 0
    return (difference / size) ** 0.5


def state_of(*models: nn.Module, tensors: Sequence[Tensor] = ()) -> dict[str, Any]:
    """Everything that a prior must not change."""
    modules = [m for model in models for m in model.modules()]
    return {
        "state_dict": [copy.deepcopy(model.state_dict()) for model in models],
        "training": [m.training for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "hooks": [
            [len(getattr(m, n)) for n in vars(m) if n.endswith("_hooks") and vars(m)[n] is not None]
            for m in modules
        ],
        "requires_grad": [p.requires_grad for m in models for p in m.parameters()]
        + [t.requires_grad for t in tensors],
        "grad": [
            None if p.grad is None else p.grad.clone()
            for p in [*(p for m in models for p in m.parameters()), *tensors]
        ],
        "values": [t.detach().clone() for t in tensors],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002  # Captum's generator
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        assert _equal(value, after[name]), name


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def assert_same_parameters(
    a: nn.Module, b: nn.Module, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Bit-identical, unless something is said."""
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


@contextmanager
def leaves_no_trace(*models: nn.Module, tensors: Sequence[Tensor] = ()) -> Iterator[None]:
    """The block changes nothing of the training state, whether it succeeds or raises."""
    before = state_of(*models, tensors=tensors)
    try:
        yield
    finally:
        assert_same_state(before, state_of(*models, tensors=tensors))


def assert_unbiased(draw: Callable[[], Tensor], expected: Tensor, n: int) -> None:
    """The mean of n draws is within four standard errors everywhere."""
    draws = torch.stack([draw().detach() for _ in range(n)])
    error = (draws.mean(0) - expected).abs()
    assert float((error / (draws.std(0) / n**0.5 + 1e-12)).max()) < 4


def draw_alike(first: nn.Module, *others: nn.Module) -> None:
    """Let other priors draw what the first one draws: streams that are alive together differ."""

    def streams(prior: nn.Module) -> list[Stream]:
        return [module for module in prior.modules() if isinstance(module, Stream)]

    for other in others:
        for ours, theirs in zip(streams(first), streams(other), strict=True):
            theirs.set_extra_state(ours.get_extra_state())
