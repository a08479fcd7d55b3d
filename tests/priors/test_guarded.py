"""Guarded: what is not finite stays out of the loss, or raises."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, Guarded
from captum_priors.penalties import l1, l2
from captum_priors.priors import Prior
from tests.cases import Case, mlp

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
    assert int(guarded.skips) == 1
    assert "Step without a prior, 1 so far. prior AttributionPrior" in caplog.text
    # A weight of zero would not have done it.
    assert not all(g.isfinite().all() for g in gradients(0 * guarded.prior)[:-1])


def test_right_value_passes_unchanged() -> None:
    guarded, case = make(on_nonfinite="skip", max_value=1e6)
    value = guarded(case.inputs, target=0)
    assert torch.equal(value, guarded.prior(case.inputs, target=0))
    value.backward()
    assert case.model[0].weight.grad.abs().max() > 0
    assert int(guarded.skips) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_value_beyond_the_limit(sign: int) -> None:
    guarded, case = make(lambda a: sign * l2(a), max_value=1e-9)
    with pytest.raises(FloatingPointError, match=r"expected a finite value of at most 1e-09"):
        guarded(case.inputs, target=0)
    guarded.on_nonfinite = "skip"
    value = guarded(case.inputs, target=0)
    assert (value.item(), value.requires_grad) == (0, False)


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference"])
def test_looking_at_a_value_shows_it(how: str) -> None:
    guarded, case = make(spoiled(inf), on_nonfinite="skip")
    block = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    guarded.train(how != "eval")
    with block[how]():
        assert guarded(case.inputs, target=0).item() == inf
    assert int(guarded.skips) == 0


def test_terms_are_guarded_for_themselves() -> None:
    """A sum goes on without the term that failed."""
    guarded, case = make(spoiled(nan), on_nonfinite="skip")
    other = AttributionPrior(Saliency(case.model), l1)
    value = (guarded + other)(case.inputs, target=0)
    assert torch.equal(value, other(case.inputs, target=0))


def test_count_travels_in_the_state_dict() -> None:
    guarded, case = make(spoiled(nan), on_nonfinite="skip")
    guarded(case.inputs, target=0)
    resumed = copy.deepcopy(guarded)
    resumed.skips.step = 0
    resumed.load_state_dict(guarded.state_dict())
    assert int(resumed.skips) == 1


def test_formula_and_keywords_are_those_of_the_prior() -> None:
    guarded = make(on_nonfinite="skip", max_value=5)[0]
    text = "2 * Guarded(AttributionPrior(Saliency, l2), on_nonfinite='skip', max_value=5.0)"
    assert repr(2 * guarded) == text
    assert not guarded.takes("baselines")
    assert Guarded(AttributionPrior(ExpectedGradients(nn.ReLU()), l1)).takes("baselines")


def test_bad_arguments_are_refused() -> None:
    prior = make()[0].prior
    with pytest.raises(ValueError, match=r"`on_nonfinite`: expected one of 'raise', 'skip', found"):
        Guarded(prior, "warn")
    for limit in (0, -1, nan, inf, True, "1"):
        with pytest.raises(ValueError, match=r"`max_value`: expected a positive finite number"):
            Guarded(prior, max_value=limit)
    with pytest.raises(TypeError, match=r"`prior`: expected a prior, found function"):
        Guarded(l1)
