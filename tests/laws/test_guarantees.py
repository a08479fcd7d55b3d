"""Guarantees: a bound is one for the parameters of now, and NaN is no evidence for a gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_priors import NotDifferentiableError
from captum_priors.stability import manipulability_bound
from captum_priors.testing import Certificate, check_differentiable

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


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.slope, None


class Explainer:
    """Attributions of three parameters, one of whose gradients is not a number."""

    def __init__(self, bad: int, slope: float) -> None:
        self.model = nn.ParameterList([torch.randn(4) for _ in range(3)])
        self.bad, self.slope = bad, slope

    def attribute(self, x: Tensor) -> Tensor:
        each = [
            Spoiled.apply(p, self.slope) if i == self.bad else p for i, p in enumerate(self.model)
        ]
        return x * (each[0].square() + each[1].sin() + each[2].pow(3))


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("slope", [float("nan"), float("inf"), -float("inf")])
def test_certificates_fail_for_nan_wherever_it_is(bad: int, slope: float) -> None:
    explainer, x = Explainer(bad, slope), torch.randn(3, 4)
    named = list(explainer.model.named_parameters())
    for parameters in (named, named[::-1]):
        found = check_differentiable(explainer, x, parameters=parameters, raise_exception=False)
        assert not found.passed
        assert not found.errors[str(bad)] <= found.tolerance
        with pytest.raises(NotDifferentiableError, match=f"'{bad}'"):
            check_differentiable(explainer, x, parameters=parameters)


def test_certificates_pass_without() -> None:
    explainer = Explainer(0, 1.0)
    named = explainer.model.named_parameters()
    assert check_differentiable(explainer, torch.randn(3, 4), parameters=named).passed


@pytest.mark.parametrize("values", [[float("nan"), 0.0], [0.0, float("nan")]])
def test_certificates_of_nan_values_fail(values: list[float]) -> None:
    errors = dict(zip("ab", values, strict=True))
    assert not Certificate(error=float("nan"), errors=errors, tolerance=1.0).passed
