"""What holds for every adapter of Captum's classes beside its numbers: one law over all rows."""

import inspect
import random
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum._utils.models.linear_model import SGDLasso, SkLearnLasso, SkLearnRidge
from torch import Tensor, nn

from captum_priors import ExpectedGradients, NotDifferentiableError, differentiable
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import (
    ROWS,
    Flat,
    Row,
    every_row,
    flat,
    seeded,
    set_up,
)
from tests.asserts import assert_same_numbers, parameter_gradients

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are providing multiple inputs for Lime / Kernel SHAP",  # advice about speed
    "ignore:Objective did not converge",  # more is asked of the lasso than float64 holds
    "ignore:.*found lstm in",  # DeepLIFT over a recurrent layer
)


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("LLM")])
def test_what_a_model_sets_on_itself_stays(name: str) -> None:
    """Also attributes whose names are those that Captum uses for its own."""
    row, model, x = set_up(name, ROWS[name].models[0])
    forward = model.forward

    def first(x: Tensor) -> Tensor:
        if not hasattr(model, "input"):
            model.input, model.output, model.activations = 1, 2, 3
        return forward(x)

    model.forward = first
    differentiable(row.make(model)).attribute(row.subject(x), **row.call(model))
    assert (model.input, model.output, model.activations) == (1, 2, 3)


# --- random numbers -----------------------------------------------------------------------


@every_row
def test_draws_say_which_streams_move(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].models[0])
    explainer = differentiable(row.make(model))
    explainer.attribute(row.subject(x), **row.call(model))  # imports may draw, too
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002  # global
    explainer.attribute(row.subject(x), **row.call(model))
    after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002  # global
    moved = {
        stream
        for stream, a, b in zip(("torch", "numpy", "python"), before, after, strict=True)
        if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
    }
    # These say what may be inside: another method, a lasso, a loader that shuffles, an import.
    may = ("NoiseTunnel", "Lime", "KernelShap", "DataLoader", "LLM")
    assert moved <= set(explainer.draws)
    assert name.startswith(may) or moved == set(explainer.draws)


# --- outputs, targets, baselines ------------------------------------------------------------


def test_a_neuron_may_be_a_sum_over_the_batch() -> None:
    _, model, x = set_up("NeuronIntegratedGradients", "mlp")
    stock = ca.NeuronIntegratedGradients(model, model.layer)
    call = {"neuron_selector": lambda hidden: hidden[:, 1].sum(), "n_steps": 3}
    adapter = differentiable(stock)
    assert_same_numbers(adapter.attribute(x, **call), stock.attribute(x.clone(), **call))
    check_differentiable(adapter, x, parameters=model.named_parameters(), **call)


_WITH_BASELINES = [
    name
    for name, row in ROWS.items()
    if name != "DataLoaderAttribution"
    and "baselines"
    in inspect.signature(row.make(set_up(name, row.models[0])[1]).attribute).parameters
]


@pytest.mark.parametrize("name", _WITH_BASELINES)
def test_baselines_that_do_not_fit_say_so(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].models[0])
    explainer, call = differentiable(row.make(model)), row.call(model)
    rows = r"rows of shape .* as in the inputs" if row.baselines else "one row, or rows like"
    wrong: list[tuple[Any, type[Exception], str]] = [
        ((x, x), ValueError, "one for each input, found 2"),
        (torch.zeros(2, 99), ValueError, rows),
        ([0.0], TypeError, "reference rows, found list" if row.baselines else "number, found list"),
    ]
    if row.baselines:
        wrong.append((lambda: [0.0], TypeError, "a tensor of reference rows, found list"))
        wrong.append((lambda x: x[:, :1], ValueError, rows))
    else:
        wrong.append((torch.zeros(7, *model.shape), ValueError, "ExpectedGradients, GradientShap"))
    for baselines, kind, match in wrong:
        with pytest.raises(kind, match=match):
            explainer.attribute(row.subject(x), **{**call, "baselines": baselines})


@pytest.mark.parametrize("name", [n for n in _WITH_BASELINES if ROWS[n].baselines])
def test_a_number_is_a_distribution_of_one_row(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].models[0])
    call = row.call(model)
    rows = torch.full_like(x[: 2 if "DeepLift" in name else 1], 0.5)  # fewer, Captum's refuses
    expected = seeded(row.make(model), x.clone(), {**call, "baselines": rows}, row)
    for baselines in (0.5, rows[:1]):
        found = seeded(differentiable(row.make(model)), x, {**call, "baselines": baselines}, row)
        assert_same_numbers(flat(found), tuple(t.detach() for t in flat(expected)))


# --- the options that Captum has ------------------------------------------------------------

_WITH_DELTA = [
    "IntegratedGradients",
    "DeepLift",
    "DeepLiftShap",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "GradientShap",
    "LayerConductance",
    "LayerGradientShap",
    "LayerIntegratedGradients",
    "LRP",
    "LayerLRP",
    "NoiseTunnel",
]


class Delta(Flat):
    """The convergence delta in the place of the attributions."""

    def attribute(self, inputs: Tensor, **call: Any) -> tuple[Tensor, ...]:
        return flat(self.explainer.attribute(inputs, return_convergence_delta=True, **call)[1])


@pytest.mark.parametrize("name", _WITH_DELTA)
def test_the_convergence_delta_has_its_graph(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].models[0])
    call = row.call(model)
    if "n_steps" in call:  # few enough for a gap that differences can be taken of
        call |= {"n_steps": 2, "method": "riemann_left"}
    stock = seeded(row.make(model), x.clone(), {**call, "return_convergence_delta": True}, row)
    adapter = differentiable(row.make(model))
    found = seeded(adapter, x, {**call, "return_convergence_delta": True}, row)
    assert_same_numbers(flat(found[1]), tuple(d.detach() for d in flat(stock[1])), 1e-8)
    if "DeepLift" in name:  # whose attributions are complete on these networks
        gradients = parameter_gradients(flat(found[1]), list(model.parameters()))
        assert all(d.requires_grad for d in flat(found[1]))
        assert max(float(g.abs().max()) for g in gradients) < 1e-12
    else:
        check_differentiable(Delta(adapter, row), x, parameters=model.named_parameters(), **call)


@pytest.mark.parametrize(
    "name",
    ["LayerGradientXActivation", "LayerGradCam", "LayerIntegratedGradients", "LayerDeepLift"],
)
def test_grad_kwargs_are_honoured_or_refused(name: str) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aside = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return torch.tanh(self.main(x))

    model, x = Aside(), torch.randn(3, 4)
    stock = getattr(ca, name)(model, model.aside)
    call = {"target": 1, "grad_kwargs": {"allow_unused": True, "materialize_grads": True}}
    expected = stock.attribute(x, **call)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found tanh")
        assert_same_numbers(differentiable(stock).attribute(x, **call), expected.detach())
        batched = {"grad_kwargs": {"is_grads_batched": True, "grad_outputs": torch.ones(2, 3)}}
        with pytest.raises(NotDifferentiableError, match="is_grads_batched=True"):
            differentiable(stock).attribute(x, target=1, **batched)


# --- one check for instances and classes ----------------------------------------------------


class OwnRidge(SkLearnRidge):
    pass


class OwnSaliency(ca.Saliency):
    pass


def own_gradient(explainer: Any) -> Any:
    explainer.gradient_func = lambda *args, **options: ()
    return explainer


MISUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "own linear model": (lambda of, m: of("Lime")(m, interpretable_model=OwnRidge()), "OwnRidge"),
    "SGD": (lambda of, m: of("Lime")(m, interpretable_model=SGDLasso()), "SGDLasso"),
    "option of the lasso": (
        lambda of, m: of("Lime")(m, interpretable_model=SkLearnLasso(positive=True)),
        "positive",
    ),
    "kernel": (
        lambda of, m: with_model(of("KernelShap")(m), OwnRidge()),
        "OwnRidge",
    ),
    "own method in a tunnel": (
        lambda of, m: of("NoiseTunnel")(OwnSaliency(m)),
        "found OwnSaliency",
    ),
    "own gradient in a tunnel": (
        lambda of, m: of("NoiseTunnel")(own_gradient(ca.Saliency(m))),
        "gradient_func",
    ),
    **{
        f"gradient_func of {name}": (
            lambda of, m, name=name: own_gradient(of(name)(m)),
            "gradient_func",
        )
        for name in ("Saliency", "IntegratedGradients", "GuidedBackprop", "DeepLift", "LRP")
    },
}


def with_model(explainer: Any, model: Any) -> Any:
    explainer.interpretable_model = model
    return explainer


@pytest.mark.parametrize("case", MISUSED)
def test_an_instance_and_a_class_are_checked_alike(case: str) -> None:
    make, match = MISUSED[case]
    _, model, x = set_up("Saliency", "mlp")
    with pytest.raises(NotDifferentiableError, match=match):
        differentiable(make(lambda name: getattr(ca, name), model))
    by_class = make(lambda name: differentiable(getattr(ca, name)), model)
    with pytest.raises(NotDifferentiableError, match=match):
        by_class.attribute(x, target=1)


# --- where Captum's number is incomplete -----------------------------------------------------


class Twice(nn.Module):
    """One layer, run two times."""

    shape, neuron, window = (4,), (1,), (2,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.first(self.layer(self.first(x)))))


_LAYERED = [n for n in ROWS if n.startswith(("Layer", "Neuron", "InternalI")) and "LRP" not in n]


@pytest.mark.parametrize("name", _LAYERED)
def test_a_layer_that_runs_twice_is_warned_about_once(name: str) -> None:
    if name.startswith("LayerFeaturePermutation"):
        row = Row(lambda m: ca.LayerFeaturePermutation(m, m.layer))
    else:
        row = ROWS[name]
    for recording in (True, False):
        model, x = Twice(), torch.randn(3, 4)
        explainer, call = differentiable(row.make(model)), row.call(model)
        with warnings.catch_warnings(record=True) as seen, torch.set_grad_enabled(recording):
            warnings.simplefilter("always")
            for _ in range(2):
                # DeepLIFT may go on to refuse it, as Captum does.
                with suppress(RuntimeError):
                    explainer.attribute(x, **call)
        said = [str(w.message) for w in seen if "runs again" in str(w.message)]
        assert len(said) == 1
        assert re.search(r"layer \(Sigmoid\) runs again.*IntegratedGradients", said[0])


@pytest.mark.parametrize("name", ["LRP", "LayerLRP"])
def test_relevance_refuses_a_layer_that_runs_twice(name: str) -> None:
    model = Twice()
    explainer = ca.LRP(model) if name == "LRP" else ca.LayerLRP(model, model.head)
    model.layer = nn.Tanh()
    with pytest.raises(RuntimeError, match="more than once"):
        differentiable(explainer).attribute(torch.randn(3, 4), target=1)


class Functional(nn.Module):
    """Activations that are functions, or modules that the method has no rule for."""

    shape, neuron = (4,), (1,)

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.bend, self.last = bend, nn.Tanh()

    @property
    def layer(self) -> nn.Module:
        return self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.second(self.bend(self.first(x)))))


_RULED = [n for n in ROWS if any(word in n for word in ("DeepLift", "Guided", "Deconv"))]
_RULED = [n for n in _RULED if not n.startswith("NoiseTunnel") and n != "GuidedGradCam"]


@pytest.mark.parametrize("bend", ["relu", "torch.relu", "method", "in place"])
@pytest.mark.parametrize("name", _RULED)
def test_activations_without_a_rule_are_warned_about_once(name: str, bend: str) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "torch.relu": torch.relu,
        "method": lambda h: h.relu(),
        "in place": lambda h: F.relu_(h.clone()),
    }
    row, model, x = ROWS[name], Functional(functions[bend]), torch.randn(3, 4)
    explainer, call = differentiable(row.make(model)), row.call(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found, _ = (explainer.attribute(x, **call) for _ in range(2))
    said = [str(w.message) for w in seen if "with a rule" in str(w.message)]
    assert len(said) == 1
    assert re.search("found relu_? in Functional.*IntegratedGradients", said[0])
    assert_same_numbers(found, row.make(model).attribute(x.clone(), **call).detach())


def test_modules_without_a_rule_are_named_and_others_are_not() -> None:
    x = torch.randn(3, 4)
    gelu = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match=r"DeepLift: .*found gelu in 1 \(GELU\)"):
        differentiable(ca.DeepLift(gelu)).attribute(x, target=1)
    ruled = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Sigmoid(), nn.Softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Setting forward, backward hooks")
        differentiable(ca.DeepLift(ruled)).attribute(x, target=1)
    softplus = Functional(F.softplus)
    with pytest.warns(UserWarning, match="LRP: .*found softplus in Functional"):
        differentiable(ca.LRP(softplus)).attribute(x, target=1)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


def padded() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    return Padded().eval(), torch.randn(2, 5, 8), {"additional_forward_args": padding, "target": 0}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", ["double_backprop", "recompute", "finite_difference"])
def test_deltas_of_encoders_with_a_padding_mask_are_of_what_is_trained(way: Any) -> None:
    model, x, call = padded()
    explainer, origin = ExpectedGradients(model, differentiation=way), torch.zeros(1, 5, 8)
    found, delta = explainer.attribute(x, origin, return_convergence_delta=True, **call)
    gap = model(x, call["additional_forward_args"]) - model(0 * x, call["additional_forward_args"])
    missing = found.sum((1, 2)) - gap[:, 0]
    assert_same_numbers(delta.reshape(2, -1).mean(1), missing.detach(), 1e-10)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_with_a_padding_mask_are_explained_as_they_are_trained() -> None:
    """Without gradients torch runs another path, which computes another function there."""
    model, x, call = padded()
    call["feature_mask"] = torch.arange(5).reshape(1, 5, 1)
    adapter = differentiable(ca.FeatureAblation(model))
    trained = adapter.attribute(x, **call)
    with torch.no_grad():
        evaluated = adapter.attribute(x, **call)
        fast = ca.FeatureAblation(model).attribute(x, **call)
    assert_same_numbers(evaluated, trained.detach())
    assert float((fast - trained).detach().abs().max()) > 1e-3
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("way", ["double_backprop", "recompute"])
def test_grad_cam_trains_by_both_exact_ways(way: Any) -> None:
    row, model, x = set_up("LayerGradCam", "cnn")
    call = {**row.call(model), "relu_attributions": True}
    explainer = differentiable(row.make(model), differentiation=way)
    check_differentiable(explainer, x, parameters=model.named_parameters(), **call)
    value = explainer.attribute(x, **call)
    assert any(float(g.abs().max()) > 0 for g in parameter_gradients(value, [*model.parameters()]))
