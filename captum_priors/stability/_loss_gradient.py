"""Regularizers of the input gradient of the training loss: its size and its change."""

from typing import Any

import torch
from torch import Tensor

from captum_priors.engine import input_gradients
from captum_priors._lift import safe_norm
from captum_priors.stability._classes import cross_entropies
from captum_priors.stability._regularizer import (
    Call,
    GradientRegularizer,
    Tensors,
    check_number,
    flat_rows,
    square_norms,
)


class _LossGradient(GradientRegularizer):
    """A regularizer of the input gradient of the cross entropy, with labels as the target."""

    labels = True

    def _gradients(self, call: Call, points: Tensors) -> Tensors:
        return input_gradients(lambda p: cross_entropies(call, p), points, self.differentiation)


class InputGradientRegularization(_LossGradient):
    r"""Penalise the input gradient of the loss.

    .. math:: \lVert\nabla_x \ell(f(x), y)\rVert_2^2

    with the cross entropy :math:`\ell` (Ross and Doshi-Velez 2018; Drucker and LeCun 1992). The
    target is the class labels. A model with one output is taken as a binary classifier's logit.

    Args:
        forward_func: The model, which returns logits.
        differentiation: ``"double_backprop"`` or ``"finite_difference"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Take the gradient with ReLU as Softplus of this steepness.

    Raises:
        ValueError: If an option is not one of those above.

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

    def _scores(self, call: Call) -> Tensor:
        return square_norms(self._gradients(call, call.inputs))


class CurvatureRegularization(_LossGradient):
    r"""CURE: penalise the change of the loss's gradient along its own sign.

    .. math:: \lVert\nabla\ell(x + hz) - \nabla\ell(x)\rVert_2^2, \qquad
        z = \mathrm{sign}\,\nabla\ell(x) / \lVert\mathrm{sign}\,\nabla\ell(x)\rVert_2

    with the cross entropy :math:`\ell` and :math:`z` a constant (Moosavi-Dezfooli et al. 2019),
    :math:`h^2` times the squared curvature in that direction for small h. The target is the class
    labels. Public code for CIFAR-10 has weight 4 and raises h to 3.

    Args:
        forward_func: The model, which returns logits.
        h: Length of the step, in units of the inputs; an attribute that may be raised in training.
        squared: Square the norm, as in the paper; a public implementation does not.
        differentiation: ``"double_backprop"`` or ``"finite_difference"``.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Take the gradients with ReLU as Softplus of this steepness.

    Raises:
        ValueError: If an option is not one of those above.

    Example:
        >>> import torch
        >>> from captum_priors.stability import CurvatureRegularization
        >>> line = lambda x: torch.cat([torch.zeros_like(x), x.exp().expm1().log()], 1)
        >>> x, y = torch.tensor([[1.0]]), torch.tensor([0])  # the loss is exp(x)
        >>> value = CurvatureRegularization(line, h=1)(x, target=y)
        >>> torch.allclose(value, (torch.e**2 - torch.tensor(torch.e)).square(), rtol=1e-4)
        True
    """

    def __init__(self, forward_func: Any, h: float = 3.0, *, squared: bool = True, **options: Any):
        super().__init__(forward_func, **options)
        self.h = check_number("h", h)
        self.squared = squared

    def _scores(self, call: Call) -> Tensor:
        with torch.no_grad():
            signs = tuple(g.sign() for g in self._gradients(call, call.inputs))
            length = flat_rows(signs).norm(dim=1)
            scale = self.h / torch.where(length > 0, length, 1)
            moves = tuple(s * scale.to(s.dtype).reshape(-1, *[1] * (s.dim() - 1)) for s in signs)
        both = tuple(torch.cat([x + m, x]) for x, m in zip(call.inputs, moves, strict=True))
        there, here = flat_rows(self._gradients(call, both)).chunk(2)
        if self.squared:
            return (there - here).square().sum(1)
        return safe_norm(there - here)

    def _options(self) -> dict[str, Any]:
        return {"h": self.h} if self.squared else {"h": self.h, "squared": False}
