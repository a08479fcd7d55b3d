"""Priors can be copied and pickled, as modules can."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, Lazy, StabilityPrior, Subsample
from captum_priors.distances import SoftTopK
from captum_priors.penalties import GraphLaplacian, l1
from tests.laws.leaves import Leaf, leaves_but


def assert_twins(prior: Any, x: Tensor, call: dict[str, Any]) -> None:
    """Twins say what the prior says, in training and in evaluation."""
    prior(x, **call)
    twins = [copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))]
    expected = [prior(x, **call).item() for _ in range(2)]
    for twin in twins:
        assert repr(twin) == repr(prior)
        assert [twin(x, **call).item() for _ in range(2)] == expected


@leaves_but("Stability-FGSM")  # whose perturbation is a function inside another
def test_copies_and_pickles_of_terms(leaf: Leaf) -> None:
    model, x = leaf.model(), leaf.batch()
    prior = leaf.make(model, smooth=3.0)
    assert_twins(prior, x, leaf.call(x))
    assert all(m is not model for m in copy.deepcopy(prior).models())


def shake(x: Tensor) -> Tensor:
    return x + 0.1


@pytest.mark.parametrize("which", range(3))
def test_copies_and_pickles_of_combinations(which: int) -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4)
    explainer = ExpectedGradients(model)
    drawn = AttributionPrior(explainer, GraphLaplacian(torch.ones(4, 4)), baselines=x)
    stable = StabilityPrior(explainer, SoftTopK(2), shake, baselines=x)
    sparse = AttributionPrior(explainer, l1, baselines=x)
    priors = [Lazy(drawn, every=2), Subsample(stable, fraction=0.5), 0.5 * stable + sparse]
    assert_twins(priors[which], x, {"target": 1})
