"""Values of input gradients, from one ordinary backward pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from captum_priors._engine._graph import leaves, no_second_derivative
from captum_priors._errors import NotDifferentiableError

Field = Callable[[tuple[Tensor, ...]], Tensor]
"""The explained output, one number for each row, as a function of the points.

It is made for some number of rows, and takes any multiple of them as that many repetitions.
"""

_thread = threading.local()

# What torch's own refusals have in their text, and what stands behind them.
_REFUSALS = {
    "use_reentrant": "reentrant activation checkpointing",
    "donated buffer": "CompiledFunctionBackward",
}


def values(field: Field, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Input gradients without a graph, also under ``torch.no_grad``."""
    with torch.enable_grad():
        points = tuple(p.detach().requires_grad_() for p in points)
        outputs = field(points)
        collected: dict[int, Tensor] | None = getattr(_thread, "leaves", None)
        if collected is not None:
            found = leaves([outputs])
            collected.update({k: v for k, v in found.items() if all(v is not p for p in points)})
        return differentiate(outputs, points, create_graph=False)


@contextmanager
def collecting_leaves() -> Iterator[dict[int, Tensor]]:
    """Collect the leaves that every field evaluated without a graph in this block depends on."""
    before = getattr(_thread, "leaves", None)
    _thread.leaves = {}
    try:
        yield _thread.leaves
    finally:
        _thread.leaves = before


def differentiate(
    outputs: Tensor, points: tuple[Tensor, ...], *, create_graph: bool
) -> tuple[Tensor, ...]:
    """Differentiate the summed outputs, with errors that say what to do."""
    _check_outputs(outputs, points[0].shape[0])
    if not outputs.requires_grad:
        raise NotDifferentiableError(
            "`forward_func`: expected an output that depends on the inputs, found one without a "
            "graph. Look for detach(), torch.no_grad(), .data or a NumPy step inside it."
        )
    # The cotangent of ones requires a gradient in its turn, because torch marks a function as
    # differentiable only once where its cotangent does, and drops its graph in silence elsewhere.
    ones = torch.ones_like(outputs, requires_grad=create_graph)
    try:
        gradients = torch.autograd.grad(
            outputs, points, ones, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        for sign, culprit in _REFUSALS.items():
            if sign in str(error):
                raise NotDifferentiableError(no_second_derivative(culprit)) from error
        raise
    for i, gradient in enumerate(gradients):
        if gradient is None:
            raise NotDifferentiableError(
                f"`inputs[{i}]`: expected the explained output to depend on it, found that it does "
                "not. Pass a tensor that is not to be explained in `additional_forward_args`, and "
                "look for detach() or torch.no_grad() inside `forward_func`."
            )
    return tuple(gradients)


def _check_outputs(outputs: Tensor, n_rows: int) -> None:
    if outputs.numel() == 1 or outputs.shape in ((n_rows,), (n_rows, 1)):
        return
    raise ValueError(
        f"`target`: expected it to select one output for each of the {n_rows} rows, found outputs "
        f"of shape {tuple(outputs.shape)}. Pass target=... (a class index, or one for each "
        "example), or let forward_func return shape (batch,)."
    )


def check_points(points: tuple[Tensor, ...]) -> None:
    """Require floating-point points."""
    for i, point in enumerate(points):
        if not point.is_floating_point():
            raise TypeError(
                f"`inputs[{i}]`: expected a floating-point tensor, found {point.dtype}. Token ids "
                "have no gradient: explain their embeddings, with LayerExpectedGradients or by "
                "passing the embeddings as inputs."
            )
