"""A prior in the settings that people train in: one test, or a few, for each row of the table."""

import copy
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
from tests.asserts import relative_error
from tests.cases import DIFFERENTIATIONS, EXACT


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 8), nn.Tanh(), head())


def head() -> nn.Module:
    return nn.Linear(8, 3)


def batch(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.randint(3, (n,))


def prior_of(model: Any, way: Any = "double_backprop", penalty: Any = l2) -> AttributionPrior:
    return AttributionPrior(
        differentiable(IntegratedGradients(model), differentiation=way), penalty, n_steps=4
    )


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """Gradient by the parameters, zeros where there is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def cosine(found: list[Tensor], expected: list[Tensor]) -> float:
    flat, other = (torch.cat([g.flatten() for g in each]) for each in (found, expected))
    return float(F.cosine_similarity(flat, other, dim=0))


# Mixed precision


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(way: Any, dtype: torch.dtype) -> None:
    model, (x, y) = net().float(), batch()
    x = x.float()
    expected = gradients(F.cross_entropy(model(x), y) + prior_of(model)(x, target=y), model)
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(model(x), y) + prior_of(model, way)(x, target=y)
    found = gradients(loss, model)
    assert all(g.dtype == torch.float32 for g in found)
    # Eight or eleven bits through a few layers, and differences of them.
    assert cosine(found, expected) > (0.999 if way in EXACT else 0.98)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_grad_scaler(way: Any) -> None:
    """The scale is that of the loss: attributions and their penalty know nothing of it."""
    start, (x, y) = net().float(), batch()
    x, ends = x.float(), []
    for enabled in (False, True):
        model = copy.deepcopy(start)
        prior = prior_of(model, way)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + prior(x, target=y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert float((ends[-1] - _flat(start)).abs().max()) > 1e-3
    assert float((ends[0] - ends[1]).abs().max()) < 1e-6  # the scale is a power of two


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    model, (x, y) = net().float(), batch()
    before, optimizer = _flat(model), torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(1e38 * prior_of(model)(x.float(), target=y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(_flat(model), before)
    assert scaler.get_scale() == 2.0**9


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
    assert abs(lost / expected - 1) > 0.02
    assert kept == pytest.approx(expected, rel=1e-5)  # single precision


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Compiled


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_compiled_training_with_the_eager_model_explained(in_place: bool) -> None:
    """The parameters are shared: train the one and explain the other."""
    model, (x, y) = net(), batch()
    eager = copy.deepcopy(model)
    expected = gradients(F.cross_entropy(eager(x), y) + prior_of(eager)(x, target=y), eager)
    if in_place:
        model.compile(backend="aot_eager")
        # A forward pass of the class's own, past the compiled one.
        compiled, explained = model, lambda x: type(model).forward(model, x)
    else:
        compiled, explained = torch.compile(model, backend="aot_eager"), model
    loss = F.cross_entropy(compiled(x), y) + prior_of(explained)(x, target=y)
    assert relative_error(gradients(loss, model), expected) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own use of torch.jit
def test_inductor() -> None:
    """Trained on by first derivatives; double backpropagation is refused as with any backend."""
    model, (x, y) = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).float(), batch()
    x, compiled = x.float(), torch.compile(model, dynamic=True)
    expected = gradients(prior_of(model)(x, target=y), model)
    found = gradients(prior_of(compiled, "finite_difference")(x, target=y), model)
    assert relative_error(found, expected) < 1e-2  # truncation and rounding of a 0.2 % step


# Recurrent


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_recurrent(cell: Any, way: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(4, 5, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True)
            self.head = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.cell(x)[0].mean(1))
            return out

    model, x = Recurrent(), torch.randn(5, 6, 4)
    found = gradients(prior_of(model, way)(x, target=1), model)
    explainer = differentiable(IntegratedGradients(model.eval()))
    check_differentiable(explainer, x, target=1, n_steps=4)
    expected = gradients(l2(explainer.attribute(x, target=1, n_steps=4)).mean(), model)
    # Another order of sums; truncation of a 0.2 % step.
    assert relative_error(found, expected) < (1e-10 if way in EXACT else 1e-3)


# Optimisation


def test_gradient_clipping() -> None:
    """The norm that is clipped is that of loss and prior together."""
    model, (x, y) = net(), batch()
    loss = F.cross_entropy(model(x), y) + 10 * prior_of(model)(x, target=y)
    loss.backward(retain_graph=True)
    expected = gradients(loss, model)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in expected]).norm()))
    assert relative_error(found, [g * (0.01 / norm) for g in expected]) < 1e-3  # torch adds 1e-6


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_accumulation(way: Any) -> None:
    """Micro-batches add up to the batch for penalties of each example."""
    model, (x, y) = net(), batch()
    prior = prior_of(model, way)
    expected = gradients(prior(x, target=y), model)
    parts = zip(x.chunk(3), y.chunk(3), strict=True)
    for xs, ys in parts:
        (prior(xs, target=ys) / 3).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert relative_error(found, expected) < (1e-12 if way in EXACT else 1e-9)


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
        now = _flat(model)
        expected = now if expected is None else 0.5 * (expected + now)
    assert float((_flat(averaged) - expected).abs().max()) < 1e-12
    with torch.no_grad():
        assert float(prior_of(averaged)(x, target=y)) != float(prior(x, target=y))
    assert all(p.grad is None for p in averaged.parameters())


# Parameters


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_functional_call(way: Any) -> None:
    model, (x, y) = net(), batch()
    expected = gradients(prior_of(model, way)(x, target=y), model)
    loose = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def forward(x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, loose, (x,))
        return out

    prior_of(forward, way)(x, target=y).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in loose.values()]
    assert relative_error(found, expected) < 1e-12
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_parameters_that_training_made(way: Any) -> None:
    """Weights after an inner step, as meta-learning takes them: exact, or refused."""
    model, (x, y) = net(), batch()
    named = dict(model.named_parameters())

    def outer(model: nn.Module, named: dict[str, Tensor]) -> Tensor:
        def forward(x: Tensor, fast: dict[str, Tensor] | None = None) -> Tensor:
            out: Tensor = torch.func.functional_call(model, fast or named, (x,))
            return out

        inner = F.cross_entropy(forward(x), y)
        steps = torch.autograd.grad(inner, list(named.values()), create_graph=True)
        fast = {k: p - 0.5 * s for (k, p), s in zip(named.items(), steps, strict=True)}
        return prior_of(lambda x: forward(x, fast), way)(x, target=y)

    if way != "double_backprop":
        with pytest.raises(NotDifferentiableError, match="computed before the call"):
            outer(model, named)
        return
    weight = model[0].weight
    (found,) = torch.autograd.grad(outer(model, named), [weight])
    direction, h = torch.randn_like(weight), 1e-5
    values = []
    for sign in (1, -1):
        moved = {**named, "0.weight": (weight + sign * h * direction).detach().requires_grad_()}
        values.append(outer(model, moved).item())
    slope = (values[0] - values[1]) / (2 * h)
    assert float((found * direction).sum()) == pytest.approx(slope, rel=1e-6)


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


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_low_rank_adapters(way: Any) -> None:
    """Their gradient is the frozen weight's, by the chain rule."""
    model, (x, y) = net(), batch()
    merged = copy.deepcopy(model)
    model.requires_grad_(False)
    model[0] = adapted = Adapted(model[0])
    with torch.no_grad():
        merged[0].weight += adapted.up @ adapted.down
    prior_of(model, way)(x, target=y).backward()
    (weight,) = torch.autograd.grad(prior_of(merged, way)(x, target=y), [merged[0].weight])
    found = [adapted.up.grad, adapted.down.grad]
    down, up = adapted.down.detach(), adapted.up.detach()
    expected = [weight @ down.T, up.T @ weight]
    # Another order of operations; of the differences of a 0.2 % step.
    assert relative_error(found, expected) < (1e-10 if way in EXACT else 1e-6)
    assert all(
        p.grad is None for n, p in model.named_parameters() if "up" not in n and "down" not in n
    )


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_frozen_backbone(way: Any) -> None:
    """A head on frozen features, whose own gradient the prior still passes through."""
    model, (x, y) = net(), batch()
    expected = gradients(prior_of(model, way)(x, target=y), model)[-2]
    model[:4].requires_grad_(False)
    prior_of(model, way)(x, target=y).backward()
    assert relative_error([model[4].weight.grad], [expected]) < 1e-12
    assert all(p.grad is None for p in model[:4].parameters())
