"""What the regularizers share: a model that is run, not an explainer that is asked.

A regularizer is a docstring with its equation, a signature whose options are checked and kept,
and ``_scores``. Those of classifiers say ``labels = True`` and take logits and labels together from
:func:`logits_and_labels`, where labels that are no classes are refused.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_priors._captum import as_tuple
from captum_priors._checks import check_floating, check_forward_func
from captum_priors._errors import one_of
from captum_priors.attacks.ball import Tensors, unit
from captum_priors.engine import Field, input_gradients
from captum_priors.priors.base import Call
from captum_priors.priors.classes import cross_entropies as cross_entropies
from captum_priors.priors.classes import logits_and_labels as logits_and_labels
from captum_priors.priors.classes import logits_of as logits_of
from captum_priors.priors.terms import TermOptions, Unannotated

Way = Literal["double_backprop", "finite_difference"]


class Shared(TermOptions, total=False):
    """Options of every :class:`GradientRegularizer`."""

    differentiation: Way


class Regularizer(Unannotated):
    """A prior on a model's function, which it runs while holding it still."""

    def __init__(self, forward_func: Any, **options: Unpack[TermOptions]) -> None:
        check_forward_func(forward_func)
        super().__init__(forward_func, **options)

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
    """A regularizer whose value is made of input gradients."""

    differentiation: Way

    def __init__(
        self,
        forward_func: Any,
        *,
        differentiation: Way = "double_backprop",
        **options: Unpack[TermOptions],
    ) -> None:
        super().__init__(forward_func, **options)
        one_of("differentiation", differentiation, ("double_backprop", "finite_difference"))
        self.differentiation = differentiation
        self.replayed = differentiation == "finite_difference"

    def _gradients_along_sign(self, call: Call, step_size: float) -> tuple[Tensor, Tensor]:
        """Gradients, as rows, at the inputs and a step along the sign of these, a constant."""
        with torch.no_grad():
            signs = flat_rows(self._input_gradients(call, call.inputs)).sign()
            moves = points_of(step_size * unit(signs), call.inputs)
        both = tuple(torch.cat([x + m, x]) for x, m in zip(call.inputs, moves, strict=True))
        there, here = flat_rows(self._input_gradients(call, both)).chunk(2)
        return here, there


# ---- Rows ----------------------------------------------------------------------------------


def flat_rows(tensors: Tensors) -> Tensor:
    """All features of each example side by side, shape (rows, features).

    In at least single precision: sums over features overflow or stall in half.
    """
    rows = torch.cat([t.reshape(len(t), -1) for t in tensors], 1)
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def points_of(rows: Tensor, like: Tensors) -> Tensors:
    """Tensors like the inputs from rows of all their features, shape (..., features)."""
    parts = rows.split([x[0].numel() for x in like], -1)
    pairs = zip(parts, like, strict=True)
    return tuple(part.reshape(-1, *x.shape[1:]).to(x.dtype) for part, x in pairs)


def square_norms(tensors: Tensors) -> Tensor:
    """Squared Euclidean norm of each example."""
    return flat_rows(tensors).square().sum(1)


def repeated(tensors: Tensors, times: int) -> Tensors:
    """Repeat the batch as a whole."""
    return tuple(torch.cat([t] * times) for t in tensors)
