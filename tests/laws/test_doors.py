"""What one method refuses, every sibling refuses: bad labels, NaN annotations, lost graphs."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor

from captum_priors import AttributionPrior, NotDifferentiableError, StabilityPrior
from captum_priors.distances import mse
from captum_priors.penalties import (
    alignment,
    background,
    energy_outside,
    group_sparsity,
    l2,
    outside,
    rationale,
)
from tests.laws.leaves import FEATURES, REFUSALS, Leaf, net, noise, those

BAD_LABELS = {
    "above": torch.tensor([0, 1, 2, 3]),
    "ignored": torch.tensor([0, 1, 2, -100]),
    "negative": torch.tensor([0, 1, 2, -1]),
    "float": torch.tensor([0.0, 1.0, 2.0, 0.0]),
    "list": [0.0, 1.0, 2.0, 0.0],
    "bool": torch.tensor([True, False, True, False]),
    "number": 3,
}


@those(labels=True)
@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_labels_that_are_no_classes(leaf: Leaf, labels: Any) -> None:
    prior, x = leaf.make(leaf.model()), leaf.batch()
    with pytest.raises(REFUSALS, match="`target`"):
        prior(x, **{**leaf.call(x), "target": labels})
    if hasattr(prior, "perturb"):
        with pytest.raises(REFUSALS, match="`target`"):
            prior.perturb(x, labels)


@those(labels=True)
def test_labels_of_a_single_logit(leaf: Leaf) -> None:
    prior, x = leaf.make(net(1)), leaf.batch()
    prior(x, **{**leaf.call(x), "target": torch.tensor([0, 1, 1, 0])})
    with pytest.raises(REFUSALS, match="`target`"):
        prior(x, **{**leaf.call(x), "target": torch.tensor([0, 1, 2, 0])})


BAD_ANNOTATIONS = {"nan": float("nan"), "inf": float("inf")}
bad_annotations = pytest.mark.parametrize(
    "bad", BAD_ANNOTATIONS.values(), ids=BAD_ANNOTATIONS.keys()
)
ANNOTATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "outside": lambda a, m: outside(a, annotation=m),
    "energy_outside": lambda a, m: energy_outside(a, annotation=m),
    "background": lambda a, m: background(a, annotation=m),
    "rationale": lambda a, m: rationale(a, annotation=m),
    "alignment": lambda a, m: alignment(a, annotation=m),
    "alignment-mse": lambda a, m: alignment(a, annotation=m, measure="mse"),
    "group_sparsity": lambda a, m: group_sparsity(a, groups=m[0]),
}


@bad_annotations
@pytest.mark.parametrize("penalty", ANNOTATED.values(), ids=ANNOTATED.keys())
def test_annotations_of_penalties(penalty: Any, bad: float) -> None:
    mask, a = torch.ones(4, FEATURES), torch.randn(4, FEATURES)
    penalty(a, mask)
    for where in ((0, 0), (0, 4)):
        broken = mask.clone()
        broken[where] = bad
        with pytest.raises(REFUSALS, match=r"`(annotation|groups)`"):
            penalty(a, broken)
        with pytest.raises(REFUSALS, match=r"`(annotation|groups)`"):
            penalty((a, a), (mask, broken))


@bad_annotations
@those(annotated=True)
def test_annotations_of_priors(leaf: Leaf, bad: float) -> None:
    prior, x = leaf.make(leaf.model()), leaf.batch()
    call = leaf.call(x)
    call["annotation"].flatten()[3] = bad
    with pytest.raises(REFUSALS, match="`annotation`"):
        prior(x, **call)


def test_scores_that_detach() -> None:
    explainer, x = ca.Saliency(net()), torch.randn(4, FEATURES)
    for prior in (
        AttributionPrior(explainer, lambda a: l2(a).detach()),
        StabilityPrior(explainer, lambda a, b: mse(a, b).detach(), noise),
    ):
        with pytest.raises(NotDifferentiableError, match="a graph to the attributions"):
            prior(x, target=0)
