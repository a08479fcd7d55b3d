"""What two processes do that train one model: a table of cases, run by one ``torchrun``.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.integrations.two_processes FILE
[PART OF A NAME ...]`` writes what each case found, or the error that it met. Every process computes
what one process with the whole batch would have, and compares.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Guarded,
    Lazy,
    StabilityPrior,
    Subsample,
    differentiable,
)
from captum_priors.distances import mse
from captum_priors.integrations import AcrossProcesses, StepGuard, check_synchronised
from captum_priors.integrations.fsdp import unsharded
from captum_priors.penalties import GraphLaplacian, gini, l2, total_variation
from captum_priors.stability import InputGradientRegularization, JacobianRegularization

WAYS = ("double_backprop", "recompute", "finite_difference")
STEPS, EXAMPLES, FEATURES = 3, 8, 6


@dataclass(frozen=True)
class Case:
    """One row: what runs, and a part of the message where it is refused.

    Others return ``{"error": ..., "apart": ...}`` after a training, or facts that hold.
    """

    run: Callable[[], Any]
    refused: str | None = None


CASES: dict[str, Case] = {}


def case(
    *arguments: Any, name: str = "", refused: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the table, under its name and what it is called with."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        label = " ".join([function.__name__, *([name] if name else [])])
        CASES[label] = Case(lambda: function(*arguments), refused)
        return function

    return add


class Net(nn.Module):
    """Blocks that can be sharded, with a bias that no attribution reaches at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 16), nn.Softplus())
        self.second = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x)))
        return out


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, EXAMPLES, FEATURES, generator=generator)
    return x, torch.randint(3, (STEPS, EXAMPLES), generator=generator)


def part(*, uneven: bool = False) -> slice:
    """Examples of this process."""
    middle = EXAMPLES // 2 + (2 if uneven else 0)
    return slice(0, middle) if dist.get_rank() == 0 else slice(middle, EXAMPLES)


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)


def values_of(model: nn.Module) -> Tensor:
    each = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in each])


def alike(values: Tensor) -> float:
    """Largest difference between the processes."""
    both = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(both, values)
    return float((both[0] - both[1]).abs().max())


def prior_of(model: Any, way: str = "double_backprop", penalty: Any = l2, **options: Any) -> Any:
    explainer = differentiable(IntegratedGradients(model), differentiation=way)
    return AttributionPrior(explainer, penalty, n_steps=4, **options)


def drawing(model: Any, way: str = "double_backprop") -> Any:
    explainer = ExpectedGradients(model, differentiation=way)
    prior = AttributionPrior(explainer, l2, baselines=data()[0][0], n_samples=2)
    prior.stream.generator.manual_seed(3)  # another prior's start is another
    return prior


# How a term is made from the model that is explained.
PRIORS: dict[str, Callable[[nn.Module], Any]] = {
    **{way: lambda m, way=way: prior_of(m, way) for way in WAYS},
    "sum with Lazy": lambda m: (
        0.5 * AttributionPrior(differentiable(Saliency(m)), total_variation)
        + Lazy(prior_of(m), every=2)
    ),
    "StabilityPrior": lambda m: StabilityPrior(Saliency(m), mse, lambda x: 1.1 * x),
    "JacobianRegularization": lambda m: JacobianRegularization(m, n_probes=None),
    "InputGradientRegularization": lambda m: InputGradientRegularization(m),
    "finite_difference regularizer": lambda m: InputGradientRegularization(
        m, differentiation="finite_difference"
    ),
}


def balanced(attributions: Tensor, weight: Tensor) -> Tensor:
    """A statement about the batch with an annotation of each example."""
    return (weight.unsqueeze(1) * attributions).mean(0).square().sum()


class OneNumber(nn.Module):
    """The graph penalty, as a user would hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = GraphLaplacian(torch.ones(FEATURES, FEATURES))

    def forward(self, attributions: Tensor) -> Tensor:
        value: Tensor = self.graph(attributions)
        return value


PENALTIES: dict[str, Any] = {"each": l2, "gini": gini, "graph": OneNumber(), "own": balanced}


def backward(loss: Tensor, model: nn.Module, *, last: bool = True) -> None:
    loss.backward()


def backward_sharded(loss: Tensor, model: nn.Module, *, last: bool = True) -> None:
    with unsharded(model, synchronise=last):
        loss.backward()


def train(
    model: nn.Module,
    wrapped: nn.Module,
    prior: Any,
    examples: slice,
    *,
    share: Callable[[Tensor], float] = lambda x: 1.0,
    micro: int = 1,
    annotated: bool = False,
    clip: bool = True,
    no_sync: Callable[[], Any] = nullcontext,
    backward: Callable[..., None] = backward,
    prior_first: bool = False,
) -> Tensor:
    """Train and return all parameters."""
    x, y = data()
    optimizer = optimiser(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = zip(x[step][examples].chunk(micro), y[step][examples].chunk(micro), strict=True)
        for i, (xs, ys) in enumerate(parts):
            extra = {"weight": xs[:, 0].detach()} if annotated else {}
            last = i == micro - 1
            with nullcontext() if last else no_sync():
                value = prior(xs, target=ys, **extra) if prior_first else 0
                loss = share(xs) * F.cross_entropy(wrapped(xs), ys) + value
                if not prior_first:
                    loss = loss + prior(xs, target=ys, **extra)
                backward(loss / micro, model, last=last)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
    check_synchronised(model)
    return values_of(model)


def compared(
    found: Tensor, make_prior: Callable[[nn.Module], Any], **options: Any
) -> dict[str, float]:
    """How far the processes are apart, and from one process with the whole batch."""
    model = net()
    start = values_of(model)
    groups = [dist.new_group([rank]) for rank in range(2)]
    prior = AcrossProcesses(make_prior(model), groups[dist.get_rank()])
    expected = train(model, model, prior, slice(None), **options)
    assert float((expected - start).abs().max()) > 0.02  # it trained
    return {"error": float((found - expected).abs().max()), "apart": alike(found)}


# DistributedDataParallel

DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


def ddp_trains(name: str, options: dict[str, Any]) -> Any:
    model = net()
    found = train(model, DDP(model, **options), PRIORS[name](model), part())
    return compared(found, PRIORS[name])


for _name in PRIORS:
    for _kind, _options in DDP_OPTIONS.items():
        if _kind == "plain" or _name in ("double_backprop", "finite_difference", "sum with Lazy"):
            case(_name, _options, name=f"{_kind}: {_name}")(ddp_trains)


def shared_trains(penalty: Any, uneven: bool, reduction: str, options: dict[str, Any]) -> Any:
    """Through AcrossProcesses."""

    def make(model: nn.Module) -> Any:
        return prior_of(model, penalty=penalty, reduction=reduction)

    model = net()
    ddp, annotated = DDP(model, **options), penalty is balanced
    prior = AcrossProcesses(0.5 * make(model) + make(model), ddp)
    examples = part(uneven=uneven)
    found = train(model, ddp, prior, examples, share=prior.share, annotated=annotated)
    return compared(found, lambda m: 1.5 * make(m), annotated=annotated)


for _label, _penalty in PENALTIES.items():
    case(_penalty, True, "mean", {}, name=f"{_label} uneven")(shared_trains)
case(gini, False, "mean", {}, name="gini even")(shared_trains)
case(gini, True, "mean", {"static_graph": True}, name="gini static_graph")(shared_trains)
case(l2, True, "sum", {}, name="sum uneven")(shared_trains)


@case()
def statistic_of_parts() -> Any:
    """What AcrossProcesses is for: the statistic of each part is another one."""
    model = net()
    prior = AcrossProcesses(prior_of(model, penalty=gini), "self")
    found = train(model, DDP(model), prior, part())
    return {"differs": compared(found, lambda m: prior_of(m, penalty=gini))["error"] > 0.01}


@case()
def accumulation_trains() -> Any:
    """Two micro-batches, of which only the last is reduced."""
    model = net()
    ddp = DDP(model)
    found = train(model, ddp, prior_of(model), part(), micro=2, no_sync=ddp.no_sync)
    return compared(found, prior_of)


@case()
def group_of_the_wrapper_trains() -> Any:
    """Each process has a model of its own, under a wrapper that says so."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    model = net()
    ddp = DDP(model, process_group=groups[dist.get_rank()])
    found = train(model, ddp, AcrossProcesses(prior_of(model, penalty=gini), ddp), slice(None))
    return compared(found, lambda m: prior_of(m, penalty=gini))


def prior_first_trains(under_no_sync: bool) -> Any:
    """A backward pass of the prior's own, before the one that averages."""
    model = net()
    ddp, prior, optimizer = DDP(model), prior_of(model), optimiser(model)
    x, y = data()
    for step in range(STEPS):
        optimizer.zero_grad()
        xs, ys = x[step][part()], y[step][part()]
        with ddp.no_sync() if under_no_sync else nullcontext():
            prior(xs, target=ys).backward()
        F.cross_entropy(ddp(xs), ys).backward()
        optimizer.step()
    return compared(values_of(model), prior_of, clip=False)


case(True, name="under no_sync")(prior_first_trains)
case(False, name="without")(prior_first_trains)


def inside_forward_trains(options: dict[str, Any]) -> Any:
    """As Lightning does: the step is the wrapped module's forward pass."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()
            self.prior = prior_of(self.model)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = F.cross_entropy(self.model(x), y) + self.prior(x, target=y)
            return loss

    step = Step()
    ddp, optimizer = DDP(step, **options), optimiser(step)
    for x, y in zip(*data(), strict=True):
        optimizer.zero_grad()
        ddp(x[part()], y[part()]).backward()
        optimizer.step()
    return compared(values_of(step.model), prior_of, clip=False)


for _kind, _options in DDP_OPTIONS.items():
    case(_options, name=_kind)(inside_forward_trains)


@case()
def running_statistics() -> Any:
    """BatchNorm in train mode: its buffers, and the parameters, stay those of all processes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Dropout(0.2), nn.Linear(8, 3)
    )
    ddp = DDP(model)
    found = train(model, ddp, prior_of(model), part())
    ddp.eval()
    ddp(torch.zeros(1, FEATURES))
    buffers = torch.cat([b.double().flatten() for b in model.buffers()])
    # One batch at each step: the attribution passes are not counted.
    return {"together": alike(found) == alike(buffers) == 0, "batches": float(buffers[-1]) == STEPS}


@case()
def uneven_numbers_of_batches() -> Any:
    """A prior of each example needs no other process: one may have a batch more."""
    model = net()
    ddp, optimizer, prior = DDP(model), optimiser(model), prior_of(model)
    before = values_of(model)
    x, y = data()
    with Join([ddp]):
        for step in range(STEPS - dist.get_rank()):
            optimizer.zero_grad()
            together(ddp, x[step][part()], y[step][part()], prior)
            optimizer.step()
    found = values_of(model)
    return {"together": alike(found) == 0, "trained": float((found - before).abs().max()) > 0.02}


# Draws


def drawn(prior: Any, x: Tensor) -> Tensor:
    return torch.stack([prior(x, target=0).detach() for _ in range(4)])


@case()
def draws() -> Any:
    """On the same examples, from streams that start alike."""
    model, x = net(), data()[0][0]
    told = AcrossProcesses(drawing(model), "self")
    return {
        "differ": alike(drawn(drawing(model), x)) > 0,
        "differ under AcrossProcesses": alike(drawn(AcrossProcesses(drawing(model)), x)) > 0,
        "differ where each has its own batch": alike(drawn(told, x)) > 0,
        "are one in evaluation": alike(drawn(drawing(model).eval(), x)) == 0,
    }


@case()
def streams_and_counters() -> Any:
    """One checkpoint holds for all: the first process's streams are everybody's."""
    x, model = data()[0][0], net()
    torch.manual_seed(dist.get_rank())
    prior = AttributionPrior(ExpectedGradients(model), l2, baselines=x, n_samples=1)
    prior = AcrossProcesses(Lazy(Subsample(prior, 0.5), every=2))
    if dist.get_rank() == 1:
        prior.prior(x, target=0)  # a step ahead
    due = [float(prior(x[part()], target=0)) != 0 for _ in range(5)]
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (due, prior.state_dict()))
    states = [{k: torch.as_tensor(v).tolist() for k, v in state.items()} for _, state in both]
    return {
        "together": states[0] == states[1] and len(states[0]) >= 3,
        "due": both[0][0] == both[1][0] == [True, False, True, False, True],
    }


@case(refused="the same prior at the same step on every process")
def out_of_step() -> Any:
    prior = AcrossProcesses(Lazy(prior_of(net()), every=2))
    x = data()[0][0]
    prior(x, target=0)
    if dist.get_rank() == 0:
        prior.prior(x, target=0)
    prior(x, target=0)


@case(refused="the same prior at the same step on every process")
def another_prior() -> Any:
    reduction = "sum" if dist.get_rank() else "mean"
    AcrossProcesses(prior_of(net(), reduction=reduction))(data()[0][0], target=0)


@case()
def evaluation_on_one_process() -> Any:
    """No process waits for another where no gradient is recorded."""
    model, x = net(), data()[0][0]
    prior, bare = AcrossProcesses(prior_of(model, penalty=gini)), prior_of(model, penalty=gini)
    same = True
    if dist.get_rank() == 0:
        with torch.no_grad():
            same = bool(prior(x, target=0) == bare(x, target=0))
        same = same and bool(prior.eval()(x, target=0) == bare.eval()(x, target=0))
    return {"the first process's own": same}


@case(refused="Write captum_priors.integrations.AcrossProcesses(prior)")
def undecided_statistic() -> Any:
    prior = prior_of(net(), penalty=gini)
    x = data()[0][0]
    with torch.no_grad():
        prior(x, target=0)
    prior(x, target=0)


# Processes that drift apart


def together(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    (F.cross_entropy(ddp(x), y) + prior(x, target=y)).backward()


def loss_first(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    F.cross_entropy(ddp(x), y).backward()
    prior(x, target=y).backward()


def past_the_wrapper(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    (F.cross_entropy(ddp.module(x), y) + prior(x, target=y)).backward()


def forgotten_no_sync(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    with ddp.no_sync():
        together(ddp, x, y, prior)


def drifts(backward: Callable[..., None], options: dict[str, Any]) -> Any:
    model = net()
    ddp, prior, optimizer = DDP(model, **options), prior_of(model), optimiser(model)
    x, y = data()
    for step in range(STEPS):
        check_synchronised(ddp)
        optimizer.zero_grad()
        backward(ddp, x[step][part()], y[step][part()], prior)
        optimizer.step()


for _kind, _options in DDP_OPTIONS.items():
    for _backward in (loss_first, past_the_wrapper):
        _label = f"{_backward.__name__} {_kind}"
        case(_backward, _options, name=_label, refused="expected the same on every process")(drifts)
case(forgotten_no_sync, {}, name="no_sync", refused="expected the same on every process")(drifts)


@case(refused="1 of 6 that differ, the first of them second.0.bias")
def one_bit() -> Any:
    model = net()
    check_synchronised(model)
    if dist.get_rank():
        bias = model.second[0].bias.data
        bias[3] = torch.nextafter(bias[3], torch.tensor(1.0))
    check_synchronised(model)


# Explained through the wrapper


def wrapped(way: str, options: dict[str, Any]) -> Any:
    ddp = DDP(net(), **options)
    together(ddp, *(t[0] for t in data()), prior_of(ddp, way))


def hidden_wrapper() -> Any:
    ddp = DDP(net(), static_graph=True)
    together(ddp, *(t[0] for t in data()), prior_of(lambda x: ddp(x)))


def bare_explainer() -> Any:
    ddp = DDP(net(), static_graph=True)
    x, y = data()
    differentiable(IntegratedGradients(ddp)).attribute(x[0], target=y[0], n_steps=4)


def fsdp1() -> Any:
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    prior_of(model, "finite_difference")(data()[0][0], target=0)


for _way in WAYS:
    case(_way, {}, name=_way, refused="DistributedDataParallel")(wrapped)
case("double_backprop", {"static_graph": True}, name="static", refused="DistributedDataParallel")(
    wrapped
)
case(refused="DistributedDataParallel")(hidden_wrapper)
case(refused="DistributedDataParallel")(bare_explainer)
case(refused="FullyShardedDataParallel")(fsdp1)


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
    return fsdp_trains(
        lambda m: prior_of(m) + prior_of(m, "finite_difference") + 0.5 * prior_of(m)
    )


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


@case(refused="a module that torch.distributed.fsdp.fully_shard has sharded, found Net")
def fsdp_not_sharded() -> Any:
    with unsharded(net()):
        pass


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
case("finite_difference", name="finite_difference")(fsdp_mixed_precision)


# Batches that are not finite


def bad_batch_on_one_process(piece: str) -> Any:
    """Both go without the prior, or without the step."""
    model = net()
    ddp, optimizer = DDP(model), optimiser(model)
    prior: Any = Guarded(prior_of(model), "skip")
    guard = StepGuard(optimizer, "skip")
    good, labels = data()[0][0][part()], data()[1][0][part()]
    bad = good * float("nan") if dist.get_rank() else good
    before = values_of(model)
    if piece == "Guarded":
        (F.cross_entropy(ddp(good), labels) + prior(bad, target=labels)).backward()
    else:
        F.cross_entropy(ddp(bad), labels).backward()
    optimizer.step()
    found = values_of(model)
    moved, skips = float((found - before).abs().max()) > 0, (int(prior.skips), guard.skipped)
    return {
        "skipped": skips == ((1, 0) if piece == "Guarded" else (0, 1)),
        "moved or not": moved == (piece == "Guarded"),
        "finite": bool(found.isfinite().all()),
        "together": alike(found) == 0,
    }


case("Guarded", name="Guarded")(bad_batch_on_one_process)
case("StepGuard", name="StepGuard")(bad_batch_on_one_process)


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


def run(cases: dict[str, Case]) -> Iterator[tuple[str, Any]]:
    for name, row in cases.items():
        torch.manual_seed(0)
        try:
            yield name, row.run()
        except Exception as problem:  # what it met is the result
            yield name, {"raised": type(problem).__name__, "message": str(problem)}
        dist.barrier()


def main(path: str, *names: str) -> None:
    from tests.integrations.frameworks import CASES as FRAMEWORKS

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    cases = {**CASES, **FRAMEWORKS}
    found = dict(run({k: v for k, v in cases.items() if not names or any(n in k for n in names)}))
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(everybody), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
