"""Cases under ``DistributedDataParallel``, with statistics, draws and drift of two processes."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Guarded,
    Lazy,
    Subsample,
    differentiable,
)
from captum_priors.integrations import AcrossProcesses, StepGuard, check_synchronised
from captum_priors.penalties import GraphLaplacian, gini, l2
from tests.integrations.scenarios import (
    FEATURES,
    PRIORS,
    STEPS,
    WAYS,
    alike,
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


@case("double_backprop", name="double_backprop")
@case("recompute", name="recompute")
def synchronised_batch_norm(way: str) -> Any:
    """Statistics of all processes: value and gradient are those of one with the whole batch."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 3))
    spread = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
    x, y = (each[0] for each in data())
    expected = prior_of(whole, way)(x, target=y)
    value = prior_of(spread, way)(x[part()], target=y[part()])
    facts = {}
    wanted = torch.autograd.grad(expected, [*whole.parameters()], allow_unused=True)
    found = torch.autograd.grad(value, [*spread.parameters()], allow_unused=True)
    for i, (ours, one) in enumerate([(value.detach(), expected), *zip(found, wanted, strict=True)]):
        if ours is not None:
            mean = ours.clone()
            dist.all_reduce(mean)
            facts[str(i)] = torch.allclose(mean / 2, one, rtol=1e-9, atol=1e-12)
    return facts


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
        model.second[0].bias.data.view(torch.int64)[3] ^= 1
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


for _way in WAYS:
    case(_way, {}, name=_way, refused="DistributedDataParallel")(wrapped)
case("double_backprop", {"static_graph": True}, name="static", refused="DistributedDataParallel")(
    wrapped
)
case(refused="DistributedDataParallel")(hidden_wrapper)
case(refused="DistributedDataParallel")(bare_explainer)


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
