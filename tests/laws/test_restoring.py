"""Only what was changed is put back: what a model, a user or another thread owns stays theirs."""

import threading
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import shap
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    NotDifferentiableError,
    StabilityPrior,
    differentiable,
)
from captum_priors.attacks import TopKAttack
from captum_priors.distances import mse
from captum_priors.metrics import local_lipschitz
from captum_priors.penalties import l2
from tests.adapters.captum_table import set_up
from tests.laws.leaves import (
    CAPTUM,
    FEATURES,
    Around,
    Leaf,
    background,
    every_leaf,
    every_leaf_and_way,
    net,
    way_options,
)

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_always_called",
)


class SetsItselfUp(Around):
    """A model that doubles a layer's outputs by a hook, and notes that it ran, at its first run."""

    def __init__(self, inner: Any, layer: nn.Module) -> None:
        super().__init__(inner)
        self.hooked = [layer]

    def forward(self, *args: Any, **named: Any) -> Any:
        layer = self.hooked[0]
        if not hasattr(layer, "ran"):
            layer.ran = torch.zeros(2)
            layer.register_forward_hook(lambda _, args, output: output * 2)
        return self.inner(*args, **named)


def kept(layer: Any) -> bool:
    """Whether what the model set up is there, once, and nothing besides."""
    return len(layer._forward_hooks) == 1 and hasattr(layer, "ran")


@every_leaf
def test_what_a_model_sets_up_stays_after_a_prior(leaf: Leaf) -> None:
    inner, x = leaf.model(), leaf.batch()
    prior = leaf.make(SetsItselfUp(inner, inner[0]))
    prior(x, **leaf.call(x)).backward()
    assert kept(inner[0])


@pytest.mark.parametrize("name", ["GradientExplainer", "DeepExplainer"])
def test_what_a_model_sets_up_stays_after_an_adapter_of_shap(name: str) -> None:
    inner = net()
    model = SetsItselfUp(inner, inner[0])
    explainer = getattr(shap, name)(model, background())
    for bare in (inner[0], model):  # the model ran when SHAP's object was made
        assert len(bare._forward_hooks) <= 1
    differentiable(explainer).attribute(torch.randn(3, FEATURES), target=0)
    assert kept(inner[0])


def test_what_a_model_sets_up_stays_after_attacks_and_metrics() -> None:
    for ask in (
        lambda m: TopKAttack(ca.Saliency(m), 2, radius=0.1, step_num=1).perturb(
            torch.ones(2, 5), 0
        ),
        lambda m: local_lipschitz(ca.DeepLift(m), torch.ones(2, 5), radius=0.1, target=0),
    ):
        inner = net()
        ask(SetsItselfUp(inner, inner[0]))
        assert kept(inner[0])


class Counts(nn.Module):
    """Counts its runs in evaluation mode, too, as observers of quantisation do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("anew", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.anew = self.anew + 1
        return x


@every_leaf_and_way
def test_buffers_that_a_model_moves_in_evaluation_mode(leaf: Leaf, way: str) -> None:
    model, x = leaf.model().append(Counts()), leaf.batch()  # type: ignore[operator]  # Sequential's
    before = dict(model.named_buffers())
    leaf.make(model, **way_options(leaf, way))(x, **leaf.call(x)).backward()
    for name, buffer in model.named_buffers():
        assert buffer is before[name], name
        assert int(buffer) == 0, name


BESIDE: dict[str, Callable[[Any, Any], Any]] = {
    "perturbation": lambda f, other: StabilityPrior(ca.Saliency(f), mse, other),
    "baselines": lambda f, other: AttributionPrior(ExpectedGradients(f), l2, baselines=other),
    "baselines of Captum's": lambda f, other: AttributionPrior(
        ca.GradientShap(f), l2, baselines=other
    ),
}
every_beside = pytest.mark.parametrize("beside", BESIDE)
hidden = pytest.mark.parametrize("hidden", [False, True])


@every_beside
@hidden
def test_models_of_users_functions_are_held(beside: str, hidden: bool) -> None:
    model, x = net(), torch.randn(4, FEATURES)
    other = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(), Counts())
    explained = (lambda z: model(z)) if hidden else model
    prior = BESIDE[beside](explained, lambda z: other(z).detach()).eval()
    value = prior(x, target=0)
    other.eval()
    assert torch.equal(value, prior(x, target=0))
    assert int(other[2].in_place) == 0
    other.append(nn.BatchNorm1d(FEATURES)).train()
    with pytest.raises(NotDifferentiableError, match="BatchNorm1d in train mode"):
        prior(x, target=0)
    assert int(other[3].num_batches_tracked) == 0


@hidden
def test_noise_of_perturbations_is_on(hidden: bool) -> None:
    """A module without parameters is no model."""
    model, x = net(), torch.randn(4, FEATURES)
    explained = (lambda z: model(z)) if hidden else model
    prior = BESIDE["perturbation"](explained, nn.Dropout())
    assert prior(x, target=0).item() > 0


def hooks_of(model: nn.Module) -> list[Any]:
    return [list(getattr(m, kind)) for m in model.modules() for kind in HOOKS]


@pytest.mark.filterwarnings("ignore:You are providing multiple inputs for Lime")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
@pytest.mark.parametrize("name", CAPTUM)
def test_hooks_stay_after_an_adapter(name: str) -> None:
    """Those of users, and those that the model sets up at its first run."""
    row, inner, x = set_up(name, CAPTUM[name].model)
    seen: list[str] = []
    for module in inner.modules():
        if not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda *_: seen.append("before"))
            module.register_forward_hook(lambda *_: seen.append("after"))
    inner.register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    before = hooks_of(inner)
    stock = getattr(inner, "head" if name == "LLMGradientAttribution" else "second", inner.head)
    model = SetsItselfUp(inner, stock)
    row.tensors(differentiable(row.make(model)).attribute(row.subject(x), **row.call(inner)))
    assert hasattr(stock, "ran")
    stock._forward_hooks.popitem()  # the last one is the model's own
    assert hooks_of(inner) == before
    seen.clear()
    inner(torch.zeros(1, *inner.shape, dtype=torch.long) if "LLM" in name else x)
    assert seen.count("always") == 1
    assert seen.count("before") == seen.count("after") >= 3


def in_between(work: Callable[[], Any], prior_of: Callable[[nn.Module], Any]) -> Any:
    """Run some work in another thread while the model of a prior is being explained here."""
    result: list[Any] = []

    class Waits(Around):
        def forward(self, x: Tensor) -> Tensor:
            if not result:
                thread = threading.Thread(target=lambda: result.append(caught(work)))
                thread.start()
                thread.join(20)
                assert result, "the other thread waits for this one"
            return self.inner(x)

    prior_of(Waits(net()))(torch.randn(4, FEATURES), target=0).backward()
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def caught(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # to be raised where it is seen
        return error


PRIORS: dict[str, Callable[[nn.Module], Any]] = {
    "double_backprop": lambda m: AttributionPrior(
        ExpectedGradients(m), l2, baselines=background(), smooth=3.0
    ),
    "function": lambda m: AttributionPrior(
        ExpectedGradients(lambda z: m(z)), l2, baselines=background(), smooth=3.0
    ),
    "recompute": lambda m: AttributionPrior(
        ExpectedGradients(m, differentiation="recompute"), l2, baselines=background(), smooth=3.0
    ),
    "DeepLift": lambda m: AttributionPrior(ca.DeepLift(m), l2, smooth=3.0),
    "LRP": lambda m: AttributionPrior(ca.GuidedBackprop(m), l2, smooth=3.0),
}
every_prior = pytest.mark.parametrize("prior_of", PRIORS.values(), ids=PRIORS.keys())


@every_prior
def test_another_threads_model_is_as_it_was(prior_of: Any) -> None:
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4)), torch.randn(8, 5)
    own = torch.Generator().manual_seed(3)

    def work() -> tuple[Tensor, ...]:
        y = model(x)
        (slope,) = torch.autograd.grad(y[:, 0].sum(), model[0].weight, create_graph=True)
        return y.detach(), slope.detach(), torch.randn(3, generator=own)

    expected = work()
    own.manual_seed(3)
    model[2].reset_running_stats()
    found = in_between(work, prior_of)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert all(m.training for m in model.modules())
    assert int(model[2].num_batches_tracked) == 1
    assert not any(hooks for hooks in hooks_of(model))


@every_prior
def test_another_threads_wrapped_model_trains(prior_of: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net())

        def work() -> bool:
            wrapped(torch.randn(4, FEATURES)).sum().backward()
            return all(p.grad is not None for p in wrapped.parameters())

        assert in_between(work, prior_of)
    finally:
        dist.destroy_process_group()
