"""Jacobian regularization, and the Jacobian that it and others are made of."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._checks import check_count
from captum_priors.engine import input_gradients
from captum_priors._types import Differentiation
from captum_priors.priors.base import Reduction
from captum_priors.stability._regularizer import (
    Call,
    GradientRegularizer,
    Tensors,
    flat_rows,
    repeated,
    square_norms,
)


class JacobianRegularization(GradientRegularizer):
    r"""Penalise how much all outputs together depend on the inputs.

    .. math:: \left\lVert\frac{\partial f}{\partial x}\right\rVert_F^2 = C\;
        \mathbb E_u \left\lVert\frac{\partial\, u^\top f}{\partial x}\right\rVert_2^2

    with :math:`u` uniform on the unit sphere of the :math:`C` outputs (Hoffman et al. 2019, whose
    code has a factor of ½). No target is needed; one that is passed is not looked at.

    Args:
        forward_func: The model: logits in the paper; wrap it in a softmax for probabilities.
        n_probes: Random directions :math:`u` for each call, or None for the norm itself at the
            price of a backward pass for each output.
        differentiation: ``"double_backprop"`` or ``"finite_difference"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Take the Jacobian with ReLU as Softplus of this steepness.

    Raises:
        ValueError: If an option is not one of those above.

    Example:
        >>> import torch
        >>> from captum_priors.stability import JacobianRegularization
        >>> model = torch.nn.Linear(3, 2)
        >>> value = JacobianRegularization(model, n_probes=None)(torch.randn(4, 3))
        >>> torch.allclose(value, model.weight.square().sum())
        True
    """

    def __init__(
        self,
        forward_func: Any,
        n_probes: int | None = 1,
        *,
        differentiation: Differentiation = "double_backprop",
        reduction: Reduction = "mean",
        smooth: float | None = None,
    ) -> None:
        super().__init__(
            forward_func, differentiation=differentiation, reduction=reduction, smooth=smooth
        )
        check_count("n_probes", n_probes, optional=True)
        self.n_probes = n_probes

    def _scores(self, call: Call) -> Tensor:
        way = self.differentiation
        if self.n_probes is None:
            return jacobian(call, way).square().sum((1, 2))
        n_outputs = count_outputs(call)
        directions = torch.randn(
            self.n_probes * call.n,
            n_outputs,
            dtype=call.inputs[0].dtype,
            device=call.inputs[0].device,
        )
        directions = directions / directions.norm(dim=1, keepdim=True)
        squares = square_norms(_slopes(call, directions, way)) * n_outputs
        return squares.reshape(self.n_probes, call.n).mean(0)

    def _options(self) -> dict[str, Any]:
        return {"n_probes": self.n_probes}


def jacobian(call: Call, differentiation: Differentiation) -> Tensor:
    """Jacobian of all outputs with its graph, shape (batch, outputs, features)."""
    n_outputs = count_outputs(call)
    x = call.inputs[0]
    each = torch.eye(n_outputs, dtype=x.dtype, device=x.device)
    rows = _slopes(call, each.repeat_interleave(call.n, 0), differentiation)
    return flat_rows(rows).reshape(n_outputs, call.n, -1).transpose(0, 1)


def count_outputs(call: Call) -> int:
    """Count the outputs of an example."""
    with torch.no_grad():
        return call.outputs(call.inputs).shape[1]


def _slopes(call: Call, directions: Tensor, differentiation: Differentiation) -> Tensors:
    """Input gradients of <direction, outputs>, a direction for each row of repeated inputs."""

    def field(points: Tensors) -> Tensor:
        outputs = call.outputs(points)
        return (outputs * directions.repeat(len(outputs) // len(directions), 1)).sum(1)

    return input_gradients(field, repeated(call.inputs, len(directions) // call.n), differentiation)
