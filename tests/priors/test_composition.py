"""Priors add up and scale, and others stand around them: in value, gradient and what they print."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Guarded,
    Lazy,
    StabilityPrior,
    Subsample,
)
from captum_priors.distances import mse
from captum_priors.penalties import alignment, gini, l1, l2, outside
from captum_priors.priors import Prior
from tests.asserts import assert_same_numbers, gradients_of
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
    return (value, *gradients_of(value, [*model.parameters()]))


def _combined(*parts: tuple[float, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    columns = zip(*(values for _, values in parts), strict=True)
    return tuple(sum(c * v for (c, _), v in zip(parts, column, strict=True)) for column in columns)


FORMULAS: dict[str, tuple[Callable[..., Prior], tuple[float, float, float]]] = {
    "sum": (lambda p, q, r: p + q, (1, 1, 0)),
    "list": (lambda *terms: sum(terms), (1, 1, 1)),
    "multiple": (lambda p, q, r: 3 * p, (3, 0, 0)),
    "multiple from the right": (lambda p, q, r: q * -2.5, (0, -2.5, 0)),
    "multiple of a multiple": (lambda p, q, r: 0.5 * (3 * r), (0, 0, 1.5)),
    "nothing": (lambda p, q, r: 0 * p, (0, 0, 0)),
    "nested": (lambda p, q, r: 0.5 * (3 * p + q) + r, (1.5, 0.5, 1)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_linear_in_value_and_gradient(name: str, model: nn.Module, x: Tensor) -> None:
    formula, weights = FORMULAS[name]
    terms = (
        AttributionPrior(ExpectedGradients(model), l2, baselines=x),
        StabilityPrior(InputXGradient(model), mse, lambda x: x + torch.randn_like(x)),
        AttributionPrior(Saliency(model), gini),
    )
    expected = _combined(*zip(weights, (_evaluated(t, model, x) for t in terms), strict=True))
    assert_same_numbers(_evaluated(formula(*terms), model, x), expected, ROUNDING)
    assert sum(terms[:1]) is terms[0]


def test_repr_is_the_formula(model: nn.Module) -> None:
    p = AttributionPrior(
        ExpectedGradients(model), l1, n_samples=3, smooth=30, baselines=torch.ones(1)
    )
    q = AttributionPrior(Saliency(model), partial(alignment, measure="mse"), reduction="sum")
    first = "AttributionPrior(ExpectedGradients, l1, n_samples=3, baselines=..., smooth=30.0)"
    second = "AttributionPrior(Saliency, alignment(measure='mse'), reduction='sum')"
    assert repr(2 * (p + 3 * q)) == f"2 * ({first} + 3 * {second})"
    assert repr(2 * (0.25 * p)) == f"0.5 * {first}"
    assert repr(0.1 * p + (q + p)) == f"0.1 * {first} + {second} + {first}"
    assert repr(0.5 * Lazy(p, 3)) == f"0.5 * Lazy({first}, every=3)"
    assert repr(Subsample(p, 0.25)) == f"Subsample({first}, fraction=0.25)"
    guarded = Guarded(q, on_nonfinite="skip", max_value=5)
    assert repr(guarded) == f"Guarded({second}, on_nonfinite='skip', max_value=5.0)"


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


WRAPPERS: tuple[Callable[[Prior], Prior], ...] = (
    lambda p: 2 * p,
    lambda p: Lazy(p, 2),
    lambda p: Subsample(p, 0.5),
    Guarded,
)


def test_a_combination_takes_what_any_term_takes(model: nn.Module, x: Tensor) -> None:
    plain, marked = (AttributionPrior(Saliency(model), penalty) for penalty in (l1, outside))
    averaged = AttributionPrior(ExpectedGradients(model), l1)
    for wrap in WRAPPERS:
        total = wrap(plain + marked)
        assert total.takes("annotation")
        assert not total.takes("baselines")
        assert wrap(total + averaged).takes("baselines")
        for wrong in ({"mask": x}, {"baselines": x}):
            text = rf"expected keywords that a term of .* takes, found '{next(iter(wrong))}'"
            with pytest.raises(TypeError, match=text):
                total(x, target=1, annotation=torch.ones_like(x), **wrong)


# What is no number is not one either where Python would take it for one.
BAD: dict[str, tuple[Callable[[Prior, Any], Prior], tuple[Any, ...]]] = {
    "`every`: expected an integer of at least 1": (Lazy, (0, -1, 1.0, True, None)),
    r"`fraction`: expected a number in \(0, 1\]": (
        Subsample,
        (0, -0.5, 1.5, math.nan, True, "0.5", None),
    ),
    "`max_value`: expected a positive finite number": (
        lambda prior, limit: Guarded(prior, max_value=limit),
        (0, -1, math.nan, math.inf, True, "1"),
    ),
    "`on_nonfinite`: expected one of 'raise', 'skip'": (Guarded, ("warn",)),
    "`weight`: expected a finite number": (
        lambda prior, weight: weight * prior,
        (math.nan, math.inf, -math.inf),
    ),
    "expected a number": (lambda prior, weight: weight * prior, ("2", True, None, 1j)),
    "expected another prior": (lambda prior, other: other + prior, (1, 0.5, "prior", None)),
    "`prior`: expected a prior": (lambda _, other: Lazy(other, 2), (l1,)),
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused(text: str, model: nn.Module) -> None:
    make, values = BAD[text]
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"{text}.*, found .*\. [A-Z]"):
            make(AttributionPrior(Saliency(model), l1), value)


def test_parameters_of_the_model_are_not_those_of_the_prior(model: nn.Module, x: Tensor) -> None:
    p = AttributionPrior(ExpectedGradients(model), l1, baselines=x)
    total = 0.1 * p + StabilityPrior(Saliency(model), mse, model)
    assert list(total.parameters()) == []
    assert sorted(total.state_dict()) == [
        "terms.0.prior.stream._extra_state",
        "terms.1.stream._extra_state",
    ]
