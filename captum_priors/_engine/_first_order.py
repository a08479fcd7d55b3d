"""Values of input gradients, from one ordinary backward pass."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from captum_priors._engine._graph import leaves, no_second_derivative, now, refuse_dead_ends
from captum_priors._engine._piecewise_linear import constant_slopes
from captum_priors._engine._wrappers import refuse_lost_gradients
from captum_priors._errors import NotDifferentiableError, TargetError

Field = Callable[[tuple[Tensor, ...]], Tensor]
"""The explained output, one number for each row, as a function of the points.

It is made for some number of rows, and takes any multiple of them as that many repetitions.
"""

P = ParamSpec("P")
T = TypeVar("T")

_thread = threading.local()

# What torch's own refusals have in their text, and what stands behind them.
_REFUSALS = {
    "use_reentrant": "reentrant activation checkpointing",
    "donated buffer": "CompiledFunctionBackward",
}


class Pass:
    """One evaluation without a graph, remembering the leaves that it depends on."""

    def __init__(self, *, returns_with_graph: bool) -> None:
        self.since = started()
        self.leaves: dict[int, Tensor] = {}
        self._probe = returns_with_graph

    def probes(self) -> bool:
        """Whether to try the graph now: once, so that an obstacle shows before the way back."""
        first, self._probe = self._probe, False
        return first

    def reach(self, tensors: Iterable[Tensor], own: Iterable[Tensor]) -> None:
        """Remember the leaves behind the tensors, all but its own."""
        mine = {id(tensor) for tensor in own}
        found = leaves(tensors, self.since)
        self.leaves.update({key: leaf for key, leaf in found.items() if key not in mine})


def values(field: Field, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Input gradients without a graph, also under ``torch.no_grad``."""
    with torch.enable_grad():
        points = tuple(p.detach().requires_grad_() for p in points)
        outputs = evaluate(field, points)
        current = current_pass()
        if current is None:
            return differentiate(outputs, points, create_graph=False)
        current.reach([outputs], points)
        gradients = differentiate(outputs, points, create_graph=current.probes())
        return tuple(g.detach() for g in gradients)


def evaluate(field: Field, points: tuple[Tensor, ...]) -> Tensor:
    """Evaluate the field, on copies where the model may work in place on what it is given."""
    if all(p.is_leaf for p in points):
        try:
            return field(points)
        except RuntimeError as error:  # torch protects leaves, and only them
            if "leaf Variable that requires grad" not in str(error):
                raise
    return field(tuple(p.clone() for p in points))


def current_pass() -> Pass | None:
    """Return the evaluation without a graph that is under way in this thread."""
    found: Pass | None = getattr(_thread, "current", None)
    return found


@contextmanager
def without_graph(*, returns_with_graph: bool) -> Iterator[Pass]:
    """Evaluate every input gradient in this block without a graph."""
    before = current_pass()
    _thread.current = Pass(returns_with_graph=returns_with_graph)
    try:
        yield _thread.current
    finally:
        _thread.current = before


def started() -> int:
    """Moment from which on graphs belong to the explainer's call."""
    since: int | None = getattr(_thread, "since", None)
    return now() if since is None else since


def marks_start(function: Callable[P, T]) -> Callable[P, T]:
    """Mark the start of an explainer's call, unless it is called by another."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if getattr(_thread, "since", None) is not None:
            return function(*args, **kwargs)
        _thread.since = now()
        try:
            return function(*args, **kwargs)
        finally:
            _thread.since = None

    return wrapper


def differentiate(
    outputs: Tensor,
    points: tuple[Tensor, ...],
    *,
    create_graph: bool,
    no_zeros_since: int | None = None,
) -> tuple[Tensor, ...]:
    """Differentiate the summed outputs, with errors that say what to do."""
    _check_outputs(outputs, points[0].shape[0])
    if not outputs.requires_grad:
        raise NotDifferentiableError(
            "`forward_func`: expected an output that depends on the inputs, found one without a "
            "graph. Look for detach(), torch.no_grad(), .data or a NumPy step inside it."
        )
    gradients: Sequence[Tensor | None]
    if create_graph:
        gradients = with_second_derivative(
            outputs, points, allow_unused=True, no_zeros_since=no_zeros_since
        )
    else:
        refuse_lost_gradients([outputs], twice=False)
        gradients = _grad(outputs, points, torch.ones_like(outputs), allow_unused=True)
    found = []
    for i, gradient in enumerate(gradients):
        if gradient is None:
            raise NotDifferentiableError(
                f"`inputs[{i}]`: expected the explained output to depend on it, found that it does "
                "not. Pass a tensor that is not to be explained in `additional_forward_args`, and "
                "look for detach() or torch.no_grad() inside `forward_func`."
            )
        found.append(gradient)
    return tuple(found)


def with_second_derivative(
    outputs: Any,
    inputs: Any,
    *,
    cotangents: Any = None,
    allow_unused: bool = False,
    no_zeros_since: int | None = None,
) -> tuple[Tensor, ...]:
    """Differentiate with a graph, and refuse operators that have no second derivative.

    With a moment given, derivatives of what ran since that are zero everywhere are left out: who
    asks for the gradient by something that only they lead to gets none, and an error where torch
    insists on one.
    """
    several = isinstance(outputs, (tuple, list))
    refuse_lost_gradients(outputs if several else [outputs], twice=True)
    if cotangents is None:
        # Ones that require a gradient in their turn, because torch marks a function as
        # differentiable only once where its cotangent does, and drops its graph silently elsewhere.
        ones = [torch.ones_like(o, requires_grad=True) for o in (outputs if several else [outputs])]
        cotangents = ones if several else ones[0]
    each = outputs if several else [outputs]
    with nullcontext() if no_zeros_since is None else constant_slopes(each, no_zeros_since):
        gradients = _grad(outputs, inputs, cotangents, allow_unused=allow_unused, create_graph=True)
    refuse_dead_ends(tuple(g for g in gradients if g is not None))
    return gradients


def _grad(outputs: Any, inputs: Any, cotangents: Any, **options: bool) -> tuple[Tensor, ...]:
    try:
        gradients: tuple[Tensor, ...] = torch.autograd.grad(outputs, inputs, cotangents, **options)
        return gradients
    except RuntimeError as error:
        for sign, culprit in _REFUSALS.items():
            if sign in str(error):
                raise NotDifferentiableError(no_second_derivative(culprit)) from error
        raise


def _check_outputs(outputs: Tensor, n_rows: int) -> None:
    one_each = outputs.numel() == n_rows and outputs.shape[:1] == (n_rows,)
    if outputs.numel() == 1 or one_each:
        return
    raise TargetError(
        f"`target`: expected it to select one output for each of the {n_rows} rows, found outputs "
        f"of shape {tuple(outputs.shape)}. Pass target=... (a class index, or one for each "
        "example), or let forward_func return shape (batch,)."
    )


def check_points(points: tuple[Tensor, ...]) -> None:
    """Require floating-point points."""
    for i, point in enumerate(points):
        if not point.is_floating_point():
            raise TypeError(
                f"`inputs[{i}]`: expected a floating-point tensor, found {point.dtype}. Images "
                "and counts: inputs.float(), scaled as the model expects. Token ids have no "
                "gradient: explain their embeddings, with LayerExpectedGradients or by passing the "
                "embeddings as inputs."
            )
