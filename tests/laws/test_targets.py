"""A target is one of the outputs, or refused, whether a prior selects by it or not."""

from typing import Any

import pytest
import torch
from torch import nn

from captum_priors import Subsample
from captum_priors._errors import TargetError
from captum_priors.outputs import weighted
from captum_priors.priors import RightForTheRightReasons
from tests.asserts import leaves_no_trace
from tests.laws.leaves import CLASSES, LEAVES, Leaf, every_leaf, leaves_but, net

WRONG: dict[str, Any] = {
    "one too many": torch.zeros(5, dtype=torch.long),
    "numbers": torch.zeros(4),
    "a word": "cat",
    "none of the classes": torch.full((4,), CLASSES),
    "none of the classes, as an int": CLASSES,
    "an index of another dimension": (0, 0),
    "a label to ignore": torch.tensor([0, 1, 2, -100]),
    "truth values": torch.tensor([True, False, True, False]),
    "a list of numbers": [0.0, 1.0, 2.0, 0.0],
}
MULTI_HOT = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]])
ONE_EACH = torch.eye(CLASSES)[[0, 1, 2, 0]]  # of a batch in which each example happens to have one


@every_leaf
def test_a_wrong_target_is_refused(leaf: Leaf) -> None:
    model, x = leaf.model(), leaf.batch()
    prior, call = leaf.make(model), leaf.call(x)
    with leaves_no_trace(model):
        for what, wrong in WRONG.items():
            with pytest.raises((TypeError, ValueError)) as found:
                prior(x, **{**call, "target": wrong})
            assert str(found.value).startswith("`target`: expected"), what
            if hasattr(prior, "perturb"):
                with pytest.raises((TypeError, ValueError), match="`target`"):
                    prior.perturb(x, wrong)


@every_leaf
def test_rows_of_labels_are_told_what_is_right(leaf: Leaf) -> None:
    x, prior = leaf.batch(), leaf.make(leaf.model())
    call = leaf.call(x)
    for labels, asked in ((MULTI_HOT, prior), (ONE_EACH, Subsample(prior, 0.5))):
        with pytest.raises(TargetError) as found:
            asked(x, **{**call, "target": labels})
        remedy = str(found.value)
        assert ("target.argmax(1)" in remedy) == (labels is ONE_EACH)
        assert ("weighted(labels)" in remedy) != leaf.labels  # which take class labels alone
        assert ("model(x)[:, k]" in remedy) == leaf.labels


@leaves_but("Stability-FGSM")  # Captum's attack knows indices alone
def test_what_they_are_told_works(leaf: Leaf) -> None:
    x, k = leaf.batch(), 0
    model = leaf.model()
    call = leaf.call(x)
    if leaf.labels:
        prior = leaf.make(lambda x: model(x)[:, k])
        call["target"] = MULTI_HOT[:, k].long()
    else:
        prior, call["target"] = leaf.make(model), weighted(MULTI_HOT)
    prior(x, **call).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


BY_CLASS = ("Sensitivity", "Jacobian", "SSR")
OF_CLASSES = [leaf for leaf in LEAVES if leaf.labels or leaf.name in BY_CLASS]


@pytest.mark.parametrize("flat", [[], [nn.Flatten(0)]], ids=["(n, 1)", "(n,)"])
@pytest.mark.parametrize("leaf", OF_CLASSES, ids=lambda leaf: leaf.name)
def test_both_labels_of_a_binary_classifier_are_classes(leaf: Leaf, flat: Any) -> None:
    prior, x = leaf.make(nn.Sequential(*net(1), *flat)), leaf.batch()
    assert prior(x, **{**leaf.call(x), "target": torch.tensor([0, 1, 1, 0])}).isfinite()
    with pytest.raises(ValueError, match="`target`"):
        prior(x, **{**leaf.call(x), "target": torch.tensor([0, 1, 2, 0])})


def test_the_target_changes_nothing_where_all_classes_take_part() -> None:
    prior, x = RightForTheRightReasons(net()), torch.randn(4, 5)
    values = [
        prior(x, target=target, annotation=torch.zeros(4, 5))
        for target in (None, 2, [0, 1, 2, 0], torch.arange(4) % CLASSES, weighted(MULTI_HOT))
    ]
    assert all(torch.equal(value, values[0]) for value in values)
