"""The caller's tensors are the caller's: nothing changes them, whatever works in place on them."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    StabilityPrior,
    Subsample,
    differentiable,
)
from captum_priors.attacks import (
    DistanceAttack,
    ManipulationAttack,
    MassCenterAttack,
    RandomAttack,
    TopKAttack,
)
from captum_priors.distances import mse
from captum_priors.metrics import local_lipschitz, stability_report
from captum_priors.penalties import l2
from captum_priors.stability import manipulability_bound
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import set_up
from tests.asserts import gradients_of
from tests.laws.leaves import (
    CAPTUM,
    Around,
    Leaf,
    background,
    leaves_and_ways_but,
    net,
    those,
    way_options,
)


class Normalises(Around):
    """A model that first normalises what it is given, in place or not."""

    def __init__(self, inner: Any, *, in_place: bool) -> None:
        super().__init__(inner)
        self.in_place = in_place

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Any:
        x = x.sub_(0.5) if self.in_place else x - 0.5
        return self.inner(x, *args, **named)


def unchanged(*tensors: Tensor) -> Callable[[], None]:
    """Check later that the tensors are what they are now."""
    before = [t.clone() for t in tensors]

    def check() -> None:
        for i, (old, new) in enumerate(zip(before, tensors, strict=True)):
            assert torch.equal(old, new), f"tensor {i} moved by {(old - new).abs().max():g}"

    return check


def value_and_slope(prior: Any, model: nn.Module, x: Tensor, call: dict[str, Any]) -> list[Tensor]:
    value = prior(x, **call)
    return [value.detach(), *gradients_of(value, [*model.parameters()])]


@leaves_and_ways_but("Stability-FGSM")  # Captum's FGSM runs the model itself
def test_models_that_normalise_in_place_in_priors(leaf: Leaf, way: str) -> None:
    inner, x = leaf.model(), leaf.batch()
    call, found = leaf.call(x), []
    for in_place in (False, True):
        model = Normalises(inner, in_place=in_place)
        torch.manual_seed(2)
        prior = leaf.make(model, **way_options(leaf, way)).eval()
        check = unchanged(x, *(v for v in call.values() if isinstance(v, Tensor)))
        found.append(value_and_slope(prior, inner, x, call))
        check()
        del prior
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:You are providing multiple inputs for Lime")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", [n for n in CAPTUM if "LLM" not in n])  # which take token ids
def test_models_that_normalise_in_place_in_adapters(name: str) -> None:
    row, inner, x = set_up(name, CAPTUM[name].model)
    call, model = row.call(inner), Normalises(inner, in_place=True)
    check = unchanged(x, *(v for v in call.values() if isinstance(v, Tensor)))
    try:
        row.tensors(differentiable(row.make(model)).attribute(row.subject(x), **call))
    except (AssertionError, RuntimeError):  # some of Captum's cannot do it, in stock either
        with pytest.raises((AssertionError, RuntimeError)):
            row.make(model).attribute(row.subject(x.clone()), **call)
    check()


@pytest.mark.parametrize("frozen", [False, True])
def test_models_that_normalise_in_place_in_explainers(frozen: bool) -> None:
    model, x, rows = Normalises(net(), in_place=True), torch.randn(4, 5), background()
    model.requires_grad_(not frozen)
    plain = Normalises(model.inner, in_place=False)
    check, found = unchanged(x, rows), []
    for m in (plain, model):
        torch.manual_seed(1)
        each = (ExpectedGradients(m), LayerExpectedGradients(m, m[1]))
        found.append([e.attribute(x, rows, target=0) for e in each])
        check()
    torch.testing.assert_close(found[1], found[0])


def test_layers_before_an_activation_in_place() -> None:
    first, last, x = nn.Linear(5, 4), nn.Linear(4, 3), torch.randn(4, 5)
    found = []
    for in_place in (False, True):
        model = nn.Sequential(first, nn.ReLU(in_place), last)
        torch.manual_seed(1)
        explainer = LayerExpectedGradients(model, first)
        found.append(explainer.attribute(x, background(), target=0))
    torch.testing.assert_close(found[1], found[0])


class Centres:
    """An explainer that works on what it is given."""

    def __init__(self) -> None:
        self.forward_func = net()

    def attribute(self, inputs: Any, target: Any = None) -> Any:
        for x in inputs if isinstance(inputs, tuple) else (inputs,):
            x -= x.mean(1, keepdim=True)
        first = inputs[0] if isinstance(inputs, tuple) else inputs
        return first * self.forward_func(first)[:, :1]


@pytest.mark.parametrize("several", [False, True])
def test_explainers_in_place(several: bool) -> None:
    x: Any = (torch.randn(4, 5), torch.randn(4, 5)) if several else torch.randn(4, 5)
    check = unchanged(*(x if several else (x,)))
    AttributionPrior(Centres(), l2)(x).backward()
    StabilityPrior(Centres(), mse, lambda x: x)(x)
    check()


class InPlace:
    """A perturbation that works on what it is given."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        self.draw = draw

    def perturb(self, inputs: Any) -> Any:
        for x in inputs if isinstance(inputs, tuple) else (inputs,):
            x += self.draw(x)
        return inputs


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: Subsample(p, 1.0), lambda p: 2 * p])
@pytest.mark.parametrize("several", [False, True])
def test_perturbations_in_place(several: bool, wrap: Any) -> None:
    layer = net()

    def model(*x: Tensor) -> Tensor:
        return torch.stack([layer(t) for t in x]).sum(0)

    x: Any = (torch.randn(4, 5), torch.randn(4, 5)) if several else torch.randn(4, 5)
    tensors = x if several else (x,)
    apart = (lambda *x: tuple(t + 0.3 for t in x[0])) if several else (lambda x: x + 0.3)
    check, values = unchanged(*tensors), []
    for perturb in (apart, InPlace(lambda x: torch.full_like(x, 0.3))):
        prior = wrap(StabilityPrior(ca.Saliency(model), mse, perturb))
        values.append(prior(x, target=0))
        check()
    torch.testing.assert_close(values[1], values[0])
    assert values[0].item() > 0


ATTACKS: dict[str, Callable[..., Any]] = {
    "DistanceAttack": lambda e, **o: DistanceAttack(e, mse, step_num=2, **o),
    "ManipulationAttack": lambda e, **o: ManipulationAttack(e, torch.ones(4, 5), step_num=2, **o),
    "MassCenterAttack": lambda e, **o: MassCenterAttack(e, step_num=2, **o),
    "RandomAttack": RandomAttack,
    "TopKAttack": lambda e, **o: TopKAttack(e, 2, step_num=2, **o),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("keep", [True, False])
def test_attacks_stay_in_their_ball(attack: Any, norm: Any, keep: bool) -> None:
    model, x = Normalises(net(), in_place=True), torch.randn(4, 5)
    check, start = unchanged(x), x.clone()
    found = attack(
        differentiable(ca.Saliency(model)), radius=0.1, norm=norm, keep_prediction=keep
    ).perturb(x, 0)
    check()
    moved = (found - start).abs() if norm == "Linf" else (found - start).norm(dim=1)
    assert float(moved.max()) <= 0.1 * (1 + 1e-12)  # rounding of x + r - x


@those(name="ART")
def test_perturbing_leaves_the_inputs(leaf: Leaf) -> None:
    model, x = Normalises(leaf.model(), in_place=True), leaf.batch()
    check, start = unchanged(x), x.clone()
    found = leaf.make(model).perturb(x, leaf.call(x)["target"])
    check()
    assert float((found - start).abs().max()) <= 0.2 * (1 + 1e-12)


def saliency(model: nn.Module) -> Any:
    return differentiable(ca.Saliency(model))


def means(explainer: Any, x: Tensor, y: Tensor) -> list[float]:
    noise = RandomAttack(explainer, radius=0.1)
    report = stability_report({"it": explainer}, {"it": {"noise": noise}}, [(x, y)], k=2)
    return [score.mean for score in report.row().scores.values()]


def test_models_that_normalise_in_place_in_metrics_and_attacks() -> None:
    model, x = Normalises(net(), in_place=True), torch.randn(4, 5)
    twin = Normalises(model.inner, in_place=False)
    y = torch.tensor([0, 1, 2, 0])
    asks: list[Callable[[Any], Any]] = [
        lambda m: local_lipschitz(saliency(m), x, radius=0.1, target=0, seed=1),
        lambda m: manipulability_bound(m, x, x + 0.1, 0, form="path", n_steps=3),
        lambda m: check_differentiable(saliency(m), x, target=0).passed,
        lambda m: means(saliency(m), x, y),
        lambda m: DistanceAttack(saliency(m), mse, radius=0.1, step_num=2, seed=1).perturb(x, 0),
    ]
    for ask in asks:
        check = unchanged(x, y)
        found = ask(model)
        check()
        torch.testing.assert_close(found, ask(twin))
