"""Settings that people train in, on a GPU."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from captum_priors import AttributionPrior, NotDifferentiableError, differentiable
from captum_priors.integrations import AcrossProcesses, check_synchronised
from captum_priors.integrations.fsdp import unsharded
from captum_priors.penalties import gini, l2
from captum_priors.priors import RightForTheRightReasons
from captum_priors.stability import HessianPenalty
from tests.asserts import relative_error
from tests.cases import DIFFERENTIATIONS, EXACT
from tests.gpu.device import DEVICE, needs_cuda, needs_device
from tests.priors.test_mixed_precision import (
    HALF,
    after_an_overflow,
    gradients,
    near,
    prior_of,
    trained_under_scaling,
)

pytestmark = needs_device
SINGLE = 1e-5  # rounding in single precision


def net(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), *between, nn.Softplus(), nn.Linear(16, 3))
    return nn.Sequential(*layers).to(DEVICE, torch.float32)


def batch() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(12, 6, dtype=torch.float32), torch.randint(3, (12,))
    return x.to(DEVICE), y.to(DEVICE)


def accumulated(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


# Mixed precision


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("between", [(), (nn.BatchNorm1d(16),)], ids=["plain", "BatchNorm"])
def test_autocast_and_grad_scaler(way: Any, dtype: torch.dtype, between: Any) -> None:
    model, (x, y) = net(*between), batch()
    expected = gradients(F.cross_entropy(model(x), y) + prior_of(model)(x, target=y), model)
    scaling = dtype is torch.float16
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, enabled=scaling)
    with torch.autocast(DEVICE.type, dtype=dtype):
        loss = F.cross_entropy(model(x), y) + prior_of(model, way)(x, target=y)
    found = [g / scaler.get_scale() for g in gradients(scaler.scale(loss), model)]
    assert near(found, expected, way)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("how", ["scale", "weight", "part"])
def test_a_step_that_overflows_is_skipped(how: str, way: Any) -> None:
    after_an_overflow(how, way, DEVICE)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_scale_finds_its_place(way: Any) -> None:
    trained_under_scaling(way, DEVICE)


# Compiled models


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
# What torch.compile warns of in torch's own code, and that it reads .grad of what it traces.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
def test_inductor(how: str) -> None:
    model, (x, y) = net(nn.BatchNorm1d(16)), batch()
    prior = prior_of(model)
    expected = gradients(F.cross_entropy(model(x), y) + prior(x, target=y), model)
    trained: Any = model
    if how == "whole":
        trained = torch.compile(model)
    else:
        (model if how == "in place" else model[0]).compile()
    for way in DIFFERENTIATIONS:
        loss = F.cross_entropy(trained(x), y) + prior_of(trained, way)(x, target=y)
        limit = SINGLE if way in EXACT else 1e-2  # truncation of a 0.2 % step
        assert relative_error(gradients(loss, model), expected) < limit


# One process, which NCCL joins


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    if backend == "nccl" and not dist.is_nccl_available():
        pytest.skip("needs NCCL")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    options: dict[str, Any] = {"device_id": torch.device("cuda", 0)} if backend == "nccl" else {}
    dist.init_process_group(backend, store=store, rank=0, world_size=1, **options)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=["plain", "static_graph"])
def test_nccl(options: dict[str, bool], way: Any) -> None:
    model, (x, y) = net(), batch()
    prior = AcrossProcesses(prior_of(model, way, gini))
    expected = gradients(F.cross_entropy(model(x), y) + prior(x, target=y), model)
    ddp = DistributedDataParallel(model, **options)
    (prior.share(x) * F.cross_entropy(ddp(x), y) + prior(x, target=y)).backward()
    assert relative_error(accumulated(model), expected) < SINGLE
    check_synchronised(model)
    with pytest.raises(NotDifferentiableError, match=r"Explain wrapper\.module"):
        prior_of(ddp)(x, target=y)


@needs_cuda  # where alone the layer trains
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_nccl_synchronised_batch_norm(way: Any) -> None:
    model, (x, y) = net(nn.BatchNorm1d(16)), batch()
    expected = gradients(F.cross_entropy(model(x), y) + prior_of(model)(x, target=y), model)
    together = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    loss = F.cross_entropy(together(x), y) + prior_of(together, way)(x, target=y)
    limit = SINGLE if way in EXACT else 1e-2  # truncation of a 0.2 % step
    assert relative_error(gradients(loss, together), expected) < limit


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_nccl_fully_shard(way: Any) -> None:
    model, (x, y) = net(), batch()
    expected = gradients(F.cross_entropy(model(x), y) + prior_of(model, way)(x, target=y), model)
    for layer in (model[0], model):
        fully_shard(layer)
    loss = F.cross_entropy(model(x), y)
    loss = loss + prior_of(model, way)(x, target=y)
    with unsharded(model):
        loss.backward()
    found = [p.grad.full_tensor() for p in model.parameters()]
    assert relative_error(found, expected) < SINGLE


# Networks that people train


@pytest.mark.parametrize("kind", ["EG", "RRR", "Hessian"])
def test_trains_a_network_with_batch_norm(kind: str) -> None:
    """Loss and prior fall, and what is trained is what is evaluated."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
        nn.Linear(8 * 36, 3),
    ).to(DEVICE, torch.float32)
    y = torch.arange(60, device=DEVICE) % 3
    x = 0.3 * torch.randn(60, 1, 12, 12, device=DEVICE, dtype=torch.float32)
    for i in range(3):
        x[y == i, :, 4 * i : 4 * i + 4] += 1
    allowed = torch.ones_like(x)
    allowed[:, :, :, :2] = 0
    call: dict[str, Any] = {"target": y}
    prior: Any
    if kind == "EG":
        explainer = differentiable(IntegratedGradients(model), differentiation="recompute")
        prior = AttributionPrior(explainer, l2, n_steps=4)
    elif kind == "RRR":
        prior, call["annotation"] = RightForTheRightReasons(model), allowed
    else:
        prior = HessianPenalty(model, smooth=20)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    start = prior(x, **call).item()
    weight = 0.1 / start
    for _ in range(60):
        loss = F.cross_entropy(model(x), y) + weight * prior(x, **call)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.95
