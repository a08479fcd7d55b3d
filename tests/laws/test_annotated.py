"""Annotations: one entry for each example, or ``shared``; who has none is as if not there."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Lazy,
    StabilityPrior,
    Subsample,
    shared,
)
from captum_priors.attacks import DistanceAttack
from captum_priors.distances import mse
from captum_priors.penalties import (
    alignment,
    background,
    energy_outside,
    group_sparsity,
    outside,
    rationale,
)
from captum_priors.priors import (
    EnergyPrior,
    PixelPrior,
    Prior,
    RightForTheRightReasons,
    RobustRightReasons,
)
from captum_priors.priors.batch_norm import part_of
from tests.asserts import assert_unbiased, gradients_of
from tests.cases import tuple_inputs
from tests.laws.leaves import (
    FEATURES,
    LEAVES_AND_WAYS,
    REFUSALS,
    Leaf,
    conv,
    net,
    those,
    way_options,
)
from tests.laws.leaves import background as reference_rows

KNOWN = torch.tensor([True, False, False, True])
PENALTIES = {
    "outside": outside,
    "energy_outside": energy_outside,
    "background": background,
    "rationale": rationale,
    "alignment": alignment,
}
every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())

# ---- For whom -------------------------------------------------------------------------------


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


@every_penalty
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: Subsample(p, 0.5)], ids=["", "subsample"])
def test_masks_as_large_as_the_batch(penalty: Any, wrap: Any) -> None:
    """A mask of features says where and not for whom, also where there are as many as examples."""
    model, mask = nn.Linear(4, 1), torch.tensor([1.0, 1.0, 0.0, 1.0])
    prior = wrap(AttributionPrior(ca.InputXGradient(model), penalty))
    with pytest.raises((TypeError, ValueError), match="`annotation`"):
        prior(torch.rand(4, 4), annotation=mask)


BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf")])


@BAD
@pytest.mark.parametrize("name", [*PENALTIES, "group_sparsity"])
def test_annotations_of_penalties(name: str, bad: float) -> None:
    mask, a = torch.ones(4, FEATURES), torch.randn(4, FEATURES)

    def value(a: Any, *masks: Tensor) -> Tensor:
        if name == "group_sparsity":
            masks = tuple(m[0] for m in masks)
            return group_sparsity(a, groups=masks if isinstance(a, tuple) else masks[0])
        return PENALTIES[name](a, annotation=masks if isinstance(a, tuple) else masks[0])

    value(a, mask)
    for where in ((0, 0), (0, 4)):
        broken = mask.clone()
        broken[where] = bad
        for wrong in ((a, broken), ((a, a), mask, broken)):
            with pytest.raises(REFUSALS, match=r"`(annotation|groups)`"):
                value(*wrong)


@BAD
@those(annotated=True)
def test_annotations_of_priors(leaf: Leaf, bad: float) -> None:
    prior, x = leaf.make(leaf.model()), leaf.batch()
    call = leaf.call(x)
    call["annotation"].flatten()[3] = bad
    with pytest.raises(REFUSALS, match="`annotation`"):
        prior(x, **call)


# ---- Annotations for some examples ----------------------------------------------------------


def explained(penalty: Any) -> Callable[..., Any]:
    return lambda model, **more: AttributionPrior(InputXGradient(model), penalty, **more)


# All that take an annotation: of the table of leaves, and each penalty in an attribution prior.
CASES = [
    *(
        pytest.param(leaf, way, id=f"{leaf.name}-{way}")
        for leaf, way in LEAVES_AND_WAYS
        if leaf.annotated
    ),
    *(
        pytest.param(
            Leaf(name, explained(penalty), AttributionPrior, draws=False, annotated=True),
            "double_backprop",
            id=name,
        )
        for name, penalty in PENALTIES.items()
    ),
]


every_annotated = pytest.mark.parametrize(("leaf", "way"), CASES)


def with_gradient(value: Tensor, model: nn.Module) -> list[Tensor]:
    return [value.detach(), *gradients_of(value, [*model.parameters()])]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_annotated
@pytest.mark.parametrize("said", ["annotated", "nan", "both"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_annotated_rows_are_as_if_alone(leaf: Leaf, way: str, said: str, reduction: str) -> None:
    """Value and gradient, whatever the masks, inputs and neighbours of the others hold."""
    model, x = leaf.model(), leaf.batch()
    missing = "refuse" if said == "annotated" else "nan"
    options = {**way_options(leaf, way), "reduction": reduction, "missing": missing}
    prior = leaf.make(model, **options).eval()  # draws as before
    call, alone = leaf.call(x), leaf.call(x, KNOWN)
    expected = with_gradient(prior(x[KNOWN], **alone), model)
    assert expected[0] > 0
    if reduction == "mean":  # over all examples
        expected = [t * KNOWN.double().mean() for t in expected]
    named = KNOWN if said == "annotated" else torch.tensor([True, False, True, True])
    call["annotation"][1:3] = 7 if said == "annotated" else torch.nan
    if said != "nan":
        call["annotated"] = named
    close(with_gradient(prior(x, **call), model), expected)
    x = x.clone()
    x[1:3] = torch.inf
    close(with_gradient(prior(x, **call), model), expected)


@every_annotated
def test_all_annotated_and_none(leaf: Leaf, way: str) -> None:
    model, x = leaf.model(), leaf.batch()
    prior, call = leaf.make(model, **way_options(leaf, way)).eval(), leaf.call(x)
    found = prior(x, **call, annotated=torch.ones(4))
    assert torch.equal(found, prior(x, **call))
    assert torch.equal(prior(x, **call, annotated=None), found)
    nobody = prior(x, **call, annotated=torch.zeros(4, dtype=torch.long))
    assert nobody.shape == ()
    assert nobody == 0
    assert nobody.dtype == found.dtype


def test_batch_norm_is_that_of_the_whole_batch() -> None:
    """The examples without an annotation belong to the function that is trained."""
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    prior, x, m = (
        RightForTheRightReasons(model, reduction="sum"),
        torch.randn(4, 5),
        torch.eye(4, 5),
    )
    found = with_gradient(prior(x, annotation=m, annotated=KNOWN), model)
    with part_of(x, None):
        close(found, with_gradient(prior(x[KNOWN], annotation=m[KNOWN]), model))


def test_what_belongs_to_the_examples_goes_with_them() -> None:
    """Targets, baselines, arguments, tuples; and sums, subsamples, terms without annotation."""
    case = tuple_inputs()
    masks = (torch.rand(4, 2, 2).round(), torch.rand(4, 3).round())
    inputs, (scale, power) = case.inputs, case.args
    y = torch.tensor([0, 1, 1, 0])
    explainer = IntegratedGradients(case.model)
    prior = AttributionPrior(explainer, outside, n_steps=3, reduction="sum")
    baselines = tuple(x + torch.randn_like(x) for x in inputs)
    found = prior(inputs, baselines, y, (scale, power), annotation=masks, annotated=KNOWN)
    some = [tuple(t[KNOWN] for t in each) for each in (inputs, baselines, masks)]
    alone = prior(some[0], some[1], y[KNOWN], (scale[KNOWN], power), annotation=some[2])
    torch.testing.assert_close(found, alone)
    x, model = torch.rand(4, 5), net()
    energy, pixel = EnergyPrior(model), PixelPrior(model, baselines=reference_rows()).eval()
    m = torch.rand(4, 5).round()
    total = (energy + pixel)(x, target=y, annotation=m, annotated=KNOWN)
    parts = energy(x, target=y, annotation=m, annotated=KNOWN), pixel(x, target=y)
    torch.testing.assert_close(total, torch.stack(parts).sum())
    draws = Subsample(energy, 0.5)
    assert_unbiased(
        lambda: draws(x, target=y, annotation=m, annotated=KNOWN), parts[0].detach(), 200
    )


# ---- One rule for channels and tuples -------------------------------------------------------


MASKED: dict[str, Callable[[nn.Module], Any]] = {
    **{
        name: lambda m, p=p: AttributionPrior(Saliency(m), p, abs=False)  # type: ignore[misc]  # a default
        for name, p in PENALTIES.items()
        if name not in ("energy_outside", "rationale")  # which sum what shares a value
    },
    "RRR": RightForTheRightReasons,
    "R4": lambda m: RobustRightReasons(m, radius=0.1).eval(),
    "Stability": lambda m: StabilityPrior(
        InputXGradient(m),
        mse,
        DistanceAttack(InputXGradient(m), mse, radius=0.1, step_num=2, keep_prediction=False),
    ).eval(),
}


@pytest.mark.parametrize("make", MASKED.values(), ids=MASKED.keys())
def test_channels_may_be_left_out_and_shared(make: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
    x, y = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    mask, prior = (torch.arange(100).reshape(4, 5, 5) % 3 > 0).double(), make(model)
    full = prior(x, target=y, annotation=mask[:, None].expand(4, 3, 5, 5))
    assert full > 0
    for same in (mask, mask[:, None], mask.bool()):
        torch.testing.assert_close(prior(x, target=y, annotation=same), full)
    torch.testing.assert_close(
        prior(x, target=y, annotation=shared(mask[0])),
        prior(x, target=y, annotation=mask[:1].expand(4, 5, 5)),
    )
    for other in (mask[:, 0], mask[:1], mask[..., :4], mask[:, None].expand(4, 2, 5, 5)):
        with pytest.raises(ValueError, match="`annotation`"):
            prior(x, target=y, annotation=other)


ABOUT_TUPLES: dict[str, tuple[Callable[[Any], Any], float]] = {
    # What an input of which nothing is said counts as: a mask that allows everything.
    "outside": (lambda m: AttributionPrior(Saliency(m), outside, abs=False), 1),
    "energy": (EnergyPrior, 1),
    "RRR": (RightForTheRightReasons, 1),
    "R4-random": (lambda m: RobustRightReasons(m, radius=0.3).eval(), 1),
    "R4-pgd": (lambda m: RobustRightReasons(m, radius=0.3, attack="pgd").eval(), 1),
}


@pytest.mark.parametrize("name", ABOUT_TUPLES)
def test_none_says_nothing_of_an_input(name: str) -> None:
    make, neutral = ABOUT_TUPLES[name]
    case, mask = tuple_inputs(), torch.tensor([1.0, 0.0, 1.0]).expand(4, 3)
    prior, anywhere = make(case.model), torch.full((4, 2, 2), neutral)
    given: dict[str, Any] = {
        "target": torch.tensor([0, 1, 1, 0]),
        "additional_forward_args": (torch.ones(4), 1.0),
    }
    expected = prior(case.inputs, **given, annotation=(anywhere, mask))
    assert expected > 0
    for same in (mask, shared(mask[0])):
        found = prior(case.inputs, **given, annotation=(None, same))
        torch.testing.assert_close(found, expected)
    assert prior(case.inputs, **given, annotation=(None, None)) == 0


def test_none_in_penalties() -> None:
    a, b, groups = torch.randn(3, 4), torch.randn(3, 2), torch.tensor([0, 1, 1, 0])
    m = torch.zeros(3, 4)
    torch.testing.assert_close(outside((a, b), annotation=(m, None)), outside(a, annotation=m))
    assert torch.equal(outside((a, b), annotation=(None, None)), torch.zeros(3))
    for penalty in PENALTIES.values():
        with pytest.raises(TypeError, match="`annotation`: expected a tensor, found NoneType"):
            penalty((a, b), annotation=None)
    found = group_sparsity((a, b), groups=(groups, None))
    torch.testing.assert_close(found, group_sparsity(a, groups=groups))


# ---- Perturbations are confined -------------------------------------------------------------


def test_perturbations_are_given_what_they_declare() -> None:
    seen: dict[str, Any] = {}

    def perturb(x: Tensor, target: Any, *, annotation: Tensor) -> Tensor:
        seen.update(target=target, annotation=annotation)
        return x + 0.1 * (1 - annotation)

    model, x, y = net(), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    prior = StabilityPrior(InputXGradient(model), mse, perturb)
    with pytest.raises(TypeError, match="`annotation`: expected what perturb is confined by"):
        prior(x, target=y)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    assert prior(x, target=y, annotation=shared(mask)) > 0
    assert torch.equal(seen["annotation"], mask.expand(4, 5))
    assert torch.equal(seen["target"], y)
    assert prior(x, target=y, annotation=torch.ones(4, 5)) == 0
    prior(x, target=y, annotation=shared(mask), annotated=KNOWN)
    assert torch.equal(seen["target"], y[KNOWN])


def test_models_see_changes_only_where_it_is_forbidden() -> None:
    """Of every attack in a stability prior, and of R4."""
    model, x, y = conv(), torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    mask, points = (torch.arange(64).reshape(4, 4, 4) % 3 > 0).double(), []

    def seeing(z: Tensor) -> Tensor:
        points.append(z.detach())
        return model(z)

    attack = DistanceAttack(
        InputXGradient(seeing), mse, radius=0.2, step_num=2, lower_bound=0, upper_bound=1
    )
    for prior in (
        StabilityPrior(InputXGradient(seeing), mse, attack),
        RobustRightReasons(seeing, radius=0.2, lower_bound=0, upper_bound=1),
        RobustRightReasons(seeing, radius=0.2, attack="pgd", lower_bound=0, upper_bound=1),
    ):
        points.clear()
        prior(x, target=y, annotation=mask)
        moved = torch.stack([z - x for z in points if len(z) == 4]).abs().amax(0)
        assert torch.equal(moved[:, 0] == 0, mask == 1)
        assert moved.max() <= 0.2 + 1e-12
        assert all(z.min() >= 0 and z.max() <= 1 for z in points)
