"""What the regularizers share: a model that is run, not an explainer that is asked."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._checks import check_floating, check_forward_func
from captum_priors._captum import as_tuple
from captum_priors._errors import expected_found, one_of
from captum_priors._types import Differentiation
from captum_priors.priors.base import Call, Reduction, Term

Tensors = tuple[Tensor, ...]


class Regularizer(Term):
    """A prior on a model's function, which it runs while holding it still."""

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


class GradientRegularizer(Regularizer):
    """A regularizer whose value is made of input gradients."""

    def __init__(
        self,
        forward_func: Any,
        *,
        differentiation: Differentiation = "double_backprop",
        reduction: Reduction = "mean",
        smooth: float | None = None,
    ) -> None:
        super().__init__(forward_func, reduction=reduction, smooth=smooth)
        one_of("differentiation", differentiation, ("double_backprop", "finite_difference"))
        self.differentiation: Differentiation = differentiation
        self.replayed = differentiation == "finite_difference"


def check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """Require a positive finite number, or zero where that is allowed."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (value >= 0 if zero else value > 0)
        or not value < float("inf")
    ):
        kind = "a finite number of at least 0" if zero else "a positive finite number"
        raise ValueError(
            expected_found(f"`{name}`", kind, repr(value), f"Pass for example {name}=0.1.")
        )
    return float(value)


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


def repeated(tensors: Tensors, times: int) -> Tensors:
    """Repeat the batch as a whole."""
    return tuple(torch.cat([t] * times) for t in tensors)
