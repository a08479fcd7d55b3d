"""What belongs to an example is said: one entry for each, or ``shared``."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor

from captum_priors import AttributionPrior, ExpectedGradients, Lazy, StabilityPrior, Subsample
from captum_priors.penalties import alignment, background, energy_outside, outside, rationale
from captum_priors.priors import EnergyPrior, Prior, RightForTheRightReasons
from tests.laws.leaves import background as reference_rows
from tests.laws.leaves import net


class Seen:
    """A penalty, and a distance, that keeps the weights that reach it."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def penalty(self, a: Tensor, *, weights: Tensor) -> Tensor:
        self.weights.append(weights.detach().clone())
        return (a * weights).abs().flatten(1).sum(1)

    def distance(self, a: Tensor, b: Tensor, *, weights: Tensor) -> Tensor:
        return self.penalty(a - b, weights=weights)


def attribution(seen: Seen) -> Prior:
    return AttributionPrior(ExpectedGradients(net()), seen.penalty, baselines=reference_rows())


def stability(seen: Seen) -> Prior:
    return StabilityPrior(ca.Saliency(net()), seen.distance, lambda x: x + 0.1)


PRIORS: dict[str, Callable[[Seen], Prior]] = {
    "attribution": attribution,
    "stability": stability,
    "sum": lambda seen: attribution(seen) + 0.5 * stability(Seen()),
    "subsample": lambda seen: Subsample(attribution(seen), 0.5),
    "nested": lambda seen: Subsample(0.5 * Subsample(stability(seen), 0.5), 0.5),
    "lazy": lambda seen: Lazy(Subsample(attribution(seen), 0.5), 1),
}
every_prior = pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS.keys())
every_batch = pytest.mark.parametrize("batch", [1, 2, 5, 8])


@every_prior
@every_batch
def test_shared_ones_arrive_whole(make: Any, batch: int) -> None:
    """Whatever they have in common with the batch: the number of features, of rows, or nothing."""
    from captum_priors import shared

    for weights in (torch.rand(5), torch.rand(1, 5), torch.rand(())):
        seen = Seen()
        make(seen)(torch.randn(batch, 5), target=0, weights=shared(weights))
        assert all(torch.equal(found, weights) for found in seen.weights)
        assert seen.weights


@every_prior
@pytest.mark.parametrize("weights", [torch.ones(5), torch.ones(1, 5), torch.ones(4, 5)])
def test_one_entry_for_each_example_is_asked_for(make: Any, weights: Tensor) -> None:
    seen = Seen()
    with pytest.raises((TypeError, ValueError), match=r"captum_priors\.shared"):
        make(seen)(torch.randn(8, 5), target=0, weights=weights.to(torch.get_default_dtype()))
    assert not seen.weights


@every_batch
def test_others_go_with_their_examples(batch: int) -> None:
    """An annotation that is the attribution of its example stays beside it."""
    lin, seen = torch.nn.Linear(5, 1, bias=False), Seen()
    x = torch.randn(batch, 5)

    def penalty(a: Tensor, *, weights: Tensor) -> Tensor:
        seen.weights.append(weights)
        return (a - weights).abs().sum(1)

    alone = AttributionPrior(ca.InputXGradient(lin), penalty)
    prior = Lazy(Subsample(0.5 * Subsample(alone, 0.5) + alone, 0.6), 1)
    assert prior(x, weights=(x * lin.weight).detach()).item() < 1e-12
    assert len(seen.weights[0]) == max(1, round(0.5 * max(1, round(0.6 * batch))))


PENALTIES = {
    "outside": outside,
    "energy_outside": energy_outside,
    "background": background,
    "rationale": rationale,
    "alignment": alignment,
}
MASKS = {
    "features": (torch.tensor([1.0, 1.0, 0.0, 1.0]), (4, 4)),
    "maps": (torch.eye(4), (4, 1, 4, 4)),
}
every_mask = pytest.mark.parametrize("mask", MASKS)


@every_mask
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: Subsample(p, 0.5)], ids=["", "subsample"])
def test_masks_as_large_as_the_batch(mask: str, penalty: Any, wrap: Any) -> None:
    """A mask of features, or (H, W), says where and not for whom, also where H is the batch."""
    m, shape = MASKS[mask]
    x = torch.rand(shape)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 1))
    prior = wrap(AttributionPrior(ca.InputXGradient(model), penalty))
    with pytest.raises((TypeError, ValueError), match=r"`annotation`"):
        prior(x, annotation=m.to(x.dtype))


@every_mask
@pytest.mark.parametrize("named", [EnergyPrior, RightForTheRightReasons])
def test_shared_masks_are_those_repeated(named: Any, mask: str) -> None:
    from captum_priors import shared

    m, shape = MASKS[mask]
    x, m = torch.rand(shape), m.reshape(shape[1:])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 3))
    for rows in (4, 3, 1):
        y, m = torch.zeros(rows, dtype=torch.long), m.to(x.dtype)
        found = named(model)(x[:rows], target=y, annotation=shared(m))
        each = m.expand(x[:rows].shape)
        torch.testing.assert_close(found, named(model)(x[:rows], target=y, annotation=each))
