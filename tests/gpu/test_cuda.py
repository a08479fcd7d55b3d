"""The engine on a GPU, where backward passes run in threads of their own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    Lazy,
    NotDifferentiableError,
    StabilityPrior,
    Subsample,
)
from captum_priors.distances import cosine
from captum_priors.penalties import GraphLaplacian, l2
from captum_priors.testing import check_differentiable
from tests.asserts import assert_same_numbers, parameter_gradients, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, EXPLAINERS, NONLINEAR, Case, Row, rows, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(value: Any) -> Any:
    if isinstance(value, (Tensor, nn.Module)):
        return value.cuda()
    return tuple(map(on_gpu, value)) if isinstance(value, tuple) else value


def moved(case: Case) -> Case:
    return Case(
        on_gpu(case.model),
        on_gpu(case.inputs),
        on_gpu(case.baselines),
        on_gpu(case.target),
        on_gpu(case.args),
        case.layer,
        case.smooth,
    )


def attribute(model: Any, x: Tensor, way: str, **call: Any) -> Tensor:
    explainer = ExpectedGradients(model, differentiation=way)
    value: Tensor = explainer.attribute(x, x, 3, generator=torch.Generator().manual_seed(0), **call)
    return value


@pytest.mark.parametrize("row", rows(EXPLAINERS))
@pytest.mark.parametrize("make_case", rows(NONLINEAR))
@pytest.mark.parametrize("way", EXACT)
def test_certificate(row: Row, make_case: Any, way: str) -> None:
    case = moved(make_case())
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's LSTM has no second derivative
        check_differentiable(row.make(case, way), case.inputs, **row.call(case))


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_same_numbers_and_gradients_as_on_the_cpu(way: str) -> None:
    """Draws come from the CPU generator, so a seed means the same on both."""
    case = NONLINEAR[2]()
    here = attribute(case.model, case.inputs, way, target=case.target)
    gradients = parameter_gradients(here, list(case.model.parameters()))
    gpu = moved(case)
    there = attribute(gpu.model, gpu.inputs, way, target=gpu.target)
    assert_same_numbers(there.cpu(), here, 1e-10)
    found = parameter_gradients(there, list(gpu.model.parameters()))
    assert relative_error([g.cpu() for g in found], gradients) < 1e-8  # other summation order


def test_cudnn_recurrent_modules() -> None:
    case = moved(tokens())
    explainer = LayerExpectedGradients(case.model, case.layer)
    with pytest.raises(NotDifferentiableError, match=r"CudnnRnnBackwardBackward.*cudnn\.flags"):
        explainer.attribute(case.inputs, case.baselines, target=1)
    prior = AttributionPrior(
        LayerExpectedGradients(case.model, case.layer, differentiation="finite_difference"),
        l2,
        baselines=case.baselines,
    )
    with torch.backends.cudnn.flags(enabled=False):
        exact = AttributionPrior(explainer, l2, baselines=case.baselines)(case.inputs, target=1)
        expected = parameter_gradients(exact, list(case.model.parameters()))
    found = parameter_gradients(prior(case.inputs, target=1), list(case.model.parameters()))
    assert relative_error(found, expected) < 1e-2  # truncation of a 0.2 % step


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (SDPBackend.FLASH_ATTENTION, "flash_attention"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient_attention"),
    ],
)
def test_fused_attention(kernel: Any, name: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Linear(32, 96), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
            mixed = F.scaled_dot_product_attention(q, k, v)
            return self.head(mixed.transpose(1, 2).flatten(2).mean(1))

    torch.manual_seed(0)
    model, x = Attention().cuda().float(), torch.randn(4, 8, 32, device="cuda").float()
    parameters = list(model.parameters())
    with torch.autocast("cuda", dtype=torch.bfloat16), sdpa_kernel(kernel):
        with pytest.raises(NotDifferentiableError, match=name):
            attribute(model, x, "double_backprop", target=1)
        value = attribute(model, x, "finite_difference", target=1)
        found = parameter_gradients(value, parameters)
    with sdpa_kernel(SDPBackend.MATH):
        exact = parameter_gradients(attribute(model, x, "double_backprop", target=1), parameters)
    flat, flat_exact = (torch.cat([g.flatten() for g in each]) for each in (found, exact))
    # bfloat16 attention against float32: the direction is kept.
    assert float(torch.cosine_similarity(flat, flat_exact, dim=0)) > 0.95


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_priors_train_and_leave_the_generators_alone(way: str) -> None:
    """Replays run in the device's thread while the calling thread may hold its turn."""
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1)
    ).cuda()
    x = torch.randn(32, 6, device="cuda")
    explainer = ExpectedGradients(model, differentiation=way)

    def shift(inputs: Tensor) -> Tensor:
        """A perturbation that differentiates attributions, as attacks do, inside a prior."""
        moving = inputs.detach().requires_grad_()
        drift = l2(explainer.attribute(moving, x, 2)).sum()
        (gradient,) = torch.autograd.grad(drift, moving)
        return inputs + 0.01 * gradient.sign()

    graph = GraphLaplacian(torch.ones(6, 6))
    options: dict[str, Any] = {"baselines": x, "smooth": 10.0}
    prior = (
        AttributionPrior(explainer, l2, **options)
        + Lazy(AttributionPrior(explainer, graph, **options), every=2)
        + 0.1 * Subsample(StabilityPrior(explainer, cosine, shift, **options), fraction=0.5)
    ).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    cpu, gpu = torch.get_rng_state(), torch.cuda.get_rng_state()
    buffers = [b.clone() for b in model.buffers()]
    for _ in range(4):
        value = prior(x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert float(value) >= 0
    assert torch.equal(cpu, torch.get_rng_state())
    assert torch.equal(gpu, torch.cuda.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert model.training


def test_baselines_elsewhere_are_an_error() -> None:
    model = nn.Linear(3, 1).cuda()
    with pytest.raises(TypeError, match=r"on cuda:0 as in the inputs, found .* on cpu"):
        ExpectedGradients(model).attribute(torch.randn(2, 3, device="cuda"), torch.randn(4, 3))
