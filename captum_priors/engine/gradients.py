"""The seam: the one place where the gradient of a model's output by its input is taken."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_priors._checks import check_floating
from captum_priors._errors import NotDifferentiableError, TargetError, expected_found, refusal
from captum_priors._types import Differentiation
from captum_priors.engine._torch import (
    DEAD_ENDS,
    PLACEHOLDERS,
    REFUSALS,
    by_batch_statistics,
    leaf_of,
    now,
    older,
)
from captum_priors.engine.model import Seen, current_pass

Field = Callable[[tuple[Tensor, ...]], Any]
"""The explained output, one number for each row, as a function of the points; or a tuple of such.

It is made for some number of rows, and takes any multiple of them as that many repetitions.
"""

_thread = threading.local()


def input_gradients(
    field: Field, points: tuple[Tensor, ...], way: Differentiation = "double_backprop"
) -> tuple[Tensor, ...]:
    r"""Gradient :math:`g = \nabla_z \sum_i f_i(z)`, with its graph where gradients are recorded.

    Args:
        field: :math:`f`, one number for each row.
        points: :math:`z`, tensors ``(rows, ...)``.
        way: ``"double_backprop"`` or ``"finite_difference"``. ``"recompute"`` is no case here: it
            wraps a whole sum of such gradients, and evaluates this function without a graph going
            forward and with one coming back.

    Returns:
        Gradients like the points; of several outputs those of one after those of another, from one
        forward pass.

    Raises:
        TypeError: If a point is no floating-point tensor.
        ValueError: If the outputs are not one number for each row.
        NotDifferentiableError: If no correct parameter gradient exists.

    Example:
        >>> import torch
        >>> from captum_priors.engine import input_gradients
        >>> w, z = torch.ones(3, requires_grad=True), torch.randn(4, 3)
        >>> (g,) = input_gradients(lambda points: points[0].square() @ w, (z,))
        >>> torch.equal(g, 2 * z), torch.allclose(torch.autograd.grad(g.sum(), w)[0], 2 * z.sum(0))
        (True, True)
    """
    own: list[Tensor] = []
    for point in points:
        if not point.is_floating_point():
            check_floating(points)
        # An alias of what has a graph: the field may also use the user's own tensor, and only the
        # argument counts.
        given = point.requires_grad
        own.append(point.view_as(point) if given else point.detach().requires_grad_())
    if not torch.is_grad_enabled() or recording() is not None:
        return values(field, points)
    if way == "finite_difference":
        from captum_priors.engine.finite_difference import (
            finite_difference,  # which is made of gradients
        )

        return finite_difference(field, points)
    return differentiate(field(tuple(own)), tuple(own), create_graph=True)


def values(field: Field, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Input gradients without a graph, also under ``torch.no_grad``."""
    with torch.enable_grad():
        points = tuple([p.detach().requires_grad_() for p in points])
        outputs = field(points)
        current, held = recording(), getattr(current_pass(), "statistics", None)
        keep = held is not None and held.shared  # whose graph is a part of this one
        if current is None:
            return differentiate(outputs, points, create_graph=False, retain_graph=keep)
        current.reach(outputs if isinstance(outputs, tuple) else [outputs], points)
        tries = current.tries_graph()
        gradients = differentiate(outputs, points, create_graph=tries, retain_graph=keep)
        return tuple(g.detach() for g in gradients)


def differentiate(
    outputs: Any, points: tuple[Tensor, ...], *, create_graph: bool, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Differentiate the summed outputs, with errors that say what to do."""
    if isinstance(outputs, tuple):
        found: list[Tensor] = []
        for i, output in enumerate(outputs, 1):
            keep = retain_graph or i < len(outputs)
            found += differentiate(output, points, create_graph=create_graph, retain_graph=keep)
        return tuple(found)
    if outputs.shape != points[0].shape[:1]:
        check_rows(outputs, points[0].shape[0])
    if not outputs.requires_grad:
        raise NotDifferentiableError(
            "`forward_func`: expected an output that depends on the inputs, found one without a "
            "graph. Look for detach(), torch.no_grad(), .data or a NumPy step inside it."
        )
    if create_graph:
        gradients = with_second_derivative(outputs, points, allow_unused=True)
    else:
        ones = torch.ones_like(outputs)
        try:
            gradients = torch.autograd.grad(
                outputs, points, ones, retain_graph=retain_graph, allow_unused=True
            )
        except RuntimeError as error:
            raise _worded(error) from error
    for i, gradient in enumerate(gradients):
        if gradient is None:
            raise NotDifferentiableError(
                f"`inputs[{i}]`: expected the explained output to depend on it, found that it does "
                "not. Pass a tensor that is not to be explained in `additional_forward_args`, and "
                "look for detach() or torch.no_grad() inside `forward_func`."
            )
    return gradients


def with_second_derivative(
    outputs: Any, inputs: Any, *, cotangents: Any = None, allow_unused: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """Differentiate with a graph, and refuse operators that have no second derivative.

    ``torch.autograd.grad(..., create_graph=True)``, checked on the first call of each pass: what
    has no second derivative is named now, not when the training loss is differentiated.

    Raises:
        NotDifferentiableError: If an operator has no second derivative, or a wrong third one where
            that is needed.
    """
    current = current_pass()
    seen = Seen() if current is None else current.seen
    each = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    if not seen.before and _wrong_third(each):
        raise NotDifferentiableError(_third("derivatives of input gradients"))
    if cotangents is None:
        # Ones that require a gradient in their turn, because torch marks a function as
        # differentiable only once where its cotangent does, and drops its graph silently elsewhere.
        ones = functools.partial(torch.ones_like, requires_grad=True)
        cotangents = [*map(ones, each)]
    try:
        gradients: tuple[Any, ...] = torch.autograd.grad(
            each, inputs, cotangents, create_graph=True, allow_unused=allow_unused, **options
        )
    except RuntimeError as error:
        raise _worded(error) from error
    if not seen.before:
        present = [g for g in gradients if g is not None]
        refuse_dead_ends(present)
        seen.wrong_third = seen.wrong_third or _wrong_third(present)
    if seen.wrong_third:
        present = [g for g in gradients if g is not None]
        once = iter(_OnceMore.apply(*present))  # type: ignore[no-untyped-call]  # torch's
        gradients = tuple(g if g is None else next(once) for g in gradients)
    return gradients


# ---- What is checked -----------------------------------------------------------------------


def check_rows(outputs: Tensor, n_rows: int) -> None:
    """Require one number for each row.

    Raises:
        ValueError: If there are several for each row, or one for all rows.
    """
    if outputs.shape[:1] == (n_rows,) and outputs.numel() == n_rows:
        return
    if outputs.numel() == 1 and n_rows == 1:
        return
    if outputs.numel() == 1:
        raise refusal(
            TargetError,
            "`forward_func`",
            f"one output for each of the {n_rows} rows",
            "one number for all of them, whose attributions would scale with how many rows go "
            "through at once",
            'Return shape (batch,): a loss takes reduction="none".',
        )
    raise refusal(
        TargetError,
        "`target`",
        f"it to select one output for each of the {n_rows} rows",
        f"outputs of shape {tuple(outputs.shape)}",
        "Pass target=..., a class index, or one for each example; for outputs of several "
        "dimensions a tuple, target=(class, row, column), or a sum of them, "
        "captum_priors.outputs.total(mask); or let forward_func return shape (batch,).",
    )


class _OnceMore(torch.autograd.Function):
    """Gradients whose own gradient is right, and whose second is not."""

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            raise NotDifferentiableError(_third("second derivatives of attributions"))
        return cotangents


def _wrong_third(tensors: Iterable[Tensor]) -> bool:
    """Whether the graph holds second derivatives that torch differentiates into something else.

    The second derivative of LayerNorm, and of BatchNorm by the statistics of the batch (which
    InstanceNorm calls), is right, and its own derivative is off by half (torch 2.13).
    """
    for node in nodes(tensors):
        name = node.name()
        if "BackwardBackward" in name and (
            "LayerNorm" in name or ("BatchNorm" in name and by_batch_statistics(node))
        ):
            return True
    return False


def _third(by: str) -> str:
    return expected_found(
        by,
        "operators whose third derivatives are right in torch",
        "LayerNorm, InstanceNorm or training BatchNorm",
        "Give the model GroupNorm or RMSNorm; for a model's own gradients differentiation="
        "'finite_difference', in HessianPenalty curvature='difference', needs second derivatives.",
    )


# ---- Graphs --------------------------------------------------------------------------------


def nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Walk the graph behind the tensors, each node once."""
    seen: set[Any] = {None}
    stack: list[Any] = list({tensor.grad_fn for tensor in tensors} - seen)
    seen.update(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)


def _worded(error: RuntimeError) -> RuntimeError:
    """Word torch's own refusal of a second derivative; other errors pass."""
    for sign, culprit in REFUSALS.items():
        if sign in str(error):
            return NotDifferentiableError(no_second_derivative(culprit))
    return error


def refuse_dead_ends(gradients: Sequence[Tensor]) -> None:
    """Raise while the attribution is computed, not when the training loss is differentiated."""
    for node in nodes(gradients):
        if node.name() in DEAD_ENDS:
            raise NotDifferentiableError(no_second_derivative(_culprit(node, gradients)))


def _culprit(node: Any, gradients: Sequence[Tensor]) -> str:
    """Torch names the operator only when the node runs, so run it, on the way to the error."""
    name: str = node.name()
    if name in PLACEHOLDERS:
        connected = [g for g in gradients if g.requires_grad]
        sources = list(Recording(since=0).reach(connected, ()).values())
        try:
            torch.autograd.grad(
                [g.sum() for g in connected], sources, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return name


def no_second_derivative(culprit: str) -> str:
    """Word the error for an operator without a second derivative."""
    return (
        "double backpropagation: expected every operator of the model to have a second derivative, "
        f"found one that has none ({culprit}). Ways out: differentiation='finite_difference' needs "
        "first derivatives only; for reentrant activation checkpointing, use_reentrant=False."
    )


class Recording:
    """Evaluations without a graph, whose gradient comes later: the leaves that they depend on."""

    def __init__(self, *, since: int | None = None, returns_with_graph: bool = False) -> None:
        self.since = now() if since is None else since
        self.leaves: dict[int, Tensor] = {}
        self._tries = returns_with_graph

    def tries_graph(self) -> bool:
        """Whether to try the graph now: once, so that an obstacle shows before the way back."""
        first, self._tries = self._tries, False
        return first

    def reach(self, tensors: Iterable[Tensor], own: Iterable[Tensor]) -> dict[int, Tensor]:
        """Remember the leaves behind the tensors, all but its own.

        A graph that was made before is not entered but refused: whoever made it may ask for the
        gradient at any of its tensors, and would not get this part of it.
        """
        tensors, mine = tuple(tensors), {id(tensor) for tensor in own}
        found = {id(t): t for t in tensors if t.requires_grad and t.grad_fn is None}
        for node in nodes(tensors):
            leaf = leaf_of(node)
            if leaf is not None:
                found[id(leaf)] = leaf
            elif older(node, self.since) and not _casts_a_leaf(node):
                raise NotDifferentiableError(_CLOSED_OVER)
        self.leaves.update({key: leaf for key, leaf in found.items() if key not in mine})
        return self.leaves


def _casts_a_leaf(node: Any) -> bool:
    """Whether the node is one of those that autocast makes once for each parameter and region."""
    return node.name() == "ToCopyBackward0" and all(
        leaf_of(following) is not None for following, _ in node.next_functions
    )


_CLOSED_OVER = (
    "`forward_func`: expected it to depend on leaf tensors and on its inputs, found a tensor with "
    "a graph that was computed before the call or in another thread (an additional argument, a "
    "closed-over tensor, a weight kept by parametrize.cached). Compute it inside forward_func, "
    "detach it if it is a constant, or use differentiation='double_backprop'."
)


recording: Callable[[], Recording | None] = functools.partial(getattr, _thread, "recording", None)
"""Return the evaluation without a graph that is under way in this thread."""


@contextmanager
def without_graph(*, returns_with_graph: bool) -> Iterator[Recording]:
    """Evaluate every input gradient in this block without a graph."""
    before = recording()
    _thread.recording = Recording(returns_with_graph=returns_with_graph)
    try:
        yield _thread.recording
    finally:
        _thread.recording = before
