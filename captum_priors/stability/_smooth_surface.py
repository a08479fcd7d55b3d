"""Smooth surface regularization (Wang et al. 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors.stability._classes import logits_of
from captum_priors.stability._jacobian import jacobian
from captum_priors.stability._regularizer import Call, GradientRegularizer


class SmoothSurface(GradientRegularizer):
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
        differentiation: ``"double_backprop"`` or ``"finite_difference"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Take the Jacobian with ReLU as Softplus of this steepness.

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

    def _scores(self, call: Call) -> Tensor:
        outputs = call.outputs(call.inputs)
        log_p = F.log_softmax(logits_of(outputs), 1)
        w = jacobian(call, self.differentiation)
        if outputs.shape[1] == 1:
            w = torch.cat([torch.zeros_like(w), w], 1)
        root = (log_p / 2).exp()  # whose derivative stays finite where p vanishes
        factor = torch.diag_embed(root) - log_p.exp().unsqueeze(2) * root.unsqueeze(1)
        half = factor.transpose(1, 2) @ w.to(factor.dtype)
        eigenvalues: Tensor = torch.linalg.eigvalsh(half @ half.transpose(1, 2))
        return eigenvalues[:, -1]

    def _holds_again(self) -> bool:
        return False  # the probabilities come from an ordinary forward pass
