"""What priors draw from a device's generator, and what they take of its memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import GradientShap, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Lazy,
    StabilityPrior,
    Subsample,
    differentiable,
)
from captum_priors.distances import cosine
from captum_priors.penalties import GraphLaplacian, l2
from tests.asserts import leaves_no_trace, parameter_gradients
from tests.cases import DIFFERENTIATIONS
from tests.gpu.device import DEVICE, ON_CUDA, eg_prior, needs_cuda, needs_device, on_device

pytestmark = needs_device


# Generators


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_priors_train_and_leave_the_generators_alone(way: str) -> None:
    """Replays run in the device's thread while the calling thread may hold its turn."""
    model = on_device(
        nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1)
        )
    )
    x = torch.randn(32, 6, device=DEVICE)
    explainer = ExpectedGradients(model, differentiation=way)

    def shift(inputs: Tensor) -> Tensor:
        """A perturbation that differentiates attributions, as attacks do, inside a prior."""
        moving = inputs.detach().requires_grad_()
        drift = l2(explainer.attribute(moving, x, 2)).sum()
        (gradient,) = torch.autograd.grad(drift, moving)
        return inputs + 0.01 * gradient.sign()

    graph = GraphLaplacian(torch.ones(6, 6))
    options: dict[str, Any] = {"baselines": x, "smooth": 10.0}
    tunnel = differentiable(NoiseTunnel(Saliency(model)))  # draws from the device's, too
    prior = (
        AttributionPrior(explainer, l2, **options)
        + AttributionPrior(tunnel, l2, nt_samples=2)
        + Lazy(AttributionPrior(explainer, graph, **options), every=2)
        + 0.1 * Subsample(StabilityPrior(explainer, cosine, shift, **options), fraction=0.5)
    ).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    before, buffers = global_states(), [b.clone() for b in model.buffers()]
    for _ in range(4):
        value = prior(x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert torch.isfinite(value)
    assert all(map(torch.equal, before, global_states()))
    assert all(map(torch.equal, buffers, model.buffers()))
    assert model.training


def global_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if ON_CUDA else [])]


@pytest.mark.parametrize("of_inputs", [DEVICE.type, "cpu"])
def test_generator_on_the_device(of_inputs: str) -> None:
    """A user's own: a seed means the same again, and looking at a value moves nothing."""
    model, x = nn.Linear(6, 1).to(of_inputs), torch.randn(8, 6, device=of_inputs)
    table = torch.randn(50, 6, device=of_inputs)
    explainer = ExpectedGradients(nn.Sequential(model, nn.Tanh()))
    generator = torch.Generator(DEVICE).manual_seed(3)
    seen = []
    for _ in range(20):
        generator.manual_seed(3)
        seen.append(explainer.attribute(x, table, 9, stdevs=0.1, generator=generator))
    assert all(torch.equal(each, seen[0]) for each in seen)
    prior = AttributionPrior(explainer, l2, baselines=table, generator=generator)
    state = generator.get_state()
    looked = prior.eval()(x).item()
    assert torch.equal(generator.get_state(), state)
    kept = prior.state_dict()
    assert prior.train()(x).item() == looked
    assert not torch.equal(generator.get_state(), state)
    prior.load_state_dict(kept)
    assert prior(x).item() == looked


def test_drawing_priors_are_reproduced_by_a_seed() -> None:
    model, x = on_device(nn.Sequential(nn.Linear(6, 3), nn.Tanh())), torch.randn(8, 6).to(DEVICE)
    shap = differentiable(GradientShap(model))
    ends = []
    for _ in range(2):
        torch.manual_seed(5)
        prior = AttributionPrior(shap, l2, baselines=x, n_samples=3, stdevs=0.1)
        ends.append([prior(x, target=1).item() for _ in range(3)])
        del prior
    assert ends[0] == ends[1]
    assert len({*ends[0]}) == 3


class Ranked(nn.Module):
    """Makes a tensor on the default device in its forward pass, as position ids are made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * torch.arange(1, 4)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_default_device(way: str) -> None:
    """Draws and counters are made on the CPU whatever the default, which replays find again."""
    with DEVICE:
        model, x = Ranked(), torch.randn(8, 6)
        saliency = differentiable(Saliency(model), differentiation=way)
        prior = eg_prior(model, way, x) + StabilityPrior(
            saliency, cosine, lambda z: z + 0.1 * torch.randn_like(z)
        )
        prior(x, target=1).backward()
        prior.load_state_dict(prior.state_dict())
    for p in model.parameters():
        assert p.grad.any()
        assert p.grad.isfinite().all()


# Memory


def images(n: int = 32) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(16 * 784, 3)
    )
    return on_device(model, torch.float32), torch.randn(n, 1, 28, 28).to(DEVICE).float()


def peak_of(step: Callable[[], object]) -> int:
    """Bytes that a step adds at most to what is allocated."""
    if not ON_CUDA:
        from tests.engine.test_recompute_memory import PeakBytes

        with PeakBytes() as memory:
            step()
        return memory.peak
    step()  # workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("explainer", ["IntegratedGradients", "ExpectedGradients"])
def test_memory_is_flat_under_recompute(explainer: str) -> None:
    model, x = images(32 if ON_CUDA else 4)
    parameters = list(model.parameters())

    def step(way: Any, n: int) -> None:
        if explainer == "IntegratedGradients":
            ig = differentiable(IntegratedGradients(model), differentiation=way)
            value = ig.attribute(x, target=1, n_steps=n)
        else:
            eg = ExpectedGradients(model, differentiation=way)
            value = eg.attribute(x, x, n_samples=n, target=1)
        parameter_gradients(value, parameters)

    few, many = (peak_of(partial(step, "recompute", n)) for n in (8, 128))
    assert many <= 1.3 * few
    # The measurement sees memory where it does grow.
    grown, less = (peak_of(partial(step, "double_backprop", n)) for n in (32, 8))
    assert grown > 3 * less


@needs_cuda
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_steps_leave_no_memory_behind(way: Any) -> None:
    model, x = images()
    prior, allocated = eg_prior(model, way, x), []
    for _ in range(12):
        model.zero_grad()
        prior(x, target=1).backward()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[-1] == allocated[2]


@needs_cuda
def test_out_of_memory_stays_what_it_is() -> None:
    model, x = images()

    def too_large(z: Tensor) -> Tensor:
        return model(z) + z.new_zeros(2**46).sum()

    prior = eg_prior(too_large, "double_backprop", x)
    with leaves_no_trace(model), pytest.raises(torch.cuda.OutOfMemoryError):
        prior(x, target=1)
