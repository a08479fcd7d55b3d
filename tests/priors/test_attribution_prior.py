"""The attribution prior against computations by hand, and its behaviour at the edges."""

from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, Saliency
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    NotDifferentiableError,
    StabilityPrior,
    differentiable,
)
from captum_priors.distances import mse
from captum_priors.penalties import gini, l1, l2
from tests.asserts import assert_is, assert_same_numbers, input_gradient
from tests.cases import DIFFERENTIATIONS, EXACT, mlp, relu_mlp, tuple_inputs

# The same float64 operations in another order.
ROUNDING = 1e-12


@pytest.mark.parametrize(("reduction", "weight"), [("mean", 1 / 5), ("sum", 1.0)])
def test_equals_a_computation_by_hand(reduction: Any, weight: float) -> None:
    model, x = mlp().model, mlp().inputs
    here, again = (input_gradient(model, x, 1) for _ in range(2))
    prior = AttributionPrior(InputXGradient(model), l1, reduction=reduction)
    assert_is(prior(x, target=1), weight * (x * here).abs().sum(), model, ROUNDING)
    # A penalty of the batch is not reduced.
    prior = AttributionPrior(Saliency(model), gini, reduction=reduction)
    assert_is(prior(x, target=1), gini(again), model, ROUNDING)


def test_baselines_of_the_call_come_before_those_of_the_constructor() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    prior = AttributionPrior(ExpectedGradients(model), l2, baselines=torch.zeros(1, 4))
    moved = (model.weight[0] * (x - x[0])).square().sum(1).mean()
    assert_same_numbers(prior(x, x[:1], target=0), moved, ROUNDING)
    assert_same_numbers(prior(x, baselines=x[:1], target=0), moved, ROUNDING)
    assert_same_numbers(prior(x, target=0), (model.weight[0] * x).square().sum(1).mean(), ROUNDING)


def test_tuple_inputs_and_additional_arguments() -> None:
    case = tuple_inputs()
    leaves = tuple(t.clone().requires_grad_() for t in case.inputs)
    output = case.model(*leaves, *case.args)[:, 1]
    gradients = torch.autograd.grad(output.sum(), leaves, create_graph=True)
    expected = torch.stack([g.square().sum() for g in gradients]).sum() / 4
    value = AttributionPrior(Saliency(case.model), l2)(case.inputs, **case.call)
    assert_is(value, expected, case.model, ROUNDING)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_model_that_is_frozen_altogether_gives_a_value(way: Any) -> None:
    case = mlp()
    prior = AttributionPrior(differentiable(Saliency(case.model), differentiation=way), l2)
    expected = prior(case.inputs, target=0).item()
    case.model.requires_grad_(requires_grad=False)
    other = torch.ones((), requires_grad=True)
    (other.square() + prior(case.inputs, target=0)).backward()
    assert prior(case.inputs, target=0).item() == expected
    assert other.grad == 2
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_gradient_reaches_the_module_upstream(way: Any) -> None:
    model, encoder, raw = mlp().model, nn.Linear(6, 4), torch.randn(5, 6)
    leaf = encoder(raw)
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf, create_graph=True)
    explainer = differentiable(InputXGradient(model), differentiation=way)
    value = AttributionPrior(explainer, l1)(encoder(raw), target=1)
    # Central differences over 1 % of the point: truncation is (1e-2)^2, times the curvature.
    tolerance = ROUNDING if way in EXACT else 1e-3
    assert_is(value, (leaf * gradient).abs().sum(1).mean(), encoder, ROUNDING, tolerance)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("stable", [False, True])
def test_smooth_runs_the_attribution_pass_with_softplus(way: Any, stable: bool) -> None:
    """The backward pass of two of the ways comes after the prior has put ReLU back."""
    case = relu_mlp()
    twin = nn.Sequential(*(nn.Softplus(5.0) if isinstance(m, nn.ReLU) else m for m in case.model))

    def value(model: nn.Module, smooth: float | None) -> Tensor:
        explainer = differentiable(Saliency(model), differentiation=way)
        prior = (
            StabilityPrior(explainer, mse, lambda x: x + 0.3, smooth=smooth)
            if stable
            else AttributionPrior(explainer, l2, smooth=smooth)
        )
        return prior(case.inputs, target=2)

    # A difference of nearly equal maps loses digits.
    tolerances = ROUNDING, 1e-10 if stable else ROUNDING
    assert_is(value(case.model, 5.0), value(twin, None), case.model, *tolerances)
    rough = value(case.model, None).item()
    assert abs(rough / value(case.model, 5.0).item() - 1) > 1e-3


class Detaching:
    """Looks like an explainer and cuts the graph."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        with torch.enable_grad():
            return input_gradient(self.model, inputs, target).detach()


def test_explainer_that_detaches_is_refused() -> None:
    case = mlp()
    prior = AttributionPrior(Detaching(case.model), l1)
    text = (
        r"`explainer`: expected attributions with a graph to the model's trainable parameters, "
        r"found none from Detaching\. Look for detach\(\)"
    )
    with pytest.raises(NotDifferentiableError, match=text):
        prior(case.inputs, target=1)
    with torch.no_grad():
        assert float(prior(case.inputs, target=1)) > 0
