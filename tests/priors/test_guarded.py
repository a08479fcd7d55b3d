"""Guarded: what is not finite stays out of the loss, or raises."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor

from captum_priors import AttributionPrior, Guarded
from captum_priors.penalties import l1, l2
from captum_priors.priors import Prior
from tests.cases import Case, mlp
from tests.priors.test_lazy import LOOKING, One

nan, inf = float("nan"), float("inf")


def spoiled(value: float) -> Any:
    """A penalty that is not finite, although the attributions are."""
    return lambda attributions: attributions.square().flatten(1).sum(1) * value


def make(penalty: Any = l2, **options: Any) -> tuple[Guarded, Case]:
    case = mlp()
    return Guarded(AttributionPrior(Saliency(case.model), penalty), **options), case


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_value_that_is_not_finite_raises(value: float) -> None:
    guarded, case = make(spoiled(value))
    text = rf"prior AttributionPrior.*: expected a finite value, found {value:g}\. Clip gradients"
    with pytest.raises(FloatingPointError, match=text):
        guarded(case.inputs, target=0)
    assert int(guarded.skips) == 0


def test_batch_that_is_not_finite_is_named() -> None:
    guarded, case = make()
    case.inputs[2, 1] = nan
    with pytest.raises(FloatingPointError, match=r"found nan\. The inputs are not finite: look at"):
        guarded(case.inputs, target=0)


@pytest.mark.parametrize("value", [nan, inf])
def test_skipped_value_leaves_the_rest_of_the_step(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    guarded, case = make(spoiled(value), on_nonfinite="skip")
    y = torch.tensor([0, 1, 2, 1, 0])

    def gradients(prior: Prior | None) -> list[Tensor]:
        case.model.zero_grad()
        loss = F.cross_entropy(case.model(case.inputs), y)
        (loss if prior is None else loss + 0.5 * prior(case.inputs, target=y)).backward()
        return [p.grad.clone() for p in case.model.parameters()]

    with caplog.at_level(logging.WARNING, "captum_priors"):
        found = gradients(guarded)
    assert all(map(torch.equal, found, gradients(None)))
    assert "Step without a prior, 1 so far. prior AttributionPrior" in caplog.text
    # A weight of zero would not have done it.
    assert not all(g.isfinite().all() for g in gradients(0 * guarded.prior)[:-1])
    resumed = copy.deepcopy(guarded)  # the count travels in the state
    resumed.skips.step = 0
    resumed.load_state_dict(guarded.state_dict())
    assert int(resumed.skips) == int(guarded.skips) == 1


def test_right_value_passes_unchanged() -> None:
    guarded, case = make(on_nonfinite="skip", max_value=1e6)
    value = guarded(case.inputs, target=0)
    assert torch.equal(value, guarded.prior(case.inputs, target=0))
    value.backward()
    assert case.model[0].weight.grad.abs().max() > 0
    assert int(guarded.skips) == 0
    assert float(Guarded(One(), "skip")("a prompt")) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_value_beyond_the_limit(sign: int) -> None:
    guarded, case = make(lambda a: sign * l2(a), max_value=1e-9)
    with pytest.raises(FloatingPointError, match=r"expected a finite value of at most 1e-09"):
        guarded(case.inputs, target=0)
    guarded.on_nonfinite = "skip"
    value = guarded(case.inputs, target=0)
    assert (value.item(), value.requires_grad) == (0, False)
    other = AttributionPrior(Saliency(case.model), l1)  # a sum goes on without a term that failed
    assert torch.equal((guarded + other)(case.inputs, target=0), other(case.inputs, target=0))


@pytest.mark.parametrize("how", LOOKING)
def test_looking_at_a_value_shows_it(how: str) -> None:
    guarded, case = make(spoiled(inf), on_nonfinite="skip")
    guarded.train(how != "eval")
    with LOOKING[how]():
        assert guarded(case.inputs, target=0).item() == inf
    assert int(guarded.skips) == 0
