"""What two processes are not needed for: AcrossProcesses alone, and what is refused."""

import pytest
import torch
from captum.attr import Saliency
from torch import nn

from captum_priors import AttributionPrior, Lazy, NotDifferentiableError
from captum_priors.integrations import AcrossProcesses, check_synchronised
from captum_priors.penalties import gini, l1, outside


def prior_of(penalty: object) -> AttributionPrior:
    torch.manual_seed(0)
    return AttributionPrior(Saliency(nn.Linear(4, 3)), penalty)


def test_alone_it_is_the_prior() -> None:
    x, annotation = torch.randn(5, 4), torch.rand(5, 4)
    for penalty, named in ((l1, {}), (gini, {}), (outside, {"annotation": annotation})):
        prior = prior_of(penalty)
        for group in (None, "self"):
            shared = AcrossProcesses(prior, group)
            value = shared(x, target=1, **named)
            assert torch.equal(value, prior(x, target=1, **named))
            assert value.item() != 0
            assert shared.share(x) == 1
    check_synchronised(nn.Linear(4, 3))


def test_composes_and_keeps_the_state() -> None:
    inner = Lazy(prior_of(l1), every=2) + prior_of(outside)
    prior = 2 * AcrossProcesses(inner)
    assert repr(prior) == (
        "2 * AcrossProcesses(Lazy(AttributionPrior(Saliency, l1), every=2) + "
        "AttributionPrior(Saliency, outside))"
    )
    assert prior.takes("annotation")
    assert not prior.takes("baselines")
    assert prior.state_dict().keys() == {f"prior.prior.{name}" for name in inner.state_dict()}


def test_refused() -> None:
    with pytest.raises(TypeError, match="expected a prior, found function"):
        AcrossProcesses(l1)
    with pytest.raises(TypeError, match="`inputs`"):
        AcrossProcesses(prior_of(l1)).share([1.0])
    wrapped = AttributionPrior(Saliency(nn.DataParallel(nn.Linear(4, 3))), l1)
    with pytest.raises(NotDifferentiableError, match="the DataParallel around it"):
        wrapped(torch.randn(5, 4), target=1)
