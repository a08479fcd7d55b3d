"""Priors can be copied and pickled, as modules can."""

import copy
import pickle

import torch
from torch import nn

from captum_priors import AttributionPrior, ExpectedGradients, Lazy, StabilityPrior, Subsample
from captum_priors.distances import SoftTopK, cosine
from captum_priors.penalties import GraphLaplacian, l1
from captum_priors.priors import PixelPrior, Prior


def shake(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1


def priors(model: nn.Module, x: torch.Tensor) -> list[Prior]:
    explainer = ExpectedGradients(model)
    graph = GraphLaplacian(torch.ones(4, 4))
    return [
        AttributionPrior(explainer, l1, baselines=x, smooth=3.0),
        Lazy(AttributionPrior(explainer, graph, baselines=x), every=2),
        Subsample(StabilityPrior(explainer, SoftTopK(2), shake, baselines=x), fraction=0.5),
        0.5 * StabilityPrior(explainer, cosine, shake, baselines=x)
        + AttributionPrior(explainer, l1, baselines=x),
        PixelPrior(model, baselines=x),
    ]


def test_copies_and_pickles_give_the_same_values() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    for i in range(5):
        prior = priors(model, x)[i]
        prior(x, target=1)
        twins = [copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))]
        expected = [prior(x, target=1).item() for _ in range(2)]
        for twin in twins:
            assert repr(twin) == repr(prior)
            assert [twin(x, target=1).item() for _ in range(2)] == expected
