"""Targets of many outputs say what plain targets, and functions around the model, say."""

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
    Subsample,
    differentiable,
    shared,
)
from captum_priors.outputs import each, total, weighted
from captum_priors.penalties import l2, outside
from captum_priors.stability import manipulability_bound
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import ROWS, flat, seeded, set_up
from tests.asserts import gradients_of
from tests.laws.leaves import (
    CLASSES,
    LEAVES,
    WAYS,
    Around,
    Leaf,
    leaves_and_ways_but,
    way_options,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are providing multiple inputs for Lime / Kernel SHAP",  # advice about speed
    "ignore:Objective did not converge",  # more is asked of the lasso than float64 holds
)
LABELLED = [leaf.name for leaf in LEAVES if leaf.labels]
FOREIGN = "Stability-FGSM"  # Captum's attack knows indices alone
# These look at all outputs, or at predictions: with a function around the model they say other.
OF_ALL = (
    *("ATEX", "Sensitivity", "Jacobian", "Jacobian-exact", "SSR", "SGT", "RRR"),
    "Concept-maps-random",
)
TARGETED = [name for name, row in ROWS.items() if row.target]
every_targeted_row = pytest.mark.parametrize("name", TARGETED)


class Summed(Around):
    """The function around a model that a target takes the place of."""

    def __init__(self, inner: Any, weights: Tensor) -> None:
        super().__init__(inner)
        self.weights = weights

    def forward(self, *args: Any) -> Tensor:
        outputs: Tensor = self.inner(*args)
        rows = len(outputs) // len(self.weights)  # of each example, one batch after another
        return (outputs * self.weights.repeat(rows, *[1] * (outputs.dim() - 1))).flatten(1).sum(1)


def with_gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return [value.detach(), *gradients_of(value, [*model.parameters()])]


def assert_same(found: list[Tensor], expected: list[Tensor], way: str = "") -> None:
    # Differences choose their steps by what the rounding of sums makes of them.
    tolerance = 1e-4 if way == "finite_difference" else 1e-9
    scale = max(float(e.abs().max()) for e in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def of_prior(
    leaf: Leaf, way: str, model: nn.Module, x: Tensor, target: Any, around: Any = None
) -> list[Tensor]:
    """Value and gradients; evaluation draws the same for all."""
    torch.manual_seed(3)
    prior = leaf.make(around or model, **way_options(leaf, way)).eval()
    return with_gradients(prior(x, **{**leaf.call(x), "target": target}), model)


@leaves_and_ways_but(*LABELLED, FOREIGN)
def test_one_weight_is_a_plain_target(leaf: Leaf, way: str) -> None:
    model, x = leaf.model(), leaf.batch()
    y = torch.tensor([0, 2, 1, 2])
    expected = of_prior(leaf, way, model, x, y)
    assert_same(of_prior(leaf, way, model, x, weighted(torch.eye(CLASSES)[y])), expected, way)
    expected = of_prior(leaf, way, model, x, 1)
    one = torch.arange(CLASSES) == 1
    assert_same(of_prior(leaf, way, model, x, total(shared(one))), expected, way)


@leaves_and_ways_but(*LABELLED, *OF_ALL, FOREIGN)
def test_sums_are_functions_around_the_model(leaf: Leaf, way: str) -> None:
    model, x, weights = leaf.model(), leaf.batch(), torch.tensor([[0.5, -2.0, 1.0]])
    expected = of_prior(leaf, way, model, x, None, Summed(model, weights))
    assert_same(of_prior(leaf, way, model, x, weighted(shared(weights[0]))), expected, way)


@leaves_and_ways_but(*LABELLED)
def test_each_is_the_mean_over_plain_targets(leaf: Leaf, way: str) -> None:
    model, x = leaf.model(), leaf.batch()
    alone = [of_prior(leaf, way, model, x, k) for k in range(CLASSES)]
    expected = [torch.stack(values).mean(0) for values in zip(*alone, strict=True)]
    assert_same(of_prior(leaf, way, model, x, each()), expected, way)


def of_explainer(name: str, target: Any, weights: Tensor | None = None) -> list[Tensor]:
    """Attributions, and the gradients of a random sum of them."""
    row, model, x = set_up(name, ROWS[name].model)
    around = model if weights is None else Summed(model, weights)
    call = {**row.call(model), "target": target}
    found = flat(seeded(differentiable(row.make(around)), x, call, row))
    generator = torch.Generator().manual_seed(1)
    value = sum((a * torch.rand(a.shape, generator=generator)).sum() for a in found)
    return [*(a.detach() for a in found), *with_gradients(value, model)[1:]]


@every_targeted_row
def test_sums_are_functions_around_the_model_in_captum(name: str) -> None:
    weights = torch.tensor([[0.5, -2.0, 1.0]])
    expected = of_explainer(name, None, weights)
    assert_same(of_explainer(name, weighted(shared(weights[0]))), expected)
    examples = len(ROWS[name].subject(torch.zeros(3, 1)))
    assert_same(of_explainer(name, weighted(weights.expand(examples, 3))), expected)


@every_targeted_row
def test_each_stacks_plain_targets_in_captum(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].model)
    explainer, call = differentiable(row.make(model)), row.call(model)
    one = weighted(shared(torch.tensor([1.0, 2.0, 0.0])))
    targets = [2, one, 0]
    alone = [flat(seeded(explainer, x, {**call, "target": t}, row)) for t in targets]
    found = flat(seeded(explainer, x, {**call, "target": each(targets)}, row))
    for maps, expected in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(maps, torch.stack(expected, 1))
    everything = flat(seeded(explainer, x, {**call, "target": each()}, row))
    assert [m.shape[1] for m in everything] == [CLASSES] * len(everything)
    torch.testing.assert_close(everything[0][:, 2], alone[0][0])


# --- dense models ------------------------------------------------------------------------


class Dense(nn.Module):
    """Two classes for each pixel, of images and a number for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor, scale: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(images))) * scale.reshape(-1, 1, 1, 1)


DENSE: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "EG": lambda m, way, x: (
        ExpectedGradients(m, differentiation=way),
        {"baselines": torch.zeros(5, 1, 4, 4) + x[:1] / 2, "n_samples": 3},
    ),
    "LayerEG": lambda m, way, x: (
        LayerExpectedGradients(m, m.first, differentiation=way),
        {"baselines": x.flip(0), "n_samples": 2},
    ),
    "IG": lambda m, way, x: (
        differentiable(ca.IntegratedGradients(m), differentiation=way),
        {"baselines": x / 2, "n_steps": 5},
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [None, 4, 7])
@pytest.mark.parametrize("name", DENSE)
def test_dense_outputs(name: str, chunk: int | None, way: str) -> None:
    """Masks of each example go along with chunks, with additional arguments, and with each."""
    model, x, scale = Dense(), torch.randn(4, 1, 4, 4), torch.rand(4) + 1
    mask = torch.rand(4, 2, 4, 4) > 0.5
    pixels = torch.rand(4, 1, 4, 4) > 0.5

    def around(images: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
        return (model(images, scale) * weights).flatten(1).sum(1)

    around.first = model.first  # type: ignore[attr-defined]  # where the layer is looked for

    def explained(function: Any, target: Any, *args: Tensor) -> Tensor:
        explainer, options = DENSE[name](function, way, x)
        call = {"target": target, "additional_forward_args": (scale, *args), **options}
        torch.manual_seed(2)
        return explainer.attribute(x, internal_batch_size=chunk, **call)

    def numbers(maps: Tensor) -> list[Tensor]:
        return [maps.detach(), *with_gradients(maps.square().sum(), model)]

    of_mask = numbers(explained(around, None, mask.double()))
    assert_same(numbers(explained(model, total(mask))), of_mask, way)
    sums = (mask.double(), pixels.double(), torch.ones(4, 1, 1, 1))
    expected = [explained(around, None, weights) for weights in sums]
    expected += [explained(model, (1, 2, 3))]
    found = explained(model, each([total(mask), total(pixels), total(), (1, 2, 3)]))
    assert_same(numbers(found), numbers(torch.stack(expected, 1)), way)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_in_a_tuple(way: Any) -> None:
    left, right = nn.Linear(3, 2), nn.Linear(4, 2)

    def model(a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(left(a)) * right(b)

    x = torch.randn(5, 3), torch.randn(5, 4)
    both = nn.ModuleList([left, right])
    eg = ExpectedGradients(model, differentiation=way)
    ig = differentiable(ca.IntegratedGradients(model), differentiation=way)
    for explainer, options in ((eg, {"baselines": x, "n_samples": 2}), (ig, {"n_steps": 3})):

        def numbers(target: Any, explainer: Any = explainer, given: Any = options) -> list[Tensor]:
            torch.manual_seed(2)
            maps = explainer.attribute(x, target=target, **given)
            gradients = with_gradients(sum(m.square().sum() for m in maps), both)
            return [*(m.detach() for m in maps), *gradients]

        of_a, of_b, *others = zip(numbers(0), numbers(1), strict=True)
        stacked = [torch.stack(maps, 1) for maps in (of_a, of_b)]
        added = [first + second for first, second in others]
        assert_same(numbers(each()), [*stacked, *added], way)


def test_all_outputs_of_a_dense_model_are_in_their_order() -> None:
    model, x, scale = Dense(), torch.randn(2, 1, 3, 3), torch.ones(2)
    maps = differentiable(ca.Saliency(model)).attribute(
        x, target=each(), additional_forward_args=scale, abs=False
    )
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda z: model(z, scale), x)])
    own = torch.stack([jacobian[0, i, ..., i, :, :, :] for i in range(2)])
    torch.testing.assert_close(maps.unflatten(1, (2, 3, 3)), own)


def test_deltas_of_each_are_complete() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    of_draws = {"baselines": x, "n_samples": 3, "estimator": "monte_carlo"}  # complete in each
    made: list[tuple[Any, Any]] = [
        (ExpectedGradients(model), of_draws),
        (differentiable(ca.IntegratedGradients(model)), {"n_steps": 3}),
    ]
    for explainer, options in made:
        maps, delta = explainer.attribute(
            x, target=each(), return_convergence_delta=True, **options
        )
        assert maps.shape == (4, 2, 3)
        assert delta.shape == (4 * options.get("n_samples", 1), 2)
        # A linear model's are zero, up to the weights of Captum's quadrature in single precision.
        assert float(delta.detach().abs().max()) < 1e-6


@pytest.mark.parametrize("target", [each(), total(), weighted(shared(torch.tensor([1.0, -2.0])))])
@pytest.mark.parametrize("way", WAYS[:2])
def test_certificate(target: Any, way: Any) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    x.requires_grad_()
    for explainer, options in (
        (ExpectedGradients(model, differentiation=way), {"baselines": torch.randn(6, 3)}),
        (
            differentiable(ca.IntegratedGradients(model), differentiation=way),
            {"n_steps": 3, "internal_batch_size": 4},
        ),
    ):
        assert check_differentiable(explainer, x, target=target, **options).passed


def test_subsample_takes_the_weights_of_its_examples() -> None:
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    seen: list[Tensor] = []

    def penalty(maps: Tensor) -> Tensor:
        seen.append(maps.detach())
        return maps.square().sum(1)

    prior = AttributionPrior(ca.Saliency(model), penalty, abs=False)
    weights = torch.arange(6.0).unsqueeze(1).expand(6, 2)
    Subsample(prior, fraction=0.5)(x, target=each([weighted(weights), 1]))
    of_sum, of_one = seen
    assert of_one.shape == (3, 3)
    ratios = (of_sum / model.weight.detach().sum(0)).mean(1)
    assert {round(float(r)) for r in ratios} < set(range(6))
    torch.testing.assert_close(ratios, ratios.round())


def test_all_outputs_of_a_part_of_the_batch() -> None:
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    mask, known = torch.ones(6, 3), torch.arange(6) % 2 == 0
    mask[:, 0] = 0
    prior = AttributionPrior(ca.Saliency(model), outside)
    values = {
        wrap(target)
        for target in (each(), each([0, 1]))
        for wrap in (
            lambda t: prior(x, target=t, annotation=mask, annotated=known).item() * 2,
            lambda t: Subsample(prior, 0.5)(x, target=t, annotation=mask).item(),
        )
    }
    assert values == {prior(x, target=each(), annotation=mask).item()}  # Saliency is the weights


def test_statements_about_the_batch_are_made_for_each_output() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    prior = AttributionPrior(ca.InputXGradient(model), lambda maps: maps.mean().square())
    alone = torch.stack([prior(x, target=k) for k in range(2)])
    torch.testing.assert_close(prior(x, target=each()), alone.mean())


def test_explainers_with_a_graph_of_their_own() -> None:
    """They know plain targets: each asks for one after another."""

    class Own:
        def __init__(self, forward_func: Any) -> None:
            self.forward_func = forward_func

        def attribute(self, inputs: Tensor, target: int | None = None) -> Tensor:
            return inputs * self.forward_func.weight[target]

    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    prior = AttributionPrior(Own(model), lambda maps: maps.square().sum(1))
    expected = (x.unsqueeze(1) * model.weight).square().sum(2).mean()
    torch.testing.assert_close(prior(x, target=each()), expected)


def test_sums_do_not_overflow_nor_count_what_is_left_out() -> None:
    half = torch.full((1, 3), 6e4, dtype=torch.float16)
    assert total().select(half).item() == pytest.approx(1.8e5, rel=1e-3)
    outputs = torch.tensor([[1.0, -torch.inf]])
    assert total(torch.tensor([[True, False]])).select(outputs).item() == 1
    assert weighted(torch.tensor([[3.0, 0.0]])).select(outputs).item() == 3


@torch.inference_mode()
def test_weights_made_in_inference_mode() -> None:
    x = torch.randn(4, 3)
    with torch.inference_mode(False):
        model = nn.Linear(3, 2)
        prior = AttributionPrior(ExpectedGradients(model), l2, baselines=torch.zeros(1, 3))
    for target in (total(torch.ones(4, 2).bool()), weighted(shared(torch.ones(2)))):
        torch.testing.assert_close(prior(x, target=target), prior(x, target=total()))


@pytest.mark.parametrize("last", [True, False])
def test_bounds_of_sums(last: bool) -> None:
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Softplus()]
    model, x = nn.Sequential(*layers[: 3 if last else 4]), torch.randn(4, 3)
    bound = manipulability_bound(
        model, x, x + 0.1, target=weighted(shared(torch.tensor([0, -2.0])))
    )
    expected = 2 * manipulability_bound(model, x, x + 0.1, target=1)
    torch.testing.assert_close(bound, expected)
