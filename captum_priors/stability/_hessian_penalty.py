"""The Hessian penalty (Dombrowski et al. 2022)."""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from captum_priors._checks import check_count
from captum_priors.engine import input_gradients
from captum_priors.engine.replay import computes_in_half as half_precision
from captum_priors.engine import with_second_derivative
from captum_priors.engine.gradients import nodes
from captum_priors._errors import NotDifferentiableError, expected_found, one_of
from captum_priors._types import Differentiation
from captum_priors.priors.base import Reduction
from captum_priors.stability._regularizer import (
    Call,
    GradientRegularizer,
    Tensors,
    check_number,
    flat_rows,
    square_norms,
)

# The truncation error falls as the square of the step, rounding rises as its inverse.
_STEP, _STEP_HALF = 0.01, 0.1

Method = Literal["exact", "finite_difference"]


class HessianPenalty(GradientRegularizer):
    r"""Penalise the curvature of the explained output, which bounds how far its gradient can move.

    .. math:: \lVert\nabla_x^2 f(x)\rVert_F^2 = \mathbb E_v \lVert\nabla_x^2 f(x)\, v\rVert_2^2,
        \qquad v_i = \pm 1

    (Dombrowski et al. 2022; Hutchinson's estimator), for the output that ``target`` selects, the
    logit of the true class, say. The value is the mean over ``n_probes`` random vectors, an
    unbiased estimate; Rademacher entries have the least variance.

    With ``method="exact"`` the product with the Hessian is a second backward pass, so training
    differentiates the model three times. With ``"finite_difference"`` it is
    :math:`(\nabla f(x + hv) - \nabla f(x - hv)) / 2h`, one order less; ``differentiation`` says how
    *its* parameter gradient is taken, and ``"finite_difference"`` there needs first derivatives
    alone, for fused attention and compiled models. Torch's third derivatives of LayerNorm and
    InstanceNorm are wrong: the exact method refuses models that have them.

    A piecewise linear network (ReLU, max-pooling) has a Hessian of zero wherever it has one: the
    exact method then has nothing to train on, and warns. Give ``smooth``, or train
    a model with smooth activations.

    Args:
        forward_func: The model, or a function.
        n_probes: Random vectors for each call.
        method: ``"exact"`` or ``"finite_difference"``.
        differentiation: ``"double_backprop"`` or ``"finite_difference"``, for the gradients of
            ``method="finite_difference"``.
        step: :math:`h` relative to the root mean square of an example's entries; by default .01,
            and .1 in half precision.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Take the Hessian with ReLU as Softplus of this steepness.

    Raises:
        ValueError: If an option is not one of those above.
        NotDifferentiableError: If an operator of the model lacks the derivatives that are needed.

    Example:
        >>> import torch
        >>> from captum_priors.stability import HessianPenalty
        >>> diagonal = torch.tensor([1.0, -2.0, 3.0])
        >>> quadratic = lambda x: (x.square() * diagonal).sum(1) / 2
        >>> HessianPenalty(quadratic)(torch.randn(4, 3)).item()
        14.0
    """

    def __init__(
        self,
        forward_func: Any,
        n_probes: int = 1,
        *,
        method: Method = "exact",
        differentiation: Differentiation = "double_backprop",
        step: float | None = None,
        reduction: Reduction = "mean",
        smooth: float | None = None,
    ) -> None:
        super().__init__(
            forward_func, differentiation=differentiation, reduction=reduction, smooth=smooth
        )
        check_count("n_probes", n_probes)
        one_of("method", method, ("exact", "finite_difference"))
        if method == "exact" and differentiation != "double_backprop":
            raise ValueError(
                expected_found(
                    "`differentiation`",
                    "'double_backprop' with method='exact'",
                    repr(differentiation),
                    "Pass method='finite_difference' as well.",
                )
            )
        self.n_probes = n_probes
        self.method: Method = method
        self.step = None if step is None else check_number("step", step)
        self._warned = False

    def _scores(self, call: Call) -> Tensor:
        points = tuple(
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in call.inputs
        )
        product = self._exact(call, points) if self.method == "exact" else self._quotient(call)
        estimates = [square_norms(product(rademacher(points))) for _ in range(self.n_probes)]
        scores = torch.stack(estimates).mean(0)
        self._warn_if_useless(scores)
        return scores

    @staticmethod
    def _exact(call: Call, points: Tensors) -> Any:
        gradients = input_gradients(call.output, points)
        _refuse_wrong_third_derivatives(gradients)
        return lambda probes: hessian_vector_products(gradients, points, probes)

    def _quotient(self, call: Call) -> Any:
        step = self.step or (_STEP_HALF if half_precision(call.inputs) else _STEP)
        size = typical_size(call.inputs) * step

        def product(probes: Tensors) -> Tensors:
            moves = tuple(size.to(v.dtype).reshape(-1, *[1] * (v.dim() - 1)) * v for v in probes)
            sides = tuple(
                torch.cat([x + m, x - m]) for x, m in zip(call.inputs, moves, strict=True)
            )
            gradients = input_gradients(call.output, sides, self.differentiation)
            halves = [flat_rows((g,)).chunk(2) for g in gradients]
            return tuple((above - below) / (2 * size.unsqueeze(1)) for above, below in halves)

        return product

    def _warn_if_useless(self, scores: Tensor) -> None:
        if self._warned:
            return
        self._warned = True  # once, because looking at a value makes a GPU wait
        if not bool(scores.detach().any()):
            warnings.warn(
                f"{self!r}: the Hessian is zero at every example, as that of a piecewise linear "
                "network is. Pass smooth=beta (30, say), or train with smooth activations.",
                stacklevel=2,
            )

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"n_probes": self.n_probes}
        if self.method != "exact":
            options["method"] = self.method
        return options


def _refuse_wrong_third_derivatives(gradients: Tensors) -> None:
    """Refuse operators whose second derivative torch differentiates into something else.

    The second derivative of LayerNorm, and of BatchNorm by the statistics of the batch (which
    InstanceNorm calls), is right, and its own derivative is off by half (torch 2.13).
    """
    for node in nodes(gradients):
        name = node.name()
        by_batch = "BatchNorm" in name and (
            getattr(node, "_saved_training", False) or getattr(node, "_saved_train", False)
        )
        if "LayerNorm" in name or by_batch:
            raise NotDifferentiableError(
                expected_found(
                    "method='exact'",
                    "operators whose third derivatives are right in torch",
                    "LayerNorm" if "LayerNorm" in name else "InstanceNorm or training BatchNorm",
                    "Pass method='finite_difference', which needs second derivatives only.",
                )
            )


def rademacher(like: Tensors) -> Tensors:
    """Random signs."""
    return tuple(torch.randint_like(x, 2, requires_grad=False) * 2 - 1 for x in like)


def hessian_vector_products(gradients: Tensors, points: Tensors, vectors: Tensors) -> Tensors:
    """Differentiate <gradients, vectors> with its graph; zero where nothing depends on a point."""
    slope = torch.stack(
        [(flat_rows((g,)) * flat_rows((v,))).sum() for g, v in zip(gradients, vectors, strict=True)]
    ).sum()
    if not slope.requires_grad:
        return tuple(torch.zeros_like(p) for p in points)
    found = with_second_derivative(slope, points, allow_unused=True)
    return tuple(
        torch.zeros_like(p) if h is None else h for h, p in zip(found, points, strict=True)
    )


def typical_size(inputs: Tensors) -> Tensor:
    """Root mean square of each example's entries, the least over its tensors.

    No less than a tenth of the batch's: an example at the origin would get no step at all.
    """
    sizes = []
    for x in inputs:
        size = flat_rows((x.detach(),)).square().mean(1).sqrt()
        typical = size.mean()
        size = torch.maximum(size, 0.1 * typical)
        sizes.append(torch.where(size > 0, size, 1))
    return torch.stack(sizes).amin(0)
