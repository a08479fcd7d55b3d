"""Every admitted Captum class: stock values, certificate, no trace; one row each."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_priors import AttributionPrior, NotDifferentiableError, StabilityPrior, differentiable
from captum_priors.adapters._mode_adapters import NAMES
from captum_priors.distances import mse
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.asserts import (
    as_tuple,
    assert_same_numbers,
    assert_same_state,
    leaves_no_trace,
    parameter_gradients,
    relative_error,
    state_of,
)
from tests.cases import EXACT


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(4, 6), activation
        self.second, self.last, self.head = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.second(self.act(self.first(x)))))

    @property
    def layer(self) -> nn.Module:
        return self.act

    neuron = (4,)
    window = (2,)
    shape = (4,)


class Cnn(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.pool = nn.Conv2d(1, 2, 3), activation, nn.MaxPool2d(2)
        self.second, self.last, self.head = nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.pool(self.act(self.first(x))))
        return self.head(self.last(hidden).flatten(1))

    @property
    def layer(self) -> nn.Module:
        return self.first

    neuron = (1, 2, 2)
    window = (1, 3, 3)
    shape = (1, 8, 8)


class Recurrent(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(3, 4), activation
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.act(self.first(x)))[0][:, -1])

    @property
    def layer(self) -> nn.Module:
        return self.act

    neuron = (1, 2)
    window = (2, 3)
    shape = (4, 3)


MODELS: dict[str, Callable[[], Any]] = {
    "mlp": lambda: Mlp(nn.Softplus()),
    "relu-mlp": lambda: Mlp(nn.ReLU()),
    "cnn": lambda: Cnn(nn.Softplus()),
    "relu-cnn": lambda: Cnn(nn.ReLU()),
    "sequence": lambda: Recurrent(nn.Tanh()),
}


@dataclass(frozen=True)
class Row:
    """How to make and call one class."""

    make: Callable[[Any], Any]
    options: dict[str, Any] = field(default_factory=dict)
    baselines: bool = False
    neuron: bool = False
    window: bool = False
    target: bool = True
    single_precision: bool = False
    only: str = ""

    def call(self, model: Any) -> dict[str, Any]:
        call = dict(self.options)
        if self.target:
            call["target"] = 1
        if self.baselines:
            generator = torch.Generator().manual_seed(5)
            call["baselines"] = torch.randn(5, *model.shape, generator=generator)
        if self.neuron:
            call["neuron_selector"] = model.neuron
        if self.window:
            call["sliding_window_shapes"] = model.window
        return call


def plain(name: str, **options: Any) -> Row:
    return Row(lambda m: getattr(ca, name)(m), **options)


def layered(name: str, **options: Any) -> Row:
    return Row(lambda m: getattr(ca, name)(m, m.layer), **options)


ROWS: dict[str, Row] = {
    "Saliency": plain("Saliency"),
    "InputXGradient": plain("InputXGradient"),
    "IntegratedGradients": plain("IntegratedGradients", options={"n_steps": 4}),
    "Deconvolution": plain("Deconvolution"),
    "DeepLift": plain("DeepLift"),
    "DeepLiftShap": plain("DeepLiftShap", baselines=True),
    "LayerDeepLift": layered("LayerDeepLift"),
    "LayerDeepLiftShap": layered("LayerDeepLiftShap", baselines=True),
    "NeuronDeepLift": layered("NeuronDeepLift", neuron=True, target=False),
    "NeuronDeepLiftShap": layered("NeuronDeepLiftShap", baselines=True, neuron=True, target=False),
    "GuidedBackprop": plain("GuidedBackprop"),
    "GuidedGradCam": layered("GuidedGradCam", only="cnn"),
    "GradientShap": plain("GradientShap", options={"n_samples": 3}, baselines=True),
    "FeatureAblation": plain("FeatureAblation", options={"perturbations_per_eval": 2}),
    "FeaturePermutation": plain("FeaturePermutation"),
    "Occlusion": plain("Occlusion", window=True, single_precision=True),
    "ShapleyValueSampling": plain(
        "ShapleyValueSampling", options={"n_samples": 2}, single_precision=True
    ),
    "ShapleyValues": plain("ShapleyValues", single_precision=True, only="mlp"),
    "NoiseTunnel": Row(
        lambda m: ca.NoiseTunnel(ca.IntegratedGradients(m)),
        {"nt_samples": 3, "nt_type": "vargrad", "n_steps": 3},
    ),
    "NoiseTunnel-adapter": Row(
        lambda m: ca.NoiseTunnel(differentiable(ca.Saliency(m))), {"nt_samples": 3}
    ),
    "NoiseTunnel-GuidedBackprop": Row(
        lambda m: ca.NoiseTunnel(ca.GuidedBackprop(m)), {"nt_samples": 3}
    ),
    "InternalInfluence": layered("InternalInfluence", options={"n_steps": 4}),
    "LayerActivation": layered("LayerActivation", target=False),
    "LayerConductance": layered(
        "LayerConductance", options={"n_steps": 4, "internal_batch_size": 9}
    ),
    "LayerFeatureAblation": layered("LayerFeatureAblation"),
    "LayerGradCam": layered("LayerGradCam"),
    "LayerGradientShap": layered("LayerGradientShap", options={"n_samples": 2}, baselines=True),
    "LayerGradientXActivation": layered("LayerGradientXActivation"),
    "LayerIntegratedGradients": layered(
        "LayerIntegratedGradients", options={"n_steps": 4, "internal_batch_size": 6}
    ),
    "NeuronConductance": layered("NeuronConductance", options={"n_steps": 4}, neuron=True),
    "NeuronDeconvolution": layered("NeuronDeconvolution", neuron=True, target=False),
    "NeuronFeatureAblation": layered("NeuronFeatureAblation", neuron=True, target=False),
    "NeuronGradient": layered("NeuronGradient", neuron=True, target=False),
    "NeuronGradientShap": layered(
        "NeuronGradientShap",
        options={"n_samples": 2},
        baselines=True,
        neuron=True,
        target=False,
    ),
    "NeuronGuidedBackprop": layered("NeuronGuidedBackprop", neuron=True, target=False),
    "NeuronIntegratedGradients": layered(
        "NeuronIntegratedGradients", options={"n_steps": 4}, neuron=True, target=False
    ),
}
PAIRS = [
    pytest.param(name, model, id=f"{name}-{model}")
    for name, row in ROWS.items()
    for model in MODELS
    if row.only in model
]
every_pair = pytest.mark.parametrize(("name", "model_name"), PAIRS)
every_row = pytest.mark.parametrize("name", ROWS)


def set_up(name: str, model_name: str) -> tuple[Row, Any, Tensor]:
    torch.manual_seed(1)
    model = MODELS[model_name]()
    return ROWS[name], model, torch.randn(3, *model.shape)


def seeded(explainer: Any, x: Tensor, call: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002  # the generator that Captum draws from
    return explainer.attribute(x, **call)


class _InDouble(TorchFunctionMode):
    """Captum accumulates some attributions in float32, where no difference quotient is exact."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs) if func is not Tensor.float else args[0].double()


@contextmanager
def in_double(needed: bool) -> Iterator[None]:
    if not needed:
        yield
        return
    with _InDouble():
        yield


@every_pair
@pytest.mark.parametrize("way", EXACT)
def test_stock_values_under_one_seed(name: str, model_name: str, way: str) -> None:
    row, model, x = set_up(name, model_name)
    stock, call = row.make(model), row.call(model)
    expected = seeded(stock, x.clone(), call)
    found = seeded(differentiable(stock, differentiation=way), x, call)
    assert_same_numbers(found, expected)


@every_pair
@pytest.mark.parametrize("way", EXACT)
def test_certificate(name: str, model_name: str, way: str) -> None:
    row, model, x = set_up(name, model_name)
    explainer = differentiable(row.make(model), differentiation=way)
    with in_double(row.single_precision):
        check_differentiable(explainer, x, **row.call(model))


def state(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Everything but the random numbers, which a bare call draws as Captum does."""
    everything = state_of(model, tensors=[x])
    return {k: v for k, v in everything.items() if k not in ("torch", "numpy", "python")}


@every_pair
def test_leaves_no_trace_with_a_loss_built_on_it(name: str, model_name: str) -> None:
    row, model, x = set_up(name, model_name)
    explainer, call = differentiable(row.make(model)), row.call(model)
    before = state(model, x)
    value = explainer.attribute(x, **call)
    parameter_gradients(value, list(model.parameters()))
    assert_same_state(before, state(model, x))


@every_row
def test_model_that_raises(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].only or "cnn")
    explainer, call = differentiable(row.make(model)), row.call(model)
    broken = model.first if name.startswith(("LayerActivation", "Neuron")) else model.head
    broken.forward = lambda h: h @ torch.zeros(99, 1)
    before = state(model, x)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        explainer.attribute(x, **call)
    assert_same_state(before, state(model, x))


@every_row
def test_without_gradients_it_is_stock(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].only or "cnn")
    stock, call = row.make(model), row.call(model)
    explainer = differentiable(stock)
    expected = seeded(stock, x.clone(), call)
    with torch.no_grad():
        found = seeded(explainer, x, call)
    assert_same_numbers(found, expected)
    assert not any(t.requires_grad for t in as_tuple(found)) or row.target is False


@every_row
def test_in_priors(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].only or "cnn")
    call = row.call(model)
    target = call.pop("target", None)
    model.train()
    explainer = row.make(model)

    def shift(inputs: Tensor) -> Tensor:
        return inputs + 0.01

    prior = AttributionPrior(explainer, l2, **call)
    stability = StabilityPrior(explainer, mse, shift, **call)
    with leaves_no_trace(model, tensors=[x]):
        value = prior(x, target=target)
        gradients = parameter_gradients(value, list(model.parameters()))
        assert float(stability(x, target=target).detach()) >= 0
    assert any(float(g.abs().max()) > 0 for g in gradients)
    if name != "FeaturePermutation":  # permuting one example changes nothing
        assert float(prior(x[:1], target=target).detach()) > 0  # a last partial batch


@pytest.mark.parametrize("name", ["GuidedBackprop", "LayerConductance", "FeatureAblation"])
def test_pickles_and_is_an_instance(name: str) -> None:
    row, model, x = set_up(name, "mlp")
    explainer = differentiable(row.make(model))
    assert isinstance(explainer, getattr(ca, name))
    twin = pickle.loads(pickle.dumps(explainer))
    assert_same_numbers(
        twin.attribute(x, **row.call(model)), explainer.attribute(x, **row.call(model))
    )


def test_every_name_has_a_row() -> None:
    assert set(NAMES) | {"Saliency", "InputXGradient", "IntegratedGradients"} <= set(ROWS)


def test_finite_difference_is_refused_where_it_means_nothing() -> None:
    _, model, _ = set_up("GuidedBackprop", "mlp")
    with pytest.raises(NotDifferentiableError, match="'double_backprop' or 'recompute'"):
        differentiable(ca.GuidedBackprop(model), differentiation="finite_difference")
    with pytest.raises(NotDifferentiableError, match="'double_backprop' or 'recompute'"):
        differentiable(
            differentiable(ca.FeatureAblation(model)), differentiation="finite_difference"
        )


def test_noise_tunnel_around_a_refused_method_is_refused() -> None:
    _, model, _ = set_up("Saliency", "mlp")
    with pytest.raises(NotDifferentiableError, match="found LRP"):
        differentiable(ca.NoiseTunnel(ca.LRP(model)))


def test_perturbation_methods_need_no_second_derivative() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x).unsqueeze(1).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))

    model, x = Attention(), torch.randn(2, 3, 8)
    explainer = differentiable(ca.FeatureAblation(model))
    mask = torch.arange(3).reshape(1, 3, 1).expand(1, 3, 8)
    check_differentiable(explainer, x, target=0, feature_mask=mask)
    with pytest.raises(NotDifferentiableError, match="scaled_dot_product"):
        differentiable(ca.LayerGradCam(model, model.mix)).attribute(x, target=0)


def test_a_model_s_own_detach_and_no_grad_keep_their_meaning() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.cut, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = torch.sigmoid(self.cut(x))
            return self.head(torch.tanh(self.kept(x)) * gate * self.kept(x).detach())

    model, x = Partly(), torch.randn(3, 4)
    explainer = differentiable(ca.FeatureAblation(model))
    value = explainer.attribute(x)
    found = torch.autograd.grad(
        value.square().sum(), [model.cut.weight, model.kept.weight], allow_unused=True
    )
    assert found[0] is None
    assert float(found[1].abs().max()) > 0


@every_row
def test_many_steps_leave_nothing_behind(name: str) -> None:
    """As many tensors are alive after thirty steps as after twenty."""
    row, model, x = set_up(name, ROWS[name].only or "relu-mlp")
    explainer, call = differentiable(row.make(model)), row.call(model)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(3):
        for _ in range(10):
            value = explainer.attribute(x, **call)
            torch.stack([v.square().sum() for v in as_tuple(value)]).sum().backward()
        del value
        counts.append(alive())
    assert counts[2] <= counts[1]


def test_threads_do_not_see_each_other() -> None:
    """The mode is the thread's own: a stock call beside an adapter stays without a graph."""
    _, model, x = set_up("FeatureAblation", "mlp")
    stock = ca.FeatureAblation(model)
    expected = stock.attribute(x, target=1)
    seen: list[bool] = []
    stop = threading.Event()

    def beside() -> None:
        while not stop.is_set():
            found = stock.attribute(x, target=1)
            seen.append(bool(torch.equal(found, expected)) and not found.requires_grad)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        for _ in range(20):
            value = differentiable(stock).attribute(x, target=1)
            assert value.requires_grad
            assert_same_numbers(value, expected)
    finally:
        stop.set()
        thread.join()
    assert seen
    assert all(seen)


def test_gradients_agree_between_recompute_and_double_backprop() -> None:
    row, model, x = set_up("GradientShap", "cnn")
    found = []
    for way in EXACT:
        value = seeded(differentiable(row.make(model), differentiation=way), x, row.call(model))
        found.append(parameter_gradients(value, list(model.parameters())))
    assert relative_error(found[1], found[0]) < 1e-12  # sums in another order


def test_deep_lift_where_nothing_differs() -> None:
    """Features at their baseline and dead units: 0/0 in a branch that is thrown away."""
    row, model, x = set_up("DeepLift", "relu-mlp")
    with torch.no_grad():
        model.first.bias[0] = -100.0  # never active
    x[:, 1] = 0.0  # the baseline
    x[0] = 0.0
    explainer = differentiable(row.make(model))
    value = explainer.attribute(x, target=1)
    gradients = parameter_gradients(value, list(model.parameters()))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    check_differentiable(explainer, x, target=1)
    with pytest.raises(NotDifferentiableError, match="larger eps"):
        differentiable(ca.DeepLift(model, eps=1e-20))


def test_what_a_model_builds_when_it_first_runs_stays() -> None:
    class Lazily(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.built = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.built:
                self.late, self.built, self.seen = nn.Linear(4, 3), True, 1
            return torch.tanh(self.late(x))

    model = Lazily()
    differentiable(ca.FeatureAblation(model)).attribute(torch.randn(2, 4), target=1)
    assert model.built
    assert model.seen == 1
    assert isinstance(model.late, nn.Linear)


def test_a_decorated_forward_function_stays_without_gradients() -> None:
    _, model, x = set_up("FeatureAblation", "mlp")

    @torch.no_grad()
    def teacher(inputs: Tensor) -> Tensor:
        return model(inputs)

    assert not differentiable(ca.FeatureAblation(teacher)).attribute(x, target=1).requires_grad


def test_nothing_is_left_on_the_modules() -> None:
    """Stock LayerDeepLift leaves activations on the modules, which then cannot be copied."""
    row, model, x = set_up("LayerDeepLift", "mlp")
    differentiable(row.make(model)).attribute(x, target=1)
    copy.deepcopy(model)
