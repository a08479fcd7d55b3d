"""Priors add up and scale: in value, in gradient and in what they print."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, StabilityPrior
from captum_priors.distances import mse
from captum_priors.penalties import alignment, gini, l1, l2, outside
from captum_priors.priors import Prior
from tests.asserts import assert_same_numbers
from tests.cases import mlp

# Sums of two or three float64 numbers in another order.
ROUNDING = 1e-13


@pytest.fixture
def model() -> nn.Module:
    return mlp().model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def _evaluated(prior: Prior, model: nn.Module, x: Tensor, **call: Any) -> tuple[Tensor, ...]:
    """Value and parameter gradient, without moving on the prior's random stream."""
    value = prior.eval()(x, target=1, **call)
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return (value, *(torch.zeros(1) if g is None else g for g in gradients))


def _combined(*parts: tuple[float, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    columns = zip(*(values for _, values in parts), strict=True)
    return tuple(sum(c * v for (c, _), v in zip(parts, column, strict=True)) for column in columns)


def test_sum_is_linear_in_value_and_gradient(model: nn.Module, x: Tensor) -> None:
    p = AttributionPrior(ExpectedGradients(model), l2, baselines=x)
    q = StabilityPrior(Saliency(model), mse, lambda x: x + torch.randn_like(x))
    expected = _combined((1, _evaluated(p, model, x)), (1, _evaluated(q, model, x)))
    assert_same_numbers(_evaluated(p + q, model, x), expected, ROUNDING)


@pytest.mark.parametrize("weight", [3, 0.1, -2.5, 0])
def test_multiple_is_linear_in_value_and_gradient(
    model: nn.Module, x: Tensor, weight: float
) -> None:
    p = AttributionPrior(ExpectedGradients(model), gini, baselines=x)
    expected = _combined((weight, _evaluated(p, model, x)))
    assert_same_numbers(_evaluated(weight * p, model, x), expected, ROUNDING)
    assert_same_numbers(_evaluated(p * weight, model, x), expected, ROUNDING)
    assert_same_numbers(_evaluated(weight / 2 * (2 * p), model, x), expected, ROUNDING)


def test_nested_formula_is_linear_in_value_and_gradient(model: nn.Module, x: Tensor) -> None:
    p, q = AttributionPrior(Saliency(model), l1), AttributionPrior(InputXGradient(model), l2)
    expected = _combined((0.5 * 3, _evaluated(p, model, x)), (0.5, _evaluated(q, model, x)))
    assert_same_numbers(_evaluated(0.5 * (3 * p + q), model, x), expected, ROUNDING)


def test_sum_of_a_list_is_the_sum(model: nn.Module, x: Tensor) -> None:
    priors = [AttributionPrior(Saliency(model), penalty) for penalty in (l1, l2, gini)]
    expected = _combined(*((1, _evaluated(p, model, x)) for p in priors))
    assert_same_numbers(_evaluated(sum(priors), model, x), expected, ROUNDING)
    assert sum(priors[:1]) is priors[0]


def test_repr_is_the_formula(model: nn.Module) -> None:
    p = AttributionPrior(
        ExpectedGradients(model), l1, n_samples=3, smooth=30, baselines=torch.ones(1)
    )
    q = AttributionPrior(Saliency(model), partial(alignment, measure="mse"), reduction="sum")
    first = "AttributionPrior(ExpectedGradients, l1, n_samples=3, baselines=..., smooth=30.0)"
    second = "AttributionPrior(Saliency, alignment(measure='mse'), reduction='sum')"
    assert repr(p) == first
    assert repr(q) == second
    assert repr(0.1 * p + q) == f"0.1 * {first} + {second}"
    assert repr(2 * (p + 3 * q)) == f"2 * ({first} + 3 * {second})"
    assert repr(2 * (0.25 * p)) == f"0.5 * {first}"
    assert repr(p + (q + p)) == f"{first} + {second} + {first}"


def test_each_term_gets_the_annotations_and_baselines_that_it_takes(
    model: nn.Module, x: Tensor
) -> None:
    mask = torch.randint(2, x.shape)
    terms = [
        AttributionPrior(Saliency(model), l1),
        AttributionPrior(Saliency(model), outside),
        AttributionPrior(IntegratedGradients(model), l2),
    ]
    given: list[dict[str, Any]] = [{}, {"annotation": mask}, {"baselines": 0.5 * x}]
    alone = [_evaluated(t, model, x, **call) for t, call in zip(terms, given, strict=True)]
    together = _evaluated(sum(terms), model, x, annotation=mask, baselines=0.5 * x)
    assert_same_numbers(together, _combined(*((1, values) for values in alone)), ROUNDING)


def test_takes_what_any_term_takes(model: nn.Module) -> None:
    plain, marked = (
        AttributionPrior(Saliency(model), l1),
        AttributionPrior(Saliency(model), outside),
    )
    averaged = AttributionPrior(ExpectedGradients(model), l1)
    total = 2 * (plain + marked)
    assert total.takes("annotation")
    assert not total.takes("baselines")
    assert (total + averaged).takes("baselines")


def test_keyword_that_no_term_takes_is_refused(model: nn.Module, x: Tensor) -> None:
    total = AttributionPrior(Saliency(model), l1) + AttributionPrior(Saliency(model), outside)
    with pytest.raises(TypeError, match=r"expected keywords that a term of .* takes, found 'mask'"):
        total(x, target=1, annotation=torch.ones_like(x), mask=x)
    with pytest.raises(TypeError, match=r"expected keywords .*, found 'baselines'"):
        total(x, x, target=1, annotation=torch.ones_like(x))


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weight_that_is_not_finite_is_refused(model: nn.Module, weight: float) -> None:
    prior = AttributionPrior(Saliency(model), l1)
    with pytest.raises(ValueError, match=rf"`weight`: expected a finite number, found {weight}\."):
        weight * prior


@pytest.mark.parametrize("other", ["2", True, None, 1j])
def test_weight_that_is_no_number_is_refused(model: nn.Module, other: Any) -> None:
    prior = AttributionPrior(Saliency(model), l1)
    with pytest.raises(TypeError, match=r"expected a number, found"):
        other * prior


@pytest.mark.parametrize("other", [1, 0.5, "prior", None])
def test_term_that_is_no_prior_is_refused(model: nn.Module, other: Any) -> None:
    prior = AttributionPrior(Saliency(model), l1)
    with pytest.raises(TypeError, match=r"expected another prior, found"):
        other + prior
    with pytest.raises(TypeError, match=r"expected another prior, found"):
        prior + other


def test_parameters_of_the_model_are_not_those_of_the_prior(model: nn.Module, x: Tensor) -> None:
    p = AttributionPrior(ExpectedGradients(model), l1, baselines=x)
    total = 0.1 * p + StabilityPrior(Saliency(model), mse, model)
    assert list(total.parameters()) == []
    assert sorted(total.state_dict()) == [
        "terms.0.prior.stream._extra_state",
        "terms.1.stream._extra_state",
    ]
