"""AcrossProcesses in one process, and what it refuses; ``two_processes.py`` has the rest."""

from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import nn

from captum_priors import AttributionPrior, Lazy
from captum_priors.integrations import AcrossProcesses
from captum_priors.penalties import gini, l1, outside


def prior_of(penalty: Any) -> AttributionPrior:
    torch.manual_seed(0)
    return AttributionPrior(Saliency(nn.Linear(4, 3)), penalty)


def test_alone_it_is_the_prior() -> None:
    x = torch.randn(5, 4)
    for penalty in (l1, gini):
        prior = prior_of(penalty)
        shared = AcrossProcesses(prior)
        assert torch.equal(shared(x, target=1), prior(x, target=1))
        assert shared.share(x) == 1


def test_composes_and_prints_its_formula() -> None:
    prior = 2 * AcrossProcesses(Lazy(prior_of(l1), every=2) + prior_of(gini))
    assert repr(prior) == (
        "2 * AcrossProcesses(Lazy(AttributionPrior(Saliency, l1), every=2) + "
        "AttributionPrior(Saliency, gini))"
    )


def test_annotations_and_state_are_those_of_the_prior() -> None:
    prior = prior_of(outside)
    shared = AcrossProcesses(prior)
    x = torch.randn(5, 4)
    annotation = torch.ones(5, 4)
    value = shared(x, target=0, annotation=annotation)
    assert float(value.detach()) == 0
    assert not shared.takes("baselines")
    assert shared.state_dict().keys() == {f"prior.{name}" for name in prior.state_dict()}


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="expected a prior, found function"):
        AcrossProcesses(l1)
    with pytest.raises(ValueError, match="expected a process group, None or 'self', found 'all'"):
        AcrossProcesses(prior_of(l1), "all")
    with pytest.raises(TypeError, match="`inputs`"):
        AcrossProcesses(prior_of(l1)).share([1.0])
