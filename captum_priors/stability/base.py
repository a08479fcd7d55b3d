"""What the regularizers share: a model that is run, not an explainer that is asked.

A regularizer is a docstring with its equation, a signature whose options ``_set`` checks and keeps,
and ``_scores``. Those of classifiers say ``labels = True`` and take logits and labels together from
:func:`logits_and_labels`, where labels that are no classes are refused.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._checks import check_floating, check_forward_func
from captum_priors._errors import expected_found, one_of
from captum_priors.engine import Field, input_gradients
from captum_priors.priors.base import Call, Reduction, Term

Tensors = tuple[Tensor, ...]
Check = Callable[[str, Any], Any]
Way = Literal["double_backprop", "finite_difference"]


class Shared(TypedDict, total=False):
    """Options of every :class:`GradientRegularizer`."""

    differentiation: Way
    reduction: Reduction
    smooth: float | None


class Regularizer(Term):
    """A prior on a model's function, which it runs while holding it still.

    Args:
        forward_func: The model, or another function of the inputs.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Run the model with ReLU as Softplus of this steepness.

    Raises:
        TypeError: If ``forward_func`` cannot be called.
        ValueError: If an option is not one of those above.
    """

    def __init__(
        self, forward_func: Any, *, reduction: Reduction = "mean", smooth: float | None = None
    ) -> None:
        check_forward_func(forward_func)
        super().__init__(forward_func, reduction=reduction, smooth=smooth)

    def _check_call(
        self, inputs: Any, baselines: Any, target: Any, annotations: dict[str, Any]
    ) -> None:
        super()._check_call(inputs, baselines, target, annotations)
        check_floating(as_tuple(inputs))

    def _input_gradients(self, call: Call, points: Tensors, field: Field | None = None) -> Tensors:
        """Differentiate the field, by default the loss (with ``labels``) or the target output."""
        if field is None:
            field = partial(cross_entropies, call) if self.labels else call.output
        way: Any = self._way()
        return input_gradients(field, points, way)


class GradientRegularizer(Regularizer):
    """A regularizer whose value is made of input gradients.

    Args:
        forward_func: The model, or another function of the inputs.
        differentiation: ``"double_backprop"`` or ``"finite_difference"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Take the gradients with ReLU as Softplus of this steepness.

    Raises:
        TypeError: If ``forward_func`` cannot be called, or an option has another name.
        ValueError: If an option is not one of those above.
    """

    differentiation: Way

    def __init__(
        self,
        forward_func: Any,
        *,
        differentiation: Way = "double_backprop",
        reduction: Reduction = "mean",
        smooth: float | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:  # collected to be told by the name of the class that was asked for
            raise TypeError(
                expected_found(
                    f"`{next(iter(unknown))}`",
                    f"an option of {type(self).__name__}",
                    "none of that name",
                    f"help({type(self).__name__}) lists them.",
                )
            )
        super().__init__(forward_func, reduction=reduction, smooth=smooth)
        one_of("differentiation", differentiation, ("double_backprop", "finite_difference"))
        self.differentiation = differentiation
        self.replayed = differentiation == "finite_difference"


# ---- Options -------------------------------------------------------------------------------


def choice(*allowed: Any) -> Check:
    """Check of an option that has one of some values."""

    def check(name: str, value: Any) -> Any:
        one_of(name, value, allowed)
        return value

    return check


def optional(check: Check) -> Check:
    """Check of an option that may also be None."""
    return lambda name, value: None if value is None else check(name, value)


# ---- Classes -------------------------------------------------------------------------------


def logits_of(outputs: Tensor) -> Tensor:
    """Logits (rows, classes); a single one stands against a class with logit zero."""
    if outputs.shape[1] == 1:
        return torch.cat([torch.zeros_like(outputs), outputs], 1)
    return outputs


def logits_and_labels(call: Call, points: Tensors) -> tuple[Tensor, Tensor]:
    """Logits of each row, and its class label, which repeats that of the batch.

    Raises:
        ValueError: If a label is none of the classes.
    """
    logits = logits_of(call.outputs(points))
    labels = torch.as_tensor(call.target, device=logits.device).flatten().expand(call.n).long()
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise ValueError(
            expected_found(
                "`target`",
                f"labels below the {logits.shape[1]} classes of the outputs",
                f"labels from {int(labels.min())} to {int(labels.max())}",
                "Check which output of the model this is.",
            )
        )
    return logits, labels.repeat(len(logits) // call.n)


def cross_entropies(call: Call, points: Tensors) -> Tensor:
    """Cross entropy of each row."""
    return F.cross_entropy(*logits_and_labels(call, points), reduction="none")


# ---- Rows ----------------------------------------------------------------------------------


def full_precision(tensor: Tensor) -> Tensor:
    """Raise half precision, in which sums over features overflow or stall."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def flat_rows(tensors: Tensors) -> Tensor:
    """All features of each example side by side, shape (rows, features)."""
    rows = [full_precision(t.reshape(t.shape[0], -1)) for t in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def square_norms(tensors: Tensors) -> Tensor:
    """Squared Euclidean norm of each example."""
    return flat_rows(tensors).square().sum(1)


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Give one number for each example the dimensions and the dtype of the tensor."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def repeated(tensors: Tensors, times: int) -> Tensors:
    """Repeat the batch as a whole."""
    return tuple(torch.cat([t] * times) for t in tensors)
