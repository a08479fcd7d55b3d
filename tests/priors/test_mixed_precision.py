"""Half precision: what autocast costs, and that a loss scaler sees what overflows.

``tests/gpu`` runs the same on a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from captum_priors import AttributionPrior, differentiable
from captum_priors.penalties import l2
from tests.asserts import gradients_of
from tests.cases import DIFFERENTIATIONS, EXACT
from tests.laws.leaves import Leaf, background, every_leaf_and_way, leaves_and_ways_but, way_options

HALF = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def net(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 16), *between, nn.Softplus(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    ).float()


def batch() -> tuple[Tensor, Tensor]:
    """Classes that can be told apart."""
    x, y = torch.randn(24, 6, dtype=torch.float32), torch.arange(24) % 3
    x[torch.arange(24), y] += 3
    return x, y


def prior_of(model: Any, way: Any = "double_backprop", penalty: Any = l2) -> AttributionPrior:
    explainer = differentiable(IntegratedGradients(model), differentiation=way)
    return AttributionPrior(explainer, penalty, n_steps=4)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return gradients_of(loss, [*model.parameters()])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def near(found: Sequence[Tensor], expected: Sequence[Tensor], way: str) -> bool:
    """Same direction and size, but for 8 or 11 bits through a few layers and their differences."""
    f, e = flat(found), flat(expected)
    turned = 1 - float(F.cosine_similarity(f, e, dim=0))
    return turned < (1e-3 if way in EXACT else 2e-2) and abs(float(f.norm() / e.norm()) - 1) < 0.05


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_of_batch_norm_in_training_mode(dtype: torch.dtype, way: Any) -> None:
    model, (x, y) = net(nn.BatchNorm1d(16)), batch()
    expected = gradients(prior_of(model)(x, target=y), model)
    with torch.autocast("cpu", dtype=dtype):
        value = prior_of(model, way)(x, target=y)
    found = gradients(value, model)
    assert all(g.dtype == torch.float32 for g in found)
    assert near(found, expected, way)


# A loss scaler


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_gradients_are_proportional_to_the_scale(way: Any) -> None:
    model, (x, y) = net(), batch()
    expected = flat(gradients(prior_of(model, way)(x, target=y), model))
    for scale in (2.0**-30, 2.0**16, 2.0**40):
        found = flat(gradients(scale * prior_of(model, way)(x, target=y), model)) / scale
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def after_an_overflow(how: str, way: Any, device: torch.device = CPU) -> None:
    """A scaled gradient that overflows raises nothing: the scaler skips the step and goes on."""
    model, (x, y) = net().to(device), (t.to(device) for t in batch())
    prior, optimizer = prior_of(model, way), torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** (127 if how == "scale" else 10))
    weight = {"scale": 1e2, "weight": 1e38, "part": 1.0}[how]
    if how == "part":  # one example overflows, the others do not
        of_each = torch.ones(len(x), device=device)
        of_each[3] = 1e38
        prior = prior_of(model, way, lambda a: of_each * l2(a))
    before = flat([*model.parameters()])
    with torch.autocast(device.type, dtype=torch.float16):
        loss = F.cross_entropy(model(x), y) + weight * prior(x, target=y)
    scaler.scale(loss).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat([*model.parameters()]), before)
    assert scaler.get_scale() == scale / 2
    scaler.update(2.0**10)
    optimizer.zero_grad()
    with torch.autocast(device.type, dtype=torch.float16):
        loss = F.cross_entropy(model(x), y) + prior_of(model, way)(x, target=y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert not torch.equal(flat([*model.parameters()]), before)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("how", ["scale", "weight", "part"])
def test_a_step_that_overflows_is_skipped(how: str, way: Any) -> None:
    after_an_overflow(how, way)


def trained_under_scaling(way: Any, device: torch.device = CPU) -> None:
    """From a scale that is far too large: steps are skipped until it fits, then it trains."""
    model, (x, y) = net().to(device), (t.to(device) for t in batch())
    prior, optimizer = prior_of(model, way), torch.optim.Adam(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    start, skipped = flat([*model.parameters()]), 0
    for _ in range(90):
        with torch.autocast(device.type, dtype=torch.float16):
            loss = F.cross_entropy(model(x), y) + 0.1 * prior(x, target=y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < scale
    assert 5 < skipped < 40
    assert flat([*model.parameters()]).isfinite().all()
    assert not torch.equal(flat([*model.parameters()]), start)
    assert (model(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_scale_finds_its_place(way: Any) -> None:
    trained_under_scaling(way)


# Every prior


def in_single_precision(leaf: Leaf, way: str, x: Tensor) -> tuple[Any, Any, dict[str, Any]]:
    """A model, the prior on it, which draws the same each time, and what it is called with."""
    torch.set_default_dtype(torch.float32)  # the fixture of all tests puts float64 back
    model: Any = leaf.model()
    prior = leaf.make(model, **way_options(leaf, way)).eval()
    call = leaf.call(x)
    if getattr(prior, "draws_baselines", False):
        call["baselines"] = background().to(x.dtype)
    return model, prior, call


# What says how far two points or maps are apart: differences lose digits.
APART = ("CURE", "Hessian-difference", "Hessian-twice", "Sensitivity", "Stability")


@every_leaf_and_way
def test_autocast_is_near_single_precision(leaf: Leaf, way: str) -> None:
    x = leaf.batch(6).float()
    model, prior, call = in_single_precision(leaf, way, x)
    exact = prior(x, **call)
    with torch.autocast("cpu", torch.bfloat16):
        value = prior(x, **call)
    assert value.dtype == torch.float32
    # A few roundings to eight bits.
    tolerance = 2.0 ** (-4 if leaf.name.startswith(APART) else -6)
    assert value.item() == pytest.approx(exact.item(), rel=tolerance)
    found, expected = (flat(gradients(v, model)) for v in (value, exact))
    assert F.cosine_similarity(found, expected, dim=0) > 1 - 5e-3


def rounded(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same numbers whatever the precision that is asked for."""

    def drawn(*args: Any, dtype: Any = None, **options: Any) -> Tensor:
        like = args[0] if isinstance(args[0], Tensor) else torch.empty(0, dtype=dtype)
        given = (args[0].float(), *args[1:]) if isinstance(args[0], Tensor) else args
        return draw(*given, dtype=torch.float32, **options).to(like.dtype)

    return drawn


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@every_leaf_and_way
def test_single_precision_is_near_double(
    leaf: Leaf, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rand", "rand_like", "randn", "randn_like", "randint_like"):
        monkeypatch.setattr(torch, name, rounded(getattr(torch, name)))
    x = leaf.batch(6).float()
    model, prior, call = in_single_precision(leaf, way, x)
    value = prior(x, **call)
    model.double()
    call = {k: v.double() if is_float(v) else v for k, v in call.items()}
    exact = prior(x.double(), **call)
    # Differences of gradients in single precision.
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)


def has_finite_gradients(model: nn.Module) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@every_leaf_and_way
@pytest.mark.parametrize("dtype", HALF)
def test_scaler_sees_an_overflow_of_every_prior(dtype: torch.dtype, leaf: Leaf, way: str) -> None:
    x = leaf.batch(6).float()
    model, prior, call = in_single_precision(leaf, way, x)
    with torch.autocast("cpu", dtype=dtype):
        value = prior(x, **call)
    (value * (2.0**100 if dtype is torch.float16 else torch.inf)).backward()
    assert not has_finite_gradients(model)


# The layer of "Concept" is linear from there on: no input reaches its gradient.
@leaves_and_ways_but("Concept")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scaler_sees_an_example_that_is_not_finite(bad: float, leaf: Leaf, way: str) -> None:
    x = leaf.batch(6).float()
    x[1] = bad
    model, prior, call = in_single_precision(leaf, way, x)
    with torch.autocast("cpu", dtype=torch.float16):
        value = prior(x, **call)
    value.backward()
    assert not has_finite_gradients(model)
