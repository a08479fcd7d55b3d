"""A prior in the settings that people train in: one test, or a few, for each row of the table."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from captum_priors import AttributionPrior, NotDifferentiableError, differentiable
from captum_priors.penalties import gini, l2
from captum_priors.testing import check_differentiable
from tests.asserts import assert_slope, gradients_of, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, Recurrent


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def batch(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.randint(3, (n,))


def prior_of(model: Any, way: Any = "double_backprop", penalty: Any = l2) -> AttributionPrior:
    return AttributionPrior(
        differentiable(IntegratedGradients(model), differentiation=way), penalty, n_steps=4
    )


def of(value: Tensor, model: Any) -> list[Tensor]:
    return gradients_of(value, [p for p in model.parameters() if p.requires_grad])


def accumulated(parameters: Any) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Gradients in a setting, and those that they should be, exactly or by differences of 0.2 %.

Pair = tuple[list[Tensor], list[Tensor]]
GRADIENTS: dict[str, Callable[[Any], Pair]] = {}


def setting(function: Callable[[Any], Pair]) -> Callable[[Any], Pair]:
    GRADIENTS[function.__name__] = function
    return function


@setting
def micro_batches(way: Any) -> Pair:
    """They add up to the batch for penalties of each example."""
    model, (x, y) = net(), batch()
    prior = prior_of(model, way)
    expected = of(prior(x, target=y), model)
    for xs, ys in zip(x.chunk(3), y.chunk(3), strict=True):
        (prior(xs, target=ys) / 3).backward()
    return accumulated(model.parameters()), expected


@setting
def functional_call(way: Any) -> Pair:
    model, (x, y) = net(), batch()
    expected = of(prior_of(model, way)(x, target=y), model)
    loose = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def forward(x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, loose, (x,))
        return out

    prior_of(forward, way)(x, target=y).backward()
    assert all(p.grad is None for p in model.parameters())
    return accumulated(loose.values()), expected


@setting
def frozen_backbone(way: Any) -> Pair:
    """A head on frozen features, whose own gradient the prior still passes through."""
    model, (x, y) = net(), batch()
    expected = of(prior_of(model, way)(x, target=y), model)[-2:]
    model[:4].requires_grad_(False)
    prior_of(model, way)(x, target=y).backward()
    assert all(p.grad is None for p in model[:4].parameters())
    return accumulated(model[4].parameters()), expected


class Adapted(nn.Module):
    """A frozen linear layer with a trained update of rank two."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return out


@setting
def low_rank_adapters(way: Any) -> Pair:
    """Their gradient is the frozen weight's, by the chain rule."""
    model, (x, y) = net(), batch()
    merged = copy.deepcopy(model)
    model.requires_grad_(False)
    model[0] = adapted = Adapted(model[0])
    down, up = adapted.down.detach(), adapted.up.detach()
    with torch.no_grad():
        merged[0].weight += up @ down
    weight = of(prior_of(merged, way)(x, target=y), merged)[0]
    return of(prior_of(model, way)(x, target=y), model), [up.T @ weight, weight @ down.T]


for _cell in (nn.RNN, nn.LSTM, nn.GRU):

    def recurrent(way: Any, cell: Any = _cell) -> Pair:
        model, x = Recurrent(cell), torch.randn(5, 6, 4)
        found = of(prior_of(model, way)(x, target=1), model)
        explainer = differentiable(IntegratedGradients(model.eval()))
        check_differentiable(explainer, x, target=1, n_steps=4)
        return found, of(l2(explainer.attribute(x, target=1, n_steps=4)).mean(), model)

    GRADIENTS[_cell.__name__] = recurrent


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str, way: Any) -> None:
    found, expected = GRADIENTS[name](way)
    # Another order of sums; truncation of a 0.2 % step.
    assert relative_error(found, expected) < (1e-10 if way in EXACT else 1e-3)


# Precision


@pytest.mark.parametrize("way", ["double_backprop", "finite_difference"])
def test_small_gradients_in_float16(way: Any) -> None:
    """They underflow under autocast, and do not where the prior is evaluated outside of it."""
    model, (x, y) = net().float(), batch()
    x = x.float()
    with torch.no_grad():
        model[-1].weight.mul_(1e-7)
    expected = prior_of(model)(x, target=y).item()
    prior = prior_of(model, way)
    with torch.autocast("cpu", dtype=torch.float16):
        lost = prior(x, target=y).item()
        with torch.autocast("cpu", enabled=False):
            kept = prior(x, target=y).item()
    if way == "finite_difference":  # evaluates in full precision anyway
        assert lost == pytest.approx(expected, rel=1e-5)
    else:
        assert abs(lost / expected - 1) > 0.02
    assert kept == pytest.approx(expected, rel=1e-5)  # single precision


# Optimisation and parameters


def test_gradient_clipping() -> None:
    """The norm that is clipped is that of loss and prior together."""
    model, (x, y) = net(), batch()
    loss = F.cross_entropy(model(x), y) + 10 * prior_of(model)(x, target=y)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    norm = torch.cat([g.flatten() for g in expected]).norm()
    loss.backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.01).item() == pytest.approx(norm.item())
    clipped = [g * (0.01 / norm) for g in expected]
    assert relative_error(accumulated(model.parameters()), clipped) < 1e-3  # torch adds 1e-6


def test_accumulation_of_a_statement_about_the_batch() -> None:
    """It is about each micro-batch: another prior."""
    model, (x, y) = net(), batch()
    prior = prior_of(model, penalty=gini)
    parts = zip(x.chunk(3), y.chunk(3), strict=True)
    values = [prior(xs, target=ys).item() for xs, ys in parts]
    assert abs(sum(values) / 3 - prior(x, target=y).item()) > 0.01


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_exponential_moving_average(way: Any) -> None:
    """The average is that of the trained parameters, and can be explained beside them."""
    model, (x, y) = net(), batch()
    prior = prior_of(model, way)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = None
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + prior(x, target=y)).backward()
        optimizer.step()
        averaged.update_parameters(model)
        now = flat(model)
        expected = now if expected is None else 0.5 * (expected + now)
    assert float((flat(averaged) - expected).abs().max()) < 1e-12  # rounding
    with torch.no_grad():
        assert float(prior_of(averaged)(x, target=y)) != float(prior(x, target=y))
    assert all(p.grad is None for p in averaged.parameters())


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_parameters_that_training_made(way: Any) -> None:
    """Weights after an inner step, as meta-learning takes them: exact, or refused."""
    model, (x, y) = net(), batch()
    named = dict(model.named_parameters())

    def outer(named: dict[str, Tensor]) -> Tensor:
        def forward(x: Tensor, fast: dict[str, Tensor] | None = None) -> Tensor:
            out: Tensor = torch.func.functional_call(model, fast or named, (x,))
            return out

        inner = F.cross_entropy(forward(x), y)
        steps = torch.autograd.grad(inner, list(named.values()), create_graph=True)
        fast = {k: p - 0.5 * s for (k, p), s in zip(named.items(), steps, strict=True)}
        return prior_of(lambda x: forward(x, fast), way)(x, target=y)

    if way != "double_backprop":
        with pytest.raises(NotDifferentiableError, match="computed before the call"):
            outer(named)
        return
    assert_slope(lambda: outer(named), [model[0].weight], rtol=1e-6, atol=0.0)  # truncation
