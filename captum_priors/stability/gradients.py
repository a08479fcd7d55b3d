"""Regularizers made of input gradients: of the loss, of all outputs, and of the loss's Hessian."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from captum_priors._checks import count, positive
from captum_priors.attacks.ball import Tensors
from captum_priors.priors.base import Call
from captum_priors.priors.classes import logits_of
from captum_priors.stability.base import (
    GradientRegularizer,
    Shared,
    flat_rows,
    repeated,
    square_norms,
)


class InputGradientRegularization(GradientRegularizer):
    r"""Penalise the input gradient of the loss.

    .. math:: \lVert\nabla_x \ell(f(x), y)\rVert_2^2

    with the cross entropy :math:`\ell` (Ross and Doshi-Velez 2018; Drucker and LeCun 1992). The
    target is the class labels. A model with one output is taken as a binary classifier's logit.

    Args:
        forward_func: The model, which returns logits.
        options: ``differentiation``, ``"double_backprop"`` or ``"finite_difference"``; and
            ``reduction``, ``smooth``, ``batch_norm``, ``name`` of :class:`Term`.

    Raises:
        ValueError: If an option is not one of those above, or a label is none of the classes.

    Example:
        >>> import torch
        >>> from captum_priors.stability import InputGradientRegularization
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(1, 3), torch.tensor([1])
        >>> p = model(x).softmax(1)[0, 0]
        >>> expected = (p * (model.weight[0] - model.weight[1])).square().sum()
        >>> torch.allclose(InputGradientRegularization(model)(x, target=y), expected, rtol=1e-4)
        True
    """

    labels = True

    def _scores(self, call: Call) -> Tensor:
        return square_norms(self._input_gradients(call, call.inputs))


class CurvatureRegularization(GradientRegularizer):
    r"""CURE: penalise the change of the loss's gradient along its own sign.

    .. math:: \lVert\nabla\ell(x + hz) - \nabla\ell(x)\rVert_2^2, \qquad
        z = \mathrm{sign}\,\nabla\ell(x) / \lVert\mathrm{sign}\,\nabla\ell(x)\rVert_2

    with the cross entropy :math:`\ell` and :math:`z` a constant (Moosavi-Dezfooli et al. 2019),
    :math:`h^2` times the squared curvature in that direction for small h. The target is the class
    labels. Public code for CIFAR-10 has weight 4 and raises h to 3.

    Args:
        forward_func: The model, which returns logits.
        step_size: :math:`h`, in units of the inputs; an attribute that may be raised in training.
        options: As in :class:`InputGradientRegularization`.

    Raises:
        ValueError: If an option is not one of those above, or a label is none of the classes.

    Example:
        >>> import torch
        >>> from captum_priors.stability import CurvatureRegularization
        >>> line = lambda x: torch.cat([torch.zeros_like(x), x.exp().expm1().log()], 1)
        >>> x, y = torch.tensor([[1.0]]), torch.tensor([0])  # the loss is exp(x)
        >>> value = CurvatureRegularization(line, step_size=1)(x, target=y)
        >>> torch.allclose(value, (torch.e**2 - torch.tensor(torch.e)).square(), rtol=1e-4)
        True
    """

    labels = True

    def __init__(
        self, forward_func: Any, step_size: float = 3.0, **options: Unpack[Shared]
    ) -> None:
        super().__init__(forward_func, **options)
        self.step_size = positive("step_size", step_size)

    def _scores(self, call: Call) -> Tensor:
        here, there = self._gradients_along_sign(call, self.step_size)
        return (there - here).square().sum(1)


class _OutputsRegularizer(GradientRegularizer):
    """A regularizer that looks at the gradients of all outputs."""

    def _jacobian(self, call: Call, n_outputs: int) -> Tensor:
        """Jacobian of all outputs with its graph, shape (batch, outputs, features)."""
        x = call.inputs[0]
        each = torch.eye(n_outputs, dtype=x.dtype, device=x.device)
        rows = self._slopes(call, each.repeat_interleave(call.n, 0))
        return flat_rows(rows).reshape(n_outputs, call.n, -1).transpose(0, 1)

    def _slopes(self, call: Call, directions: Tensor) -> Tensors:
        """Input gradients of <direction, outputs>, a direction for each row of repeated inputs."""

        def field(points: Tensors) -> Tensor:
            outputs = call.outputs(points)
            return (outputs * directions.repeat(len(outputs) // len(directions), 1)).sum(1)

        points = repeated(call.inputs, len(directions) // call.n)
        return self._input_gradients(call, points, field)


class JacobianRegularization(_OutputsRegularizer):
    r"""Penalise how much all outputs together depend on the inputs.

    .. math:: \left\lVert\frac{\partial f}{\partial x}\right\rVert_F^2 = C\;
        \mathbb E_u \left\lVert\frac{\partial\, u^\top f}{\partial x}\right\rVert_2^2

    with :math:`u` uniform on the unit sphere of the :math:`C` outputs (Hoffman et al. 2019, whose
    code has a factor of ½). No target is needed; one that is passed is not looked at.

    Args:
        forward_func: The model: logits in the paper; wrap it in a softmax for probabilities.
        n_samples: Random directions :math:`u` for each call, or None for the norm itself at the
            price of a backward pass for each output.
        options: As in :class:`InputGradientRegularization`.

    Raises:
        ValueError: If an option is not one of those above.

    Example:
        >>> import torch
        >>> from captum_priors.stability import JacobianRegularization
        >>> model = torch.nn.Linear(3, 2)
        >>> value = JacobianRegularization(model, n_samples=None)(torch.randn(4, 3))
        >>> torch.allclose(value, model.weight.square().sum())
        True
    """

    def __init__(
        self, forward_func: Any, n_samples: int | None = 1, **options: Unpack[Shared]
    ) -> None:
        super().__init__(forward_func, **options)
        self.n_samples = None if n_samples is None else count("n_samples", n_samples)

    def _scores(self, call: Call) -> Tensor:
        with torch.no_grad():
            n_outputs = call.outputs(call.inputs).shape[1]
        if self.n_samples is None:
            return self._jacobian(call, n_outputs).square().sum((1, 2))
        x, shape = call.inputs[0], (self.n_samples * call.n, n_outputs)
        directions = torch.randn(shape, dtype=x.dtype, device=x.device)
        directions = directions / directions.norm(dim=1, keepdim=True)
        squares = square_norms(self._slopes(call, directions)) * n_outputs
        return squares.reshape(self.n_samples, call.n).mean(0)


class SmoothSurface(_OutputsRegularizer):
    r"""SSR: penalise the largest eigenvalue of the Hessian of the loss, in closed form.

    .. math:: \lambda_{\max}(\nabla_x^2 \ell), \qquad
        \nabla_x^2 \ell = W^\top (\mathrm{diag}\, p - p p^\top) W

    for a piecewise linear model with logits' Jacobian :math:`W` and probabilities :math:`p` (Wang
    et al. 2020); for others this is the Gauss-Newton part of the Hessian. It does not depend on the
    label, and is taken from the :math:`C \times C` matrix of the same eigenvalues,

    .. math:: S^\top W W^\top S, \qquad S = \mathrm{diag}\sqrt p - p \sqrt p^\top,\quad
        S S^\top = \mathrm{diag}\, p - p p^\top.

    The paper weighs it against the cross entropy, :math:`(1-\alpha)\,\ell + \alpha s
    \lambda_{\max}` with :math:`\alpha = .3`; its code averages W over colour channels, this does
    not. No target is needed; one that is passed is not looked at.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        options: As in :class:`InputGradientRegularization`.

    Raises:
        ValueError: If an option is not one of those above.

    Example:
        >>> import torch
        >>> from captum_priors.stability import SmoothSurface
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(1, 3)
        >>> p = model(x).sigmoid()
        >>> expected = (p * (1 - p)).sum() * model.weight.square().sum()
        >>> torch.allclose(SmoothSurface(model)(x), expected, rtol=1e-4)
        True
    """

    def __init__(self, forward_func: Any, **options: Unpack[Shared]) -> None:
        super().__init__(forward_func, **options)
        self.replayed = False  # the probabilities come from an ordinary forward pass

    def _scores(self, call: Call) -> Tensor:
        outputs = call.outputs(call.inputs)
        log_p = F.log_softmax(logits_of(outputs), 1)
        w = self._jacobian(call, outputs.shape[1])
        if outputs.shape[1] == 1:
            w = torch.cat([torch.zeros_like(w), w], 1)
        root = (log_p / 2).exp()  # whose derivative stays finite where p vanishes
        factor = torch.diag_embed(root) - log_p.exp().unsqueeze(2) * root.unsqueeze(1)
        half = factor.transpose(1, 2) @ w.to(factor.dtype)
        squared = half @ half.transpose(1, 2)
        finite = squared.isfinite().all(2).all(1)
        eigenvalues = torch.linalg.eigvalsh(torch.where(finite.reshape(-1, 1, 1), squared, 0))
        # What is not finite comes out as such, for a loss scaler to see.
        return torch.where(finite, eigenvalues[:, -1], squared.sum((1, 2)))
