"""Where torch's third derivatives are wrong, they are refused wherever they would be needed."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors import AttributionPrior, NotDifferentiableError, differentiable
from captum_priors.penalties import l2, outside
from captum_priors.stability import HessianPenalty
from tests.laws.leaves import FEATURES, WAYS


class Unsqueezed(nn.Module):
    """Norms of channels, on features."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h.unflatten(1, (2, 4))).flatten(1)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "InstanceNorm": lambda: Unsqueezed(nn.InstanceNorm1d(2, affine=True)),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "BatchNorm": lambda: nn.BatchNorm1d(8).eval(),
}


class Force(nn.Module):
    """A model whose outputs are the gradient of an energy."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(z).sum(), z, create_graph=True)[0]


def right_or_refused(weight: Tensor, value: Callable[[], Tensor]) -> None:
    """The gradient by a weight is the central difference of the value, or there is none."""
    direction, sides = torch.randn_like(weight), []
    try:
        found = (torch.autograd.grad(value(), weight)[0] * direction).sum()
    except NotDifferentiableError:
        return
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight += step * direction
        sides.append(value().detach())
    expected = (sides[0] - sides[1]) / 2e-5
    # Truncation and rounding of the difference, or of `finite_difference` with its step of .2 %.
    assert float((found - expected).abs()) <= 1e-3 * float(expected.abs())


def normed(norm: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), NORMS[norm](), nn.Tanh(), nn.Linear(8, 1))


every_norm = pytest.mark.parametrize("norm", NORMS)


@every_norm
def test_third_derivatives_of_hessian_penalties(norm: str) -> None:
    model, x = normed(norm), torch.randn(4, FEATURES)
    prior = HessianPenalty(model, 2).eval()
    right_or_refused(model[0].weight, lambda: prior(x))


@every_norm
@pytest.mark.parametrize("way", WAYS)
def test_third_derivatives_of_models_with_a_gradient_inside(norm: str, way: Any) -> None:
    energy, x = normed(norm), torch.randn(4, FEATURES)
    explainer = differentiable(ca.Saliency(Force(energy)), differentiation=way)
    prior, mask = (
        AttributionPrior(explainer, outside, abs=False, missing="nan"),
        torch.zeros_like(x),
    )
    with torch.no_grad():
        prior(x, target=0, annotation=mask)  # a look is no first call
    prior(x, target=0, annotation=torch.nan * mask)  # nor is one that explains nothing
    right_or_refused(energy[0].weight, lambda: prior(x, target=0, annotation=mask))


@every_norm
@pytest.mark.parametrize("way", WAYS)
def test_third_derivatives_of_a_gradient_differentiated_again(norm: str, way: Any) -> None:
    model, x = normed(norm), torch.randn(4, FEATURES)
    explainer = differentiable(ca.Saliency(model), differentiation=way)
    prior = AttributionPrior(explainer, l2, abs=False)

    def slope() -> Tensor:
        loss = prior(x) + F.softplus(model(x)).mean()
        return torch.autograd.grad(loss, model[3].weight, create_graph=True)[0].square().sum()

    right_or_refused(model[0].weight, slope)
