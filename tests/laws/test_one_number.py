"""A field has one number for each row: a loss averaged over rows is refused, with the remedy."""

from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor

from captum_priors import differentiable
from captum_priors.attacks import TopKAttack
from captum_priors.stability import manipulability_bound
from tests.adapters.captum_table import set_up
from tests.laws.leaves import (
    CAPTUM,
    REFUSALS,
    Around,
    Leaf,
    every_gradient_row,
    leaves_and_ways_but,
    net,
    way_options,
)

REMEDY = 'reduction="none"'


class Reduced(Around):
    """A model with a loss on top that averages over whatever rows it is given."""

    def __init__(self, inner: Any, shape: tuple[int, ...] = ()) -> None:
        super().__init__(inner)
        self.shape = shape

    def forward(self, *args: Any) -> Tensor:
        return self.inner(*args)[:, 0].mean().reshape(self.shape)


shapes = pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one"])


@shapes
@leaves_and_ways_but("Stability-FGSM")  # Captum's FGSM runs the model before we do
def test_mean_loss_in_priors(leaf: Leaf, way: str, shape: tuple[int, ...]) -> None:
    model, x = Reduced(leaf.model(), shape), leaf.batch()
    call = leaf.call(x)
    if not leaf.labels:
        del call["target"]
    with pytest.raises(REFUSALS, match="logits" if leaf.name == "RRR" else REMEDY):
        leaf.make(model, **way_options(leaf, way))(x, **call)


@shapes
@every_gradient_row
def test_mean_loss_in_adapters(name: str, shape: tuple[int, ...]) -> None:
    row, model, x = set_up(name, CAPTUM[name].model)
    call = {**row.call(model), "target": None}
    with pytest.raises(REFUSALS, match=REMEDY):
        differentiable(row.make(Reduced(model, shape))).attribute(x, **call)


def test_mean_loss_in_attacks_and_bounds() -> None:
    model, x = Reduced(net()), torch.randn(4, 5)
    attack = TopKAttack(ca.InputXGradient(model), 2, radius=0.1, keep_prediction=False)
    with pytest.raises(REFUSALS, match=REMEDY):
        attack.perturb(x)
    with pytest.raises(REFUSALS, match=REMEDY):
        manipulability_bound(model, x, x + 0.1, form="path")


def test_mean_of_one_example_is_its_own() -> None:
    model, x = net(), torch.randn(1, 5)
    expected = differentiable(ca.Saliency(model)).attribute(x, target=0)
    found = differentiable(ca.Saliency(Reduced(model))).attribute(x)
    assert torch.equal(found, expected)
