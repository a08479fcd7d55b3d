"""Every admitted Captum class: stock values, certificate, no trace; one row each."""

import copy
import gc
import inspect
import pickle
import threading
from pathlib import Path
from typing import Any

import captum.attr as ca
import pytest
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    CaptumAdapter,
    NotDifferentiableError,
    StabilityPrior,
    differentiable,
)
from captum_priors.adapters.captum import ADAPTERS, REFUSED
from captum_priors.distances import mse
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import (
    ROWS,
    Flat,
    every_pair,
    every_row,
    flat,
    in_double,
    seeded,
    set_up,
    ways,
)
from tests.adapters.relevance_networks import Attention
from tests.asserts import (
    assert_same_numbers,
    assert_same_state,
    leaves_no_trace,
    new_objects,
    parameter_gradients,
    resident,
    state_of,
)

pytestmark = pytest.mark.filterwarnings(
    # Captum's advice about speed.
    "ignore:You are providing multiple inputs for Lime / Kernel SHAP",
    # Where the lasso is asked for more than float64 holds; the certificate says if it was enough.
    "ignore:Objective did not converge",
    # DeepLIFT over a recurrent layer: differentiated as it is.
    "ignore:.*found lstm in",
)


@every_pair
def test_stock_values_under_one_seed(name: str, model_name: str) -> None:
    row, model, x = set_up(name, model_name)
    stock, call = row.make(model), row.call(model)
    found = [
        seeded(differentiable(stock, differentiation=way), x, call, row) for way in ways(row, model)
    ]
    expected = seeded(stock, x.clone(), call, row)  # the last: stock LRP takes rules away
    for each in found:
        assert_same_numbers(flat(each), flat(expected))


@every_pair
def test_certificate(name: str, model_name: str) -> None:
    row, model, x = set_up(name, model_name)
    for way in ways(row, model):
        explainer = Flat(differentiable(row.make(model), differentiation=way), row)
        # Modes are off within a backward pass, so recompute replays in Captum's float32: 1e-7,
        # times the condition of the surrogate's fit.
        single = row.single_precision and way == "recompute"
        with in_double(needed=row.single_precision):
            check_differentiable(
                explainer,
                x,
                parameters=model.named_parameters(),
                tolerance=1e-5 if single else 1e-6,
                **row.call(model),
            )


@every_row
def test_certificate_of_inputs(name: str) -> None:
    """Attacks and stability need the gradient to the inputs."""
    row, model, x = set_up(name, ROWS[name].models[0])
    explainer = Flat(differentiable(row.make(model)), row)
    x.requires_grad_()
    if row.input_gradients:
        with in_double(needed=row.single_precision):
            check_differentiable(explainer, x, parameters=[("x", x)], **row.call(model))
    elif name.startswith("Lime"):
        with pytest.raises(NotDifferentiableError, match="held fixed: detach"):
            explainer.attribute(x, **row.call(model))


def state(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Everything but the random numbers, which a bare call draws as Captum does."""
    everything = state_of(model, tensors=[x])
    return {k: v for k, v in everything.items() if k not in ("torch", "numpy", "python")}


@every_pair
def test_leaves_no_trace_with_a_loss_built_on_it(name: str, model_name: str) -> None:
    row, model, x = set_up(name, model_name)
    explainer, call = Flat(differentiable(row.make(model)), row), row.call(model)
    before = state(model, x)
    value = explainer.attribute(x, **call)
    parameter_gradients(value, list(model.parameters()))
    assert_same_state(before, state(model, x))
    copy.deepcopy(model)  # stock methods leave activations that cannot be copied


@every_row
def test_model_that_raises(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].model)
    explainer, call = Flat(differentiable(row.make(model)), row), row.call(model)
    broken = model.first if name.startswith(("LayerActivation", "Neuron")) else model.head
    broken.forward = lambda h: h @ torch.zeros(99, 1)
    before = state(model, x)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        explainer.attribute(x, **call)
    assert_same_state(before, state(model, x))


@every_row
def test_without_gradients_it_is_stock(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].model)
    stock, call = row.make(model), row.call(model)
    explainer, kept = differentiable(stock), dict(vars(stock))
    before = state(model, x)
    with torch.no_grad():
        found = flat(seeded(explainer, x, call, row))
    assert_same_state(before, state(model, x))
    assert vars(stock) == kept
    expected = flat(seeded(stock, x.clone(), call, row))
    assert_same_numbers(found, tuple(t.detach() for t in expected))
    assert not any(t.requires_grad for t in found)


@every_row
def test_in_priors(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].model)
    call = row.call(model)
    target = call.pop("target", None)
    model.train()
    explainer = row.make(model)

    def shift(inputs: Any) -> Any:
        return inputs + 0.01 if isinstance(inputs, Tensor) else inputs

    def size(attributions: Any) -> Tensor:
        return torch.stack([l2(a.flatten(1)).mean() for a in flat(attributions)]).sum()

    def change(attributions: Any, other: Any) -> Tensor:
        pairs = zip(flat(attributions), flat(other), strict=True)
        return torch.stack([mse(a, b).mean() for a, b in pairs]).sum()

    prior = AttributionPrior(explainer, size, **call)
    stability = StabilityPrior(explainer, change, shift, **call)
    with leaves_no_trace(model, tensors=[x]):
        value = prior(row.subject(x), target=target)
        gradients = parameter_gradients(value, list(model.parameters()))
        assert bool(stability(row.subject(x), target=target).isfinite())
    assert any(float(g.abs().max()) > 0 for g in gradients)
    if "FeaturePermutation" not in name:  # permuting one example changes nothing
        assert float(prior(row.subject(x[:1]), target=target).detach()) > 0  # a last partial batch


COPIED = ("Saliency", "IntegratedGradients", "GuidedBackprop", "LayerConductance")


@pytest.mark.parametrize("name", [*COPIED, "FeatureAblation", "LRP"])
def test_copies_and_signatures(name: str) -> None:
    """An instance of the stock class, whose ``attribute`` Captum finds where it composes."""
    row, model, x = set_up(name, ROWS[name].models[0])
    cls, stock, call = getattr(ca, name), row.make(model), row.call(model)
    adapter = differentiable(stock, differentiation="recompute")
    assert isinstance(adapter, cls)
    assert isinstance(adapter, CaptumAdapter)
    assert inspect.signature(adapter.attribute) == inspect.signature(stock.attribute)
    assert type(adapter).attribute.__wrapped__ is not cls.attribute.__wrapped__
    by_class = differentiable(cls)
    assert issubclass(by_class, cls)
    assert differentiable(by_class) is by_class
    expected = adapter.attribute(x, **call)
    twins = pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter), copy.copy(adapter)
    for twin in twins:
        assert twin.differentiation == "recompute"
        assert_same_numbers(twin.attribute(x, **call), expected)
    where = [model.layer] if name.startswith("Layer") else []
    assert_same_numbers(by_class(model, *where).attribute(x, **call), expected)


def test_the_table_is_complete() -> None:
    """Whatever Captum exports is admitted, with a row here, or refused with a reason."""
    exported = ((name, getattr(ca, name)) for name in ca.__all__)
    everything = {
        name: cls
        for name, cls in exported
        if isinstance(cls, type) and issubclass(cls, ca.Attribution)
    }
    admitted = {cls.__name__ for cls in ADAPTERS}
    refused = REFUSED.keys() & everything.keys()
    assert admitted | refused == everything.keys()
    assert {name.partition("-")[0] for name in ROWS} == admitted
    for name in refused:
        with pytest.raises(NotDifferentiableError, match=f"found {name}, .*[.] (Pass|Run) "):
            differentiable(everything[name])
        with pytest.raises(NotDifferentiableError, match=f"found {name},"):
            differentiable(everything[name].__new__(everything[name]))


@pytest.mark.parametrize("name", ["LRP-rules", "LayerLRP-rules"])
@pytest.mark.parametrize("recording", [False, True])
def test_relevance_between_forward_and_backward(name: str, recording: bool) -> None:
    """Captum's LRP gives weights new storage and copies values back: open graphs then fail."""
    row, model, x = set_up(name, "tanh-mlp")
    explainer, where = differentiable(row.make(model)), model.first.weight.data_ptr()
    loss = model(x).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    with torch.set_grad_enabled(recording):
        explainer.attribute(x, **row.call(model))
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, found, expected))
    assert model.first.weight.data_ptr() == where
    assert isinstance(model.first.rule, GammaRule)


def test_relevance_that_cannot_be_certified_is_refused() -> None:
    """Rules of the user's own, and functions that torch does not show to a mode."""
    row, model, x = set_up("LRP", "tanh-mlp")

    def halve(module: nn.Module) -> None:
        module.weight.data = module.weight.data / 2

    class Mine(EpsilonRule):
        def _manipulate_weights(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
            halve(module)

    explainer, call = differentiable(row.make(model)), row.call(model)
    model.first.rule = Mine()
    before = state(model, x)
    with pytest.raises(NotDifferentiableError, match="found Mine on a Linear"):
        explainer.attribute(x, **call)
    with pytest.raises(NotDifferentiableError, match="found Mine on a Linear"):
        differentiable(ca.NoiseTunnel(ca.LRP(model))).attribute(x, nt_samples=2, **call)
    with torch.no_grad():
        values = explainer.attribute(x, **call)
    assert_same_state(before, state(model, x))
    assert_same_numbers(values, ca.LRP(model).attribute(x, **call).detach())

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(h, weight)
            return h @ weight.T

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            h, weight = ctx.saved_tensors
            return gradient @ weight, gradient.T @ h

    model.first.rule = GammaRule()
    model.first.forward = lambda h: Product.apply(h, model.first.weight)
    with pytest.raises(NotDifferentiableError, match="ProductBackward"):
        explainer.attribute(x, **call)


def test_layer_permutation_selects_its_target_once() -> None:
    _, model, x = set_up("LayerFeaturePermutation", "mlp")
    target = torch.tensor([0, 2, 1])
    chosen = ca.LayerFeaturePermutation(lambda x: model(x).gather(1, rows(x)), model.layer)

    def rows(x: Tensor) -> Tensor:
        return target.repeat(x.shape[0] // 3).unsqueeze(1)

    for at_once in (1, 2):
        found = []
        for explainer, call in (
            (differentiable(ca.LayerFeaturePermutation(model, model.layer)), {"target": target}),
            (chosen, {}),
        ):
            torch.manual_seed(3)
            found.append(explainer.attribute(x, perturbations_per_eval=at_once, **call))
        assert_same_numbers(found[0].detach(), found[1])


def test_fused_attention_is_differentiated_by_every_kind_of_method() -> None:
    mixing = Attention(8, 1, fused=True)
    model, x = nn.Sequential(mixing, nn.Flatten(), nn.Linear(24, 2)), torch.randn(2, 3, 8)
    explainer = differentiable(ca.FeatureAblation(model))
    mask = torch.arange(3).reshape(1, 3, 1).expand(1, 3, 8)
    check_differentiable(explainer, x, target=0, feature_mask=mask)
    # Gradient methods do, and get it from another kernel of the same function.
    check_differentiable(differentiable(ca.LayerGradCam(model, mixing.qkv)), x, target=0)


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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_soak() -> None:
    """Training steps through priors on every class in turn."""
    loops = []
    for name, row in ROWS.items():
        _, model, x = set_up(name, row.models[0])
        call = row.call(model)
        target = call.pop("target", None)
        prior = AttributionPrior(row.make(model), first_l2, **call)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        loops.append((row, model, x, target, prior, optimizer))

    def train(steps: int) -> None:
        for step in range(steps):
            row, _, x, target, prior, optimizer = loops[step % len(loops)]
            optimizer.zero_grad()
            prior(row.subject(x), target=target).backward()
            optimizer.step()

    def hooks() -> int:
        modules = [m for _, model, *_ in loops for m in model.modules()]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(module, kind)) for module in modules for kind in kinds)

    train(len(loops))  # what is set up once is there
    with new_objects() as objects:

        def alive() -> int:
            gc.collect()
            return sum(issubclass(type(o), Tensor) for o in objects())

        train(500)
        before = (alive(), hooks(), resident())
        train(500)
        after = (alive(), hooks(), resident())
    assert after[0] <= before[0]
    assert after[1] == before[1] == 0
    # The allocator moves by a few megabytes; a graph kept at each step would be tens of them.
    assert after[2] - before[2] < 8e6


def first_l2(attributions: Any) -> Tensor:
    return l2(flat(attributions)[0].flatten(1))


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


@pytest.mark.parametrize("eps", [1e-10, 1e-14])
def test_deep_lift_where_nothing_differs(eps: float) -> None:
    """Features at their baseline and dead units: 0/0 in a branch that is thrown away."""
    _, model, x = set_up("DeepLift", "relu-mlp")
    with torch.no_grad():
        model.first.bias[0] = -100.0  # never active
    x[:, 1] = 0.0  # the baseline
    x[0] = 0.0
    explainer = differentiable(ca.DeepLift(model, eps=eps))
    value = explainer.attribute(x, target=1)
    gradients = parameter_gradients(value, list(model.parameters()))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    check_differentiable(explainer, x, target=1)


def test_a_decorated_forward_function_stays_without_gradients() -> None:
    _, model, x = set_up("FeatureAblation", "mlp")

    @torch.no_grad()
    def teacher(inputs: Tensor) -> Tensor:
        return model(inputs)

    found = differentiable(ca.FeatureAblation(teacher)).attribute(x, target=1)
    assert not found.requires_grad
    assert_same_numbers(found, ca.FeatureAblation(teacher).attribute(x, target=1))


def test_sample_weights_with_a_graph_are_refused() -> None:
    """Their derivative is not part of the Jacobian."""
    _, model, x = set_up("Lime", "mlp")

    def on_features(original: Tensor, perturbed: Tensor, _: Any, **__: Any) -> Tensor:
        return torch.exp(-(model.first(original) - model.first(perturbed)).square().sum())

    call = {"n_samples": 30, "target": 1}
    lime = ca.Lime(model, SkLearnRidge(alpha=0.1), similarity_func=on_features)
    with pytest.raises(NotDifferentiableError, match="that are constants"):
        differentiable(lime).attribute(x[:1], **call)
    learned = torch.randn(1, 4, requires_grad=True)
    kernel = ca.KernelShap(model)  # its weights count masks, whatever the baseline
    found = differentiable(kernel).attribute(x[:1], baselines=learned, **call)
    assert float(torch.autograd.grad(found.square().sum(), learned)[0].abs().max()) > 0
    assert kernel.interpretable_model.linear is None  # the user's explainer is not fitted
