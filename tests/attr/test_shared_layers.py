"""A layer that several inputs share: what it returns for each of them is attributed apart."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_priors import (
    AttnLRP,
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    differentiable,
)
from captum_priors.outputs import each
from captum_priors.priors import ConceptPrior
from captum_priors.testing import check_differentiable
from tests.asserts import assert_same_numbers, assert_slope, parameter_gradients, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, Siamese, two_texts

ROUNDING = 1e-12  # sums in another order


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("estimator", ["monte_carlo", "control_variate"])
def test_equals_expected_gradients_of_the_rest(estimator: Any) -> None:
    case = two_texts()
    model, options = case.model, {"n_samples": 4, "target": 1, "estimator": estimator}
    found = LayerExpectedGradients(model, model.embedding).attribute(
        case.inputs, case.baselines, generator=seeded(), **options
    )
    embedded, references = (
        tuple(map(model.embedding, ids)) for ids in (case.inputs, case.baselines)
    )
    expected = ExpectedGradients(model.compared).attribute(
        embedded, references, generator=seeded(), **options
    )
    assert_same_numbers(found, expected, ROUNDING)
    parameters = list(model.parameters())
    slopes = [parameter_gradients(maps, parameters) for maps in (found, expected)]
    assert relative_error(*slopes) < ROUNDING
    assert slopes[0][0].any()  # of the embedding


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_a_linear_model_in_closed_form(way: Any) -> None:
    """Each text has its own weight, its own references and its own share of the output."""
    words, u, v = nn.Embedding(9, 4), torch.randn(5, 4), torch.randn(2, 4)
    model = lambda a, b: (words(a) * u).sum((1, 2)) - (words(b) * v).sum((1, 2))  # noqa: E731  # a sum
    ids, background = (tuple(torch.randint(9, (n, k)) for k in (5, 2)) for n in (3, 6))
    explainer = LayerExpectedGradients(model, words, differentiation=way)
    found = explainer.attribute(ids, background, n_samples=2)
    gaps = [words(x) - words(r).mean(0) for x, r in zip(ids, background, strict=True)]
    assert_same_numbers(found, (u * gaps[0], -v * gaps[1]), ROUNDING)
    shares = [(words(x) * w).sum((1, 2)) for x, w in zip(ids, (u, v), strict=True)]
    means = [(words(r) * w).sum((1, 2)).mean() for r, w in zip(background, (u, v), strict=True)]
    assert_same_numbers(found[0].sum((1, 2)), shares[0] - means[0], ROUNDING)
    assert_same_numbers(found[1].sum((1, 2)), means[1] - shares[1], ROUNDING)
    (slope,) = torch.autograd.grad(found[0][0].sum() + found[1][0].sum(), [words.weight])
    expected = torch.zeros(9, 4).index_add(0, ids[0][0], u).index_add(0, ids[1][0], -v)
    for rows, weights in zip(background, (-u, v), strict=True):
        expected = expected.index_add(0, rows.flatten(), (weights / 6).repeat(6, 1))
    assert_same_numbers(slope, expected, ROUNDING)


def test_completeness_of_all_runs_together() -> None:
    case, n = two_texts(), 16
    found, delta = LayerExpectedGradients(case.model, case.layer).attribute(
        case.inputs, case.baselines, n, target=2, return_convergence_delta=True
    )
    gap = case.model(*case.inputs)[:, 2] - case.model(*case.baselines)[:, 2].mean()
    explained = sum(maps.sum((1, 2)) for maps in found)
    assert_same_numbers(explained, gap + delta.reshape(3, n).mean(1), 1e-10)


class Masked(Siamese):
    """With a mask for each text, which counts in what the encoder returns."""

    def forward(self, a: Tensor, b: Tensor, *masks: Tensor) -> Tensor:
        pairs = zip((a, b), masks, strict=True)
        return self.compared(*(self.embedding(ids) * mask.unsqueeze(2) for ids, mask in pairs))


@pytest.mark.parametrize("way", EXACT)
def test_a_mask_for_each_text(way: Any) -> None:
    model, case = Masked(), two_texts()
    masks = tuple((ids > 2).double() for ids in case.inputs)
    explainer = LayerExpectedGradients(model, model.embedding, differentiation=way)
    call = {"baselines": case.baselines, "target": 1, "additional_forward_args": masks}
    found = explainer.attribute(case.inputs, **call)
    for maps, mask in zip(found, masks, strict=True):
        assert not maps[mask == 0].any()
        assert maps[mask == 1].all()
    assert check_differentiable(explainer, case.inputs, **call).passed


def test_several_outputs_at_once() -> None:
    case = two_texts()
    explainer = LayerExpectedGradients(case.model, case.layer)
    found = explainer.attribute(case.inputs, case.baselines, target=each(), generator=seeded())
    alone = [
        explainer.attribute(case.inputs, case.baselines, target=k, generator=seeded())
        for k in range(3)
    ]
    expected = tuple(torch.stack(maps, 1) for maps in zip(*alone, strict=True))
    assert_same_numbers(found, expected, ROUNDING)


# --- what is refused -------------------------------------------------------------------------


class Chained(Siamese):
    """The second run is of what the first returns, by way of another layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.tanh(self.mix(x) @ torch.ones(5, 4))))


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_runs_that_feed_one_another_are_refused(frozen: bool, to_input: bool) -> None:
    model, x = Chained().requires_grad_(not frozen), torch.randn(3, 4)
    explainer = LayerExpectedGradients(model, model.mix)
    with pytest.raises(ValueError, match="found 2 runs, of which one feeds another"):
        explainer.attribute(x, x, target=0, attribute_to_layer_input=to_input)


class Texts(Siamese):
    """One run for each text, or as many as the data have it."""

    def __init__(self, runs: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.runs = runs

    def forward(self, ids: Tensor) -> Tensor:
        n = self.runs(ids)
        return self.head(sum(self.mix(self.embedding(ids[:, k])) for k in range(n)))


@pytest.mark.parametrize(
    ("runs", "found"),
    [
        (lambda ids: 2 + (len(ids) > 3), "found more runs"),
        (lambda ids: 2 - (len(ids) > 3), "found fewer runs"),
    ],
)
def test_runs_that_depend_on_the_batch_are_refused(runs: Any, found: str) -> None:
    model, ids = Texts(runs), torch.randint(11, (3, 4))
    explainer = LayerExpectedGradients(model, model.embedding)
    with pytest.raises(ValueError, match=found):
        explainer.attribute(ids, ids, n_samples=2, target=0)
    captum = differentiable(ca.LayerIntegratedGradients(model, model.embedding))
    # A run that is missing is missed by torch.
    with pytest.raises((ValueError, RuntimeError), match=r"other numbers of runs|not .* been used"):
        captum.attribute(ids, n_steps=3, target=0)


class InOneBatch(Siamese):
    """Both texts go through the encoder in one batch: texts of an example beside, or far apart."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside = beside

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        both = torch.stack([a, b], 1).flatten(0, 1) if self.beside else torch.cat([a, b])
        hidden = self.embedding(both)
        return self.compared(
            *(hidden.unflatten(0, (-1, 2)).unbind(1) if self.beside else hidden.chunk(2))
        )


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_texts_in_one_batch_stand_beside_each_other(batch: int) -> None:
    """Or they would be taken for those of other examples."""
    ids = tuple(torch.randint(11, (2, batch, 4)))
    model = InOneBatch(beside=False)
    explainer = LayerExpectedGradients(model, model.embedding)
    with pytest.raises(ValueError, match="run it once for each"):
        explainer.attribute(ids, ids, target=0)
    model = InOneBatch(beside=True)
    found = LayerExpectedGradients(model, model.embedding).attribute(
        ids, ids, n_samples=3, target=0, generator=seeded()
    )
    expected = ExpectedGradients(model.compared).attribute(
        tuple(map(model.embedding, ids)),
        tuple(map(model.embedding, ids)),
        n_samples=3,
        target=0,
        generator=seeded(),
    )
    assert_same_numbers(found, torch.stack(expected, 1).flatten(0, 1), ROUNDING)


def test_a_concept_is_one_of_a_layer_that_runs_once() -> None:
    case = two_texts()
    prior = ConceptPrior(case.model, case.layer, torch.randn(4), channel_dim=-1)
    with pytest.raises(TypeError, match=r"runs once .*found 2"):
        prior(case.inputs, target=1)


# --- Captum's layer methods ------------------------------------------------------------------


class Places(nn.Module):
    """The same encoder with a module of its own for each text, as Captum wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.left, self.right = model, nn.Identity(), nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        embedded = self.left(self.model.embedding(a)), self.right(self.model.embedding(b))
        return self.model.compared(*embedded)


class Dense(Siamese):
    """Of features, for methods whose path runs between inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 4)


# Classes of Captum's, and what they are asked.
OF_INPUTS: dict[str, dict[str, Any]] = {
    "InternalInfluence": {"n_steps": 3},
    "LayerConductance": {"n_steps": 3},
    "LayerGradientShap": {"n_samples": 2},
    "LayerDeepLiftShap": {},
}
OF_LAYERS: dict[str, dict[str, Any]] = {
    "LayerActivation": {},
    "LayerDeepLift": {},
    "LayerFeatureAblation": {},
    "LayerGradCam": {},
    "LayerGradientXActivation": {},
    "LayerIntegratedGradients": {"n_steps": 3},
}


def asked(name: str) -> tuple[Any, Any, dict[str, Any]]:
    if name in OF_INPUTS:
        model, inputs = Dense(), (torch.randn(3, 6, 5), torch.randn(3, 2, 5))
    else:
        model, inputs = Siamese(), two_texts().inputs
    call = {**OF_INPUTS, **OF_LAYERS}[name]
    if name != "LayerActivation":
        call = {**call, "target": 1}
    if name.endswith("Shap"):
        call = {**call, "baselines": tuple(torch.zeros_like(x[:2]) for x in inputs)}
    return model, inputs, call


def drawn(explain: Callable[[], Any]) -> Any:
    """What an explainer says with given draws."""
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002  # which Captum draws from
    return explain()


@pytest.mark.filterwarnings("ignore:.*expected a module with a rule")  # of DeepLIFT, for tanh
@pytest.mark.filterwarnings("ignore:Multiple layers provided")
@pytest.mark.parametrize("name", [*OF_INPUTS, *OF_LAYERS])
def test_captum_explains_each_run(name: str) -> None:
    model, inputs, call = asked(name)
    places, cls = Places(model), getattr(ca, name)
    if name == "LayerIntegratedGradients":  # whose path is that of both texts
        expected = cls(places, [places.left, places.right]).attribute(inputs, **call)
    else:
        expected = [
            drawn(lambda layer=layer: cls(places, layer).attribute(inputs, **call))
            for layer in (places.left, places.right)
        ]
    stock, slopes = cls(model, model.embedding), []
    for way in EXACT:
        explainer = differentiable(stock, differentiation=way)
        found = drawn(lambda: explainer.attribute(inputs, **call))  # noqa: B023  # at once
        assert_same_numbers(found, tuple(maps.detach() for maps in expected), ROUNDING)
        slopes.append(parameter_gradients(found, list(model.parameters())))
    assert relative_error(*slopes) < ROUNDING
    with torch.no_grad():
        values = drawn(lambda: differentiable(stock).attribute(inputs, **call))
    assert_same_numbers(values, found, ROUNDING)
    assert check_differentiable(differentiable(stock), inputs, **call).passed


def test_integrated_gradients_are_complete_and_those_of_one_reference() -> None:
    case, options = two_texts(), {"target": 1, "n_steps": 50}
    zeros = tuple(torch.zeros_like(ids[:1]) for ids in case.inputs)
    explainer = differentiable(ca.LayerIntegratedGradients(case.model, case.layer))
    found, delta = explainer.attribute(case.inputs, zeros, return_convergence_delta=True, **options)
    gap = case.model(*case.inputs)[:, 1] - case.model(*zeros)[:, 1]
    # 50 points of a Gauss-Legendre rule, of a smooth function.
    assert_same_numbers(sum(maps.sum((1, 2)) for maps in found), gap, 1e-8)
    assert delta.abs().max() < 1e-8
    ours = LayerExpectedGradients(case.model, case.layer).attribute(
        case.inputs, zeros, 500, target=1
    )
    assert_same_numbers(ours, found, 1e-3)  # one random position in each 500th


@pytest.mark.parametrize("name", ["InternalInfluence", "LayerActivation"])
def test_what_the_layer_receives(name: str) -> None:
    model, inputs = Dense(), (torch.randn(3, 6, 5), torch.randn(3, 2, 5))
    call = {"target": 1, "n_steps": 3} if name == "InternalInfluence" else {}
    found = differentiable(getattr(ca, name)(model, model.mix)).attribute(
        inputs, attribute_to_layer_input=True, **call
    )
    expected = differentiable(getattr(ca, name)(model, model.embedding)).attribute(inputs, **call)
    assert_same_numbers(found, expected, ROUNDING)


def test_the_difference_of_the_outputs_is_that_of_all_runs() -> None:
    model, inputs, call = asked("LayerConductance")
    explainer = differentiable(ca.LayerConductance(model, model.embedding))
    with pytest.raises(ValueError, match=r"return_convergence_delta.* of all runs together"):
        explainer.attribute(inputs, return_convergence_delta=True, **call)
    found = explainer.attribute(inputs, target=1, n_steps=200)
    gap = (model(*inputs) - model(*(0 * x for x in inputs)))[:, 1]
    # 200 differences, each times the slope at one of its ends.
    assert_same_numbers(sum(maps.sum((1, 2)) for maps in found), gap, 1e-2)


def test_relevance_of_each_run_by_function() -> None:
    case = two_texts()
    found = differentiable(ca.LayerLRP(case.model, case.layer)).attribute(case.inputs, target=1)
    embedded = tuple(map(case.layer, case.inputs))
    expected = AttnLRP(case.model.compared).attribute(embedded, target=1)
    assert_same_numbers(found, expected, ROUNDING)


@pytest.mark.parametrize("cls", [ca.LayerIntegratedGradients, LayerExpectedGradients])
def test_a_prior_on_one_of_two_texts(cls: Any) -> None:
    """Its penalty is given both; its gradient is its slope."""

    def second(maps: tuple[Tensor, Tensor], *, annotation: Tensor) -> Tensor:
        return (maps[1].sum(2) * annotation).square().sum(1)

    case = two_texts()
    zeros, forbidden = tuple(torch.zeros_like(ids[:1]) for ids in case.inputs), torch.ones(3, 3)
    prior = AttributionPrior(cls(case.model, case.layer), second, baselines=zeros).eval()

    def value() -> Tensor:
        return prior(case.inputs, target=1, annotation=forbidden)

    assert value() > 0
    assert_slope(value, list(case.model.parameters()))
