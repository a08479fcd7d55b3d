"""What one sibling refuses, all refuse: wrong targets, losses that are averaged, token ids."""

from typing import Any

import captum.attr as ca
import pytest
import shap
import torch
from torch import Tensor, nn

from captum_priors import (
    ExpectedGradients,
    NotDifferentiableError,
    StabilityPrior,
    Subsample,
    differentiable,
)
from captum_priors._errors import TargetError
from captum_priors.attacks import RandomAttack, TopKAttack
from captum_priors.distances import mse
from captum_priors.outputs import weighted
from captum_priors.priors import RightForTheRightReasons
from captum_priors.stability import manipulability_bound
from tests.adapters.captum_table import set_up
from tests.asserts import leaves_no_trace
from tests.laws.leaves import (
    CAPTUM,
    CLASSES,
    FEATURES,
    GRADIENT_ROWS,
    LEAVES,
    LEAVES_AND_WAYS,
    REFUSALS,
    Around,
    Leaf,
    every_gradient_row,
    every_leaf,
    leaves_and_ways_but,
    leaves_but,
    net,
    way_options,
)

# ---- A target is one of the outputs, whether a prior selects by it or not --------------------

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


# ---- A field has one number for each row: a loss averaged over rows is refused ----------------

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


# ---- Token ids have no gradient: everyone who is asked for one says where to go instead --------


class Tokens(nn.Module):
    """A classifier of token ids with what the table of adapters asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.act = nn.Embedding(9, 4), nn.ReLU()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.second, self.layer = nn.Linear(6, 6), self.act

    neuron, window, shape = (2,), (2,), (FEATURES,)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.act(self.first(self.embedding(ids).mean(1)))))

    def __getitem__(self, i: int) -> nn.Module:
        return self.first


# Rules of the user's own are refused before the inputs are looked at, where rules are by function.
OTHERS = ("Layer", "Internal", "GuidedGradCam", "LRP-rules")
INPUTS = [name for name in GRADIENT_ROWS if not name.startswith(OTHERS)]


@pytest.mark.parametrize("name", INPUTS)
def test_token_ids_in_adapters(name: str) -> None:
    row, model = CAPTUM[name], Tokens()
    call, ids = row.call(model), torch.randint(9, (3, FEATURES))
    if row.baselines:
        call["baselines"] = torch.randint(9, (5, FEATURES))
    explainer = differentiable(row.make(model))
    with pytest.raises(REFUSALS, match="LayerExpectedGradients"):
        explainer.attribute(ids, **call)


@pytest.mark.parametrize("name", ["GradientExplainer", "DeepExplainer"])
def test_token_ids_in_explainers_of_shap(name: str) -> None:
    ids, model = torch.randint(9, (3, FEATURES)), Tokens()
    with pytest.raises(REFUSALS, match="LayerExpectedGradients"):
        differentiable(getattr(shap, name)(model, ids)).attribute(ids, target=0)


# A layer may well be an embedding, and a user's perturbation comes before the explainer.
@leaves_but(
    *("LayerEG", "LayerEG-two-runs", "HINT", "RRR-CAM", "Concept", "Concept-maps-random"),
    *("Stability", "Stability-FGSM"),
    # Which replace ids by others.
    *("Comprehensiveness-probability", "Comprehensiveness-log"),
    *("Sufficiency-probability", "Sufficiency-log"),
)
def test_token_ids_in_priors(leaf: Leaf) -> None:
    ids = torch.randint(9, (4, FEATURES))
    with pytest.raises(REFUSALS, match="LayerExpectedGradients"):
        leaf.make(Tokens())(ids, **leaf.call(ids))


def test_token_ids_in_attacks_and_bounds() -> None:
    ids, model = torch.randint(9, (4, FEATURES)), Tokens()
    eg = ExpectedGradients(model)
    for ask in (
        lambda: eg.attribute(ids, ids, target=0),
        lambda: TopKAttack(ca.Saliency(model), 2, radius=0.1).perturb(ids, 0),
        lambda: RandomAttack(model, radius=0.1).perturb(ids),
        lambda: manipulability_bound(model, ids, ids, 0, form="path"),
        lambda: StabilityPrior(ca.Saliency(model), mse, lambda x: x)(ids, target=0),
    ):
        with pytest.raises(REFUSALS, match="LayerExpectedGradients"):
            ask()


# ---- Differences are refused where another function would be differentiated -----------------


class Beside(nn.Module):
    """A model, and another branch beside it that differences may not be taken of."""

    def __init__(self, main: Any, branch: Any, together: Any) -> None:
        super().__init__()
        self.net, self.branch, self.together = main, branch, together

    def __getitem__(self, at: int) -> Any:
        return self.net[at]

    def forward(self, x: Tensor) -> Tensor:
        return self.together(self.net, self.branch, x)


BESIDE: dict[str, Any] = {
    "detached": lambda net, branch, x: net(x) + branch(x.detach()),
    "centred": lambda net, branch, x: net(x) + branch(x - x.mean(0)),
    "softmax over the batch": lambda net, branch, x: net(x) * branch(x).softmax(0),
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize(
    "leaf",
    [leaf for leaf, way in LEAVES_AND_WAYS if way == "finite_difference"],
    ids=lambda leaf: leaf.name,
)
def test_every_prior_refuses_differences_of(kind: str, leaf: Any) -> None:
    if kind == "detached" and leaf.name.startswith(("LayerEG", "Concept")):
        return  # what is explained is a layer, on which that branch does not depend
    model, x = Beside(leaf.model(), leaf.model(), BESIDE[kind]), leaf.batch(8)
    prior = leaf.make(model, **way_options(leaf, "finite_difference"))
    with pytest.raises(NotDifferentiableError, match=r"expected.*double_backprop"):
        prior(x, **leaf.call(x)).backward()
