"""The agreement prior against correlations of stock attributions, and what each side is given."""

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import ExpectedGradients, Subsample
from captum_priors.priors import AgreementPrior
from tests import oracles
from tests.cases import tuple_inputs

# Sums in another order.
ROUNDING = 1e-10


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def agreement(a: Tensor, b: Tensor, mix: float, strength: float) -> float:
    a, b = (side.detach().numpy() for side in (a, b))
    ranks, values = oracles.soft_spearman(a, b, strength), oracles.pearson(a, b)
    return float(np.mean(mix * ranks / 2 + (1 - mix) * values / 2))


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_equals_the_correlations_of_captums_attributions(mix: float) -> None:
    model, x, y = network(), torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    a, b = Saliency(model), IntegratedGradients(model)
    baselines, given = torch.randn(1, 6), {"options_a": {"abs": False}, "options_b": {"n_steps": 7}}
    prior = AgreementPrior(a, b, mix=mix, strength=4, **given)
    left = a.attribute(x, target=y, abs=False)
    expected = agreement(left, b.attribute(x, baselines, target=y, n_steps=7), mix, 4)
    assert prior(x, baselines, y).item() == pytest.approx(expected, rel=ROUNDING)
    assert 0 <= expected <= 1


def test_sums_over_several_inputs() -> None:
    case = tuple_inputs()
    a, b = InputXGradient(case.model), IntegratedGradients(case.model)
    prior = AgreementPrior(a, b, options_b={"n_steps": 5})
    left = a.attribute(case.inputs, **case.call)
    right = b.attribute(case.inputs, **case.call, n_steps=5)
    expected = sum(agreement(p, q, 0.5, 10) for p, q in zip(left, right, strict=True))
    assert prior(case.inputs, **case.call).item() == pytest.approx(expected, rel=ROUNDING)


class Asked:
    """An explainer that keeps what it is given and what it draws."""

    def __init__(self, model: nn.Module) -> None:
        self.forward_func = model
        self.given: list[Any] = []
        self.drawn: list[Tensor] = []

    def attribute(self, inputs: Tensor, baselines: Any = None, target: Any = None) -> Tensor:
        self.given.append(baselines)
        self.drawn.append(torch.randn(4))
        return inputs * self.forward_func(inputs)[:, target : target + 1]


def test_baselines_are_for_those_that_take_them_and_have_none() -> None:
    model, x, background = network(), torch.randn(4, 6), torch.randn(9, 6)
    a, b = Asked(model), Asked(model)
    AgreementPrior(a, b)(x, background, 0)
    AgreementPrior(a, b, options_b={"baselines": 0})(x, background, 0)
    AgreementPrior(InputXGradient(model), b)(x, background, 0)
    expected = [(a, [background, background]), (b, [background, 0, background])]
    for asked, wanted in expected:
        assert list(map(id, asked.given)) == list(map(id, wanted))
    given = {"options_a": {"baselines": 0}, "options_b": {"baselines": 1}}
    for prior in (AgreementPrior(a, b, **given), AgreementPrior(Saliency(model), Saliency(model))):
        assert not prior.takes("baselines")
        with pytest.raises(TypeError, match="'baselines'"):
            prior(x, background, 0)
    needed = AgreementPrior(ExpectedGradients(model), Saliency(model))
    with pytest.raises(TypeError, match="reference rows"):
        needed(x, target=0)


def test_each_explainer_draws_from_a_child_of_the_priors_stream() -> None:
    model, x = network(), torch.randn(4, 6)
    a, b = Asked(model), Asked(model)
    prior = AgreementPrior(a, b)
    state = prior.state_dict()
    for _ in range(2):
        prior(x, target=0)
    prior.load_state_dict(state)
    prior(x, target=0)
    first, second, again = zip(a.drawn, b.drawn, strict=True)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(torch.stack(again), torch.stack(first))


def test_the_users_generator_is_part_of_the_state() -> None:
    model, x = network(), torch.randn(4, 6)
    generator = torch.Generator().manual_seed(1)
    given = {"generator": generator, "n_samples": 2, "baselines": torch.randn(7, 6)}
    prior = AgreementPrior(ExpectedGradients(model), Saliency(model), options_a=given)
    before, start = prior.state_dict(), generator.get_state()
    first = prior(x, target=0).item()
    assert not torch.equal(generator.get_state(), start)
    prior.load_state_dict(before)
    assert prior(x, target=0).item() == first


def test_subsampling_keeps_a_distribution_of_references_whole() -> None:
    model, x, seen = network(), torch.randn(4, 6), []

    class References(ExpectedGradients):
        def attribute(self, inputs: Tensor, baselines: Tensor, **options: Any) -> Any:
            seen.append(len(baselines))
            return super().attribute(inputs, baselines, **options)

    prior = AgreementPrior(References(model), InputXGradient(model))
    Subsample(prior, 0.5)(x, baselines=torch.randn(4, 6), target=0)
    assert seen == [4]
