"""Settings that people train in, on a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from captum_priors import AttributionPrior, NotDifferentiableError, differentiable
from captum_priors.integrations import AcrossProcesses
from captum_priors.penalties import gini, l2
from tests.asserts import relative_error
from tests.cases import DIFFERENTIATIONS, EXACT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 3)).cuda().float()


def batch() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(12, 6, dtype=torch.float32), torch.randint(3, (12,))
    return x.cuda(), y.cuda()


def prior_of(model: Any, way: Any = "double_backprop", penalty: Any = l2) -> AttributionPrior:
    explainer = differentiable(IntegratedGradients(model), differentiation=way)
    return AttributionPrior(explainer, penalty, n_steps=4)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(found, model.parameters(), strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in pairs]


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(way: Any, dtype: torch.dtype) -> None:
    model, (x, y) = net(), batch()
    expected = gradients(F.cross_entropy(model(x), y) + prior_of(model)(x, target=y), model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype is torch.float16)
    with torch.autocast("cuda", dtype=dtype):
        loss = F.cross_entropy(model(x), y) + prior_of(model, way)(x, target=y)
    found = [g / scaler.get_scale() for g in gradients(scaler.scale(loss), model)]
    flat, other = (torch.cat([g.flatten() for g in each]) for each in (found, expected))
    # Eight or eleven bits through a few layers, and differences of them.
    assert float(F.cosine_similarity(flat, other, dim=0)) > (0.999 if way in EXACT else 0.98)


# What torch.compile warns of in torch's own code, and that it reads .grad of what it traces.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_inductor() -> None:
    model, (x, y) = net(), batch()
    compiled = torch.compile(model, dynamic=True)
    with pytest.raises(NotDifferentiableError, match="attribute its eager twin"):
        prior_of(compiled)(x, target=y)
    expected = gradients(prior_of(model)(x, target=y), model)
    found = gradients(prior_of(compiled, "finite_difference")(x, target=y), model)
    assert relative_error(found, expected) < 1e-2  # truncation and rounding of a 0.2 % step


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not dist.is_nccl_available():
        pytest.skip("needs NCCL")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=["plain", "static_graph"])
def test_nccl(options: dict[str, bool]) -> None:
    model, (x, y) = net(), batch()
    expected = gradients(
        F.cross_entropy(model(x), y) + prior_of(model, penalty=gini)(x, target=y), model
    )
    ddp = DistributedDataParallel(model, **options)
    prior = AcrossProcesses(prior_of(model, penalty=gini))
    (F.cross_entropy(ddp(x), y) + prior(x, target=y)).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert relative_error(found, expected) < 1e-5  # single precision
    with pytest.raises(NotDifferentiableError, match="Explain the module"):
        prior_of(ddp)(x, target=y)
