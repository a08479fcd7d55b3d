"""A gradient that is made later is that of the value: by example, on the buffers of that time."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    NotDifferentiableError,
    differentiable,
)
from captum_priors.penalties import l2
from tests.laws.leaves import FEATURES, LEAVES_AND_WAYS, WAYS, background, net, way_options

TARGET = torch.arange(16) % 3


def slopes(value: Tensor, model: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(found, parameters, strict=True)
        ]
    )


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Gated(nn.Module):
    """A model that has a branch which its backward pass does not see, for some examples."""

    def __init__(self, affected: int, weight: float) -> None:
        super().__init__()
        self.seen, self.unseen = net(), net()
        self.affected, self.weight = affected, weight

    def forward(self, x: Tensor) -> Tensor:
        n = len(TARGET)
        gate = (torch.arange(len(x)) % n < self.affected).to(x.dtype).unsqueeze(1)
        return self.seen(x) + self.weight * gate * self.unseen(x.detach())


def saliency(model: nn.Module, way: str) -> AttributionPrior:
    return AttributionPrior(differentiable(ca.Saliency(model), differentiation=way), l2, abs=False)


@pytest.mark.parametrize(
    ("affected", "weight"), [(16, 0.5), (8, 1.0), (4, 1.0), (2, 2.0), (1, 4.0)]
)
def test_detached_branches_are_refused_by_example(affected: int, weight: float) -> None:
    """Also where they are in few examples, whose error is lost in the sum over all.

    One example of sixteen with a smaller share looks as a kink within the step does.
    """
    model, x = Gated(affected, weight), torch.randn(16, FEATURES)
    with pytest.raises(NotDifferentiableError, match="finite_difference"):
        saliency(model, "finite_difference")(x, target=TARGET).backward()


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


def test_whole_models_are_not_refused() -> None:
    """The check by example knows that a gradient may be orthogonal to what is asked of it."""
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = Gated(0, 0.0), torch.randn(16, FEATURES)
        exact, found = (
            slopes(saliency(model, way)(x, target=TARGET), model)
            for way in ("double_backprop", "finite_difference")
        )
        assert error(found, exact) < 5e-3  # truncation with a step of .2 %


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e308])
def test_overflow_comes_back_as_such(way: str, scale: float) -> None:
    """A loss scaler has to see it and skip the step: nothing raises inside ``backward``."""
    model, x = net(), torch.randn(16, FEATURES)
    for prior in (
        saliency(model, way),
        AttributionPrior(
            ExpectedGradients(model, differentiation=way), l2, baselines=background(), n_samples=2
        ),
    ):
        value = prior(x, target=TARGET)
        model.zero_grad()
        (value * scale * 1e9).backward()
        assert not all(
            bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None
        )


@pytest.mark.parametrize(
    ("leaf", "way"),
    [(leaf, way) for leaf, way in LEAVES_AND_WAYS if way != "double_backprop"],
    ids=lambda v: getattr(v, "name", v),
)
def test_overflow_in_every_prior(leaf: Any, way: str) -> None:
    model, x = leaf.model(), leaf.batch()
    value = leaf.make(model, **way_options(leaf, way))(x, **leaf.call(x))
    (value * float("inf")).backward()
    assert not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_models_and_inputs_give_nan(way: str, bad: float) -> None:
    for broken in ("inputs", "parameters"):
        model, x = net(), torch.randn(16, FEATURES)
        with torch.no_grad():
            (x if broken == "inputs" else model[0].weight)[0, 0] = bad
        value = saliency(model, way)(x, target=TARGET)
        value.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert not all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("way", WAYS)
def test_loss_scaler_skips_a_step(way: str) -> None:
    model, x = net().float(), torch.randn(16, FEATURES).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(1e4 * saliency(model, way)(x, target=TARGET)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() < 2.0**127


class RunningNorm(nn.Module):
    """Statistics of its own, moved by every training pass: in place or by a new tensor."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                moved = (self.mu.lerp(x.mean(0), 0.3), self.var.lerp(x.var(0), 0.3))
                if self.in_place:
                    self.mu.copy_(moved[0])
                    self.var.copy_(moved[1])
                else:
                    self.mu, self.var = moved
        return (x - self.mu.clone()) / (self.var.clone() + 1e-5).sqrt()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own-in-place": lambda: nn.Sequential(
        nn.Linear(FEATURES, 8), RunningNorm(in_place=True), nn.Tanh(), nn.Linear(8, 3)
    ),
    "own-assigned": lambda: nn.Sequential(
        nn.Linear(FEATURES, 8), RunningNorm(in_place=False), nn.Tanh(), nn.Linear(8, 3)
    ),
    "BatchNorm": lambda: nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    ),
    "spectral_norm": lambda: nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, 8)),
        nn.Tanh(),
        nn.Linear(8, 3),
    ),
}
EXPLAINERS: dict[str, tuple[Callable[[nn.Module, str], Any], dict[str, Any]]] = {
    "Saliency": (lambda m, w: differentiable(ca.Saliency(m), differentiation=w), {"abs": False}),
    "IG": (
        lambda m, w: differentiable(ca.IntegratedGradients(m), differentiation=w),
        {"n_steps": 4},
    ),
    "EG": (
        lambda m, w: ExpectedGradients(m, differentiation=w),
        {"n_samples": 2, "baselines": background()},
    ),
}


@pytest.mark.parametrize("way", ["recompute", "finite_difference"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_buffers_of_the_forward_pass(make: Any, explainer: str, way: str) -> None:
    """A training pass between the prior and its backward pass moves them."""
    model, (explain, options) = make().train(), EXPLAINERS[explainer]
    x = torch.randn(16, FEATURES)
    for _ in range(3):
        model(torch.randn(16, FEATURES))
    prior = AttributionPrior(explain(model, way), l2, **options).eval()
    expected = slopes(prior(x, target=TARGET), model)
    value = prior(x, target=TARGET)
    model(5 * torch.randn(16, FEATURES) + 3)
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert error(slopes(value, model), expected) < 1e-12  # the same arithmetic
    for name, buffer in model.named_buffers():  # and the training's own are where it left them
        assert torch.equal(buffer, after[name]), name
