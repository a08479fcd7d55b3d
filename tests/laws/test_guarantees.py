"""A bound is one for the parameters of now."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_priors.stability import manipulability_bound

WEIGHTS: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "plain": (lambda layer: layer, "weight"),
    "old weight_norm": (torch.nn.utils.weight_norm, "weight_g"),
    "weight_norm": (
        torch.nn.utils.parametrizations.weight_norm,
        "parametrizations.weight.original0",
    ),
    "old spectral_norm": (torch.nn.utils.spectral_norm, "weight_orig"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_bounds_are_of_the_parameters_of_now(kind: str, norm: Any) -> None:
    wrap, name = WEIGHTS[kind]
    model = nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    model(x)
    with torch.no_grad():
        model[0].get_parameter(name).mul_(10)
    bound = manipulability_bound(model, x, x + 0.02, target=0, norm=norm)
    moved = (gradient(model, x + 0.02) - gradient(model, x)).norm(dim=1)
    assert bool((moved <= bound).all()), (moved / bound).max()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
