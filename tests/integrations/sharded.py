"""Cases whose parameters are spread over two processes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from captum_priors.integrations import AcrossProcesses, StepGuard
from captum_priors.integrations.fsdp import unsharded
from captum_priors.penalties import gini
from tests.integrations.scenarios import (
    PRIORS,
    WAYS,
    alike,
    backward,
    case,
    compared,
    data,
    drawing,
    drawn,
    net,
    optimiser,
    part,
    prior_of,
    train,
    values_of,
)

# Tensor parallelism


def tensor_parallel() -> tuple[nn.Module, Any]:
    """Two processes that compute one model's outputs on the same examples."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    model = net()
    plan = {"first.0": ColwiseParallel(), "second.0": RowwiseParallel()}
    return parallelize_module(model, mesh["model"], plan), mesh["data"]


def tensor_parallel_trains(way: str) -> Any:
    model, mesh = tensor_parallel()
    prior = AcrossProcesses(drawing(model, way), mesh)
    found = train(model, model, prior, slice(None), clip=False)
    return compared(found, lambda m: drawing(m, way), clip=False)


case("finite_difference", name="finite_difference")(tensor_parallel_trains)
for _way in ("double_backprop", "recompute"):
    case(_way, name=_way, refused="Use differentiation='finite_difference'")(tensor_parallel_trains)


def undecided_parallelism(sharded: bool, ran: bool) -> Any:
    """Also below ``fully_shard``, whether its parameters are whole when the prior comes or not."""
    model, mesh = tensor_parallel()
    if sharded:
        fully_shard(model, mesh=mesh)
    if ran:
        model(data()[0][0])
    prior_of(model, "finite_difference")(data()[0][0], target=0)


for _label, _flags in {"": (False, False), "sharded": (True, False), "whole": (True, True)}.items():
    _told = "AcrossProcesses(prior, mesh['data'].get_group())"
    case(*_flags, name=_label, refused=_told)(undecided_parallelism)


# fully_shard


def backward_sharded(loss: Tensor, model: nn.Module, *, last: bool = True) -> None:
    with unsharded(model, synchronise=last):
        loss.backward()
    assert last or all(p.grad is None for p in model.parameters())  # kept back


def sharded(model: Any, *, layers: bool = True, reshard: bool = True, **options: Any) -> nn.Module:
    for module in (model.first, model.second, model) if layers else (model,):
        fully_shard(module, reshard_after_forward=reshard, **options)
    return model


def fsdp_trains(
    make_prior: Callable[[nn.Module], Any],
    layers: bool = True,
    reshard: bool = True,
    hybrid: bool = False,
    **how: Any,
) -> Any:
    names = {"mesh_dim_names": ("copies", "shards")}
    options = {"mesh": init_device_mesh("cpu", (2, 1), **names)} if hybrid else {}
    model = sharded(net(), layers=layers, reshard=reshard, **options)
    how = {"backward": backward_sharded, **how}
    found = train(model, model, make_prior(model), part(), **how)
    return compared(found, make_prior)


for _name in PRIORS:
    for _layers in (True, False):
        for _reshard in (True, False):
            if _name in ("double_backprop", "finite_difference") or (_layers and _reshard):
                _label = f"{'layers' if _layers else 'root'}{' reshard' if _reshard else ''}"
                case(PRIORS[_name], _layers, _reshard, name=f"{_label}: {_name}")(fsdp_trains)
case(prior_of, True, True, True, name="hybrid")(fsdp_trains)


@case()
def fsdp_two_terms_trains() -> Any:
    """Terms of both kinds, each in turn the one whose graph comes first."""
    return fsdp_trains(lambda m: prior_of(m) + prior_of(m, "finite_difference") + 0.5 * prior_of(m))


@case()
def fsdp_accumulation_trains() -> Any:
    return fsdp_trains(prior_of, micro=2)


@case()
def fsdp_shared_statistic_trains() -> Any:
    model = sharded(net())
    prior = AcrossProcesses(prior_of(model, penalty=gini))
    examples, how = part(uneven=True), {"share": prior.share, "backward": backward_sharded}
    found = train(model, model, prior, examples, **how)
    return compared(found, lambda m: prior_of(m, penalty=gini))


def fsdp_prior_first_trains(way: str) -> Any:
    """The prior's graph is made before the loss's, and so comes back after it."""
    return fsdp_trains(PRIORS[way], prior_first=True)


def fsdp_without_the_block(way: str) -> Any:
    fsdp_trains(PRIORS[way], backward=backward)


for _way in WAYS:
    _late = None if _way == "double_backprop" else "Evaluate the prior after the model's forward"
    case(_way, name=_way, refused=_late)(fsdp_prior_first_trains)
    case(_way, name=_way, refused="fsdp.unsharded(model): loss.backward()")(fsdp_without_the_block)


@case(refused="FullyShardedDataParallel")
def fsdp1() -> Any:
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    prior_of(model, "finite_difference")(data()[0][0], target=0)


@case()
def fsdp_draws() -> Any:
    return {"differ": alike(drawn(drawing(sharded(net())), data()[0][0])) > 0}


def fsdp_mixed_precision(way: str) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, plain = sharded(net().float(), mp_policy=policy), net()
    x, y = data()
    xs, ys = x[0][part()].float(), y[0][part()]
    loss = 0 * F.cross_entropy(model(xs), ys)
    backward_sharded(loss + prior_of(model, way)(xs, target=ys), model)
    prior_of(plain)(x[0], target=y[0]).backward()
    found = torch.cat([p.grad.full_tensor().double().flatten() for p in model.parameters()])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in plain.parameters()]
    expected = torch.cat([g.flatten() for g in grads])
    # Parameters rounded to eight bits, against float64.
    return {"same direction": float(F.cosine_similarity(found, expected, dim=0)) > 0.995}


case("double_backprop", name="double_backprop")(fsdp_mixed_precision)
case(
    "finite_difference",
    name="finite_difference",
    # A step that eight bits can resolve is not one that the module would take in full precision.
    refused="differentiation='double_backprop'",
)(fsdp_mixed_precision)


@case()
def fsdp_bad_batch() -> Any:
    """Each process sees the gradients of its own shards only."""
    model = sharded(net())
    optimizer = optimiser(model)
    guard, before = StepGuard(optimizer, "skip"), values_of(model)
    model(data()[0][0][part()]).square().mean().backward()
    if dist.get_rank() == 1:
        next(iter(model.parameters())).grad.to_local()[0] = float("nan")
    optimizer.step()
    moved = float((values_of(model) - before).abs().max())
    return {"skipped": guard.skipped == 1, "in place": moved == 0}
