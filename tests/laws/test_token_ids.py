"""Token ids have no gradient: everyone who is asked for one says where to go instead."""

import captum.attr as ca
import pytest
import shap
import torch
from torch import Tensor, nn

from captum_priors import ExpectedGradients, StabilityPrior, differentiable
from captum_priors.attacks import RandomAttack, TopKAttack
from captum_priors.distances import mse
from captum_priors.stability import manipulability_bound
from tests.laws.leaves import CAPTUM, FEATURES, GRADIENT_ROWS, REFUSALS, Leaf, leaves_but


class Tokens(nn.Module):
    """A classifier of token ids with what the table of adapters asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.act = nn.Embedding(9, 4), nn.ReLU()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.second, self.layer = nn.Linear(6, 6), self.act

    neuron, window, shape = (2,), (2,), (FEATURES,)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.act(self.first(self.embedding(ids).mean(1)))))

    def __getitem__(self, i: int) -> nn.Module:
        return self.first


# Rules of the user's own are refused before the inputs are looked at, where rules are by function.
OTHERS = ("Layer", "Internal", "GuidedGradCam", "LRP-rules")
INPUTS = [name for name in GRADIENT_ROWS if not name.startswith(OTHERS)]


@pytest.mark.parametrize("name", INPUTS)
def test_token_ids_in_adapters(name: str) -> None:
    row, model = CAPTUM[name], Tokens()
    call, ids = row.call(model), torch.randint(9, (3, FEATURES))
    if row.baselines:
        call["baselines"] = torch.randint(9, (5, FEATURES))
    explainer = differentiable(row.make(model))
    with pytest.raises(REFUSALS, match="LayerExpectedGradients"):
        explainer.attribute(ids, **call)


@pytest.mark.parametrize("name", ["GradientExplainer", "DeepExplainer"])
def test_token_ids_in_explainers_of_shap(name: str) -> None:
    ids, model = torch.randint(9, (3, FEATURES)), Tokens()
    with pytest.raises(REFUSALS, match="LayerExpectedGradients"):
        differentiable(getattr(shap, name)(model, ids)).attribute(ids, target=0)


# A layer may well be an embedding, and a user's perturbation comes before the explainer.
@leaves_but(
    *("LayerEG", "LayerEG-two-runs", "HINT", "RRR-CAM", "Concept", "Concept-maps-random"),
    *("Stability", "Stability-FGSM"),
)
def test_token_ids_in_priors(leaf: Leaf) -> None:
    ids = torch.randint(9, (4, FEATURES))
    with pytest.raises(REFUSALS, match="LayerExpectedGradients"):
        leaf.make(Tokens())(ids, **leaf.call(ids))


def test_token_ids_in_attacks_and_bounds() -> None:
    ids, model = torch.randint(9, (4, FEATURES)), Tokens()
    eg = ExpectedGradients(model)
    for ask in (
        lambda: eg.attribute(ids, ids, target=0),
        lambda: TopKAttack(ca.Saliency(model), 2, radius=0.1).perturb(ids, 0),
        lambda: RandomAttack(model, radius=0.1).perturb(ids),
        lambda: manipulability_bound(model, ids, ids, 0, form="path"),
        lambda: StabilityPrior(ca.Saliency(model), mse, lambda x: x)(ids, target=0),
    ):
        with pytest.raises(REFUSALS, match="LayerExpectedGradients"):
            ask()
