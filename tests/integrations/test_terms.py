"""What trainers log of a prior has short names, and errors say where a trainer's call is made."""

from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, Saliency

from captum_priors import AttributionPrior, Lazy
from captum_priors.integrations._terms import evaluate, terms_of
from captum_priors.penalties import l1
from captum_priors.priors import AgreementPrior, EnergyPrior, Prior
from captum_priors.priors.combined import SumPrior
from tests.laws.leaves import net


def sparse(name: str | None = None) -> Prior:
    return AttributionPrior(Saliency(net()), l1, name=name)


def agreement() -> Prior:
    model = net()
    return AgreementPrior(Saliency(model), InputXGradient(model), options_a={"abs": False})


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: 0.1 * EnergyPrior(net()), "EnergyPrior"),
        (lambda: sparse("few inputs"), "few_inputs"),
        (lambda: sparse() + sparse(), "AttributionPrior AttributionPrior_2"),
        (lambda: sparse("few") + 2 * sparse("few") + sparse(), "few few_2 AttributionPrior"),
        (lambda: Lazy(sparse(), 2), "AttributionPrior"),
        (lambda: Lazy(sparse("few"), 2, name="seldom"), "seldom few"),
        (lambda: SumPrior([sparse(), agreement()], name="both"), None),
        (agreement, "AgreementPrior"),
    ],
)
def test_keys_are_short(make: Any, keys: str | None) -> None:
    prior = make()
    expected = (keys or "both AttributionPrior AgreementPrior").split()
    call: dict[str, Any] = {"inputs": torch.randn(4, 5), "target": 0}
    if prior.takes("annotation"):
        call["annotation"] = torch.ones(4, 5)
    _, values = evaluate(prior, call)
    assert [*terms_of(prior)] == [f"prior/{key}" for key in expected]
    assert values.keys() == {"prior", *terms_of(prior)}


def test_a_name_set_later_counts() -> None:
    prior = 2 * sparse()
    prior.prior.name = "few"
    assert repr(prior) == "2 * AttributionPrior(Saliency, l1, name='few')"
    assert [*terms_of(prior)] == ["prior/few"]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"inputs": torch.ones(4, 5), "target": 0}, "now inputs, target: change it there"),
        ({"inputs": "x", "target": 0}, "returns for a batch"),
        ({"inputs": torch.ones(4, 5), "target": 9, "annotation": torch.ones(4, 5)}, "returns for"),
        ({"inputs": torch.ones(4, 5), "mask": torch.ones(4, 5)}, "now inputs, mask"),
    ],
)
def test_errors_name_what_the_trainer_calls_with(call: dict[str, Any], told: str) -> None:
    prior = EnergyPrior(net())
    with pytest.raises((TypeError, ValueError)) as found:
        evaluate(prior, call, trainer=object())
    assert told in str(found.value)
    assert "object calls the prior with what `prior_arguments`" in str(found.value)
    with pytest.raises((TypeError, ValueError)) as plain:
        evaluate(prior, call)
    assert "prior_arguments" not in str(plain.value)


def test_other_errors_are_left_alone() -> None:
    def refuse(maps: torch.Tensor) -> Any:
        raise ValueError("`weights`: of the penalty's own")

    prior = AttributionPrior(Saliency(net()), refuse)
    with pytest.raises(ValueError, match=r"own$"):
        evaluate(prior, {"inputs": torch.ones(4, 5), "target": 0}, trainer=object())
