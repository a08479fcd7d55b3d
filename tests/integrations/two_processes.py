"""What two processes do that train one model: a table of cases, run by one ``torchrun``.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.integrations.two_processes FILE``
writes what each case found, or the error that it met. Every process computes what one process
with the whole batch would have, and compares.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
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
from captum_priors.integrations import AcrossProcesses, StepGuard
from captum_priors.penalties import GraphLaplacian, gini, l2, total_variation
from captum_priors.stability import InputGradientRegularization, JacobianRegularization

Case = Callable[[], Any]
CASES: dict[str, Case] = {}

STEPS, EXAMPLES, FEATURES = 3, 8, 6


def case(*arguments: Any, name: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the table, under its name and what it is called with."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        label = " ".join([function.__name__, *([name] if name else [])])
        CASES[label] = lambda: function(*arguments)
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


def ig(model: Any, way: str = "double_backprop") -> Any:
    return differentiable(IntegratedGradients(model), differentiation=way)


def prior_of(model: Any, way: str = "double_backprop", penalty: Any = l2) -> Any:
    return AttributionPrior(ig(model, way), penalty, n_steps=4)


# How a term is made from the model that is explained.
PRIORS: dict[str, Callable[[nn.Module], Any]] = {
    "double_backprop": prior_of,
    "recompute": lambda m: prior_of(m, "recompute"),
    "finite_difference": lambda m: prior_of(m, "finite_difference"),
    "sum with Lazy": lambda m: (
        0.5 * AttributionPrior(differentiable(Saliency(m)), total_variation)
        + Lazy(prior_of(m), every=2)
    ),
    "StabilityPrior": lambda m: StabilityPrior(Saliency(m), mse, lambda x: 1.1 * x),
    "JacobianRegularization": lambda m: JacobianRegularization(m, n_samples=None),
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
    no_sync: Callable[[bool], Any] = lambda last: nullcontext(),
) -> Tensor:
    """Train and return all parameters."""
    x, y = data()
    optimizer = optimiser(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = zip(x[step][examples].chunk(micro), y[step][examples].chunk(micro), strict=True)
        for i, (xs, ys) in enumerate(parts):
            extra = {"weight": xs[:, 0].detach()} if annotated else {}
            with no_sync(i == micro - 1):
                loss = share(xs) * F.cross_entropy(wrapped(xs), ys)
                ((loss + prior(xs, target=ys, **extra)) / micro).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
    return values_of(model)


def alone(make_prior: Callable[[nn.Module], Any], **options: Any) -> Tensor:
    """Train in one process, on the whole batch."""
    model = net()
    prior = AcrossProcesses(make_prior(model), "self")
    return train(model, model, prior, slice(None), **options)


def error(found: Tensor, expected: Tensor) -> dict[str, float]:
    size = float((expected - values_of(net())).abs().max())
    assert size > 0.02  # it trained
    return {"error": float((found - expected).abs().max()), "apart": alike(found)}


DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


def ddp_trains(name: str, options: dict[str, Any]) -> Any:
    model = net()
    found = train(model, DDP(model, **options), PRIORS[name](model), part())
    return error(found, alone(PRIORS[name]))


for _name in PRIORS:
    for _options in DDP_OPTIONS:
        if _name in {"double_backprop", "finite_difference", "sum with Lazy"} or not _options:
            case(_name, DDP_OPTIONS[_options], name=f"{_options or 'plain'}: {_name}")(ddp_trains)


def shared_trains(options: dict[str, Any], penalty: Any, uneven: bool, reduction: str) -> Any:
    """Through AcrossProcesses."""

    def make(model: nn.Module) -> Any:
        return AttributionPrior(ig(model), penalty, n_steps=4, reduction=reduction)

    model = net()
    prior = AcrossProcesses(0.5 * make(model) + make(model))
    options_of = {"annotated": penalty is balanced}
    found = train(
        model,
        DDP(model, **options),
        prior,
        part(uneven=uneven),
        share=prior.share,
        **options_of,
    )
    return error(found, alone(lambda m: 1.5 * make(m), **options_of))


for _label, _penalty in {"each": l2, "gini": gini, "graph": OneNumber(), "own": balanced}.items():
    for _uneven in (False, True):
        _kind = "uneven" if _uneven else "even"
        case({}, _penalty, _uneven, "mean", name=f"{_label} {_kind}")(shared_trains)
case({"static_graph": True}, gini, True, "mean", name="gini uneven static_graph")(shared_trains)
case({}, l2, True, "sum", name="sum uneven")(shared_trains)


@case()
def gini_of_parts_differs() -> Any:
    """What AcrossProcesses is for: the statistic of each part is another one."""
    model = net()
    prior = AcrossProcesses(prior_of(model, penalty=gini), "self")
    found = train(model, DDP(model), prior, part())
    return error(found, alone(lambda m: prior_of(m, penalty=gini)))


@case()
def accumulation() -> Any:
    """Two micro-batches, of which only the last is reduced."""
    model = net()
    ddp = DDP(model)

    def no_sync(last: bool) -> Any:
        return nullcontext() if last else ddp.no_sync()

    found = train(model, ddp, prior_of(model), part(), micro=2, no_sync=no_sync)
    return error(found, alone(prior_of))


@case()
def prior_first_under_no_sync() -> Any:
    """A backward pass of the prior's own, before the one that averages."""
    model = net()
    ddp, prior, optimizer = DDP(model), prior_of(model), optimiser(model)
    x, y = data()
    for step in range(STEPS):
        optimizer.zero_grad()
        xs, ys = x[step][part()], y[step][part()]
        with ddp.no_sync():
            prior(xs, target=ys).backward()
        F.cross_entropy(ddp(xs), ys).backward()
        optimizer.step()
    return error(values_of(model), alone(prior_of, clip=False))


@case()
def inside_forward() -> Any:
    """As Lightning does: the step is the wrapped module's forward pass."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()
            self.prior = prior_of(self.model)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = F.cross_entropy(self.model(x), y) + self.prior(x, target=y)
            return loss

    found = []
    for options in DDP_OPTIONS.values():
        step = Step()
        ddp, optimizer = DDP(step, **options), optimiser(step)
        x, y = data()
        for i in range(STEPS):
            optimizer.zero_grad()
            ddp(x[i][part()], y[i][part()]).backward()
            optimizer.step()
        found.append(error(values_of(step.model), alone(prior_of, clip=False)))
    return {name: max(f[name] for f in found) for name in ("error", "apart")}


@case()
def normalisation() -> Any:
    """BatchNorm in train mode: its buffers, and the parameters, stay those of all processes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Dropout(0.2), nn.Linear(8, 3)
    )
    ddp = DDP(model)
    found = train(model, ddp, prior_of(model), part())
    ddp.eval()
    ddp(torch.zeros(1, FEATURES))
    train_buffers = torch.cat([b.double().flatten() for b in model.buffers()])
    return {"apart": max(alike(found), alike(train_buffers)), "moved": float(train_buffers[-1])}


# Draws


def drawn(prior: Any, x: Tensor) -> Tensor:
    return torch.stack([prior(x, target=0).detach() for _ in range(4)])


@case()
def draws_differ() -> Any:
    """On the same examples, from streams with the same seed."""
    model = net()
    x = data()[0][0]
    torch.manual_seed(3)
    bare, wrapped, shared = (
        AttributionPrior(ExpectedGradients(model), l2, baselines=x, n_samples=1) for _ in range(3)
    )
    before = alike(drawn(bare, x))
    _ddp = DDP(model)
    return {
        "no wrapper": before,
        "wrapper": alike(drawn(wrapped, x)),
        "AcrossProcesses": alike(drawn(AcrossProcesses(shared), x)),
        "evaluation": alike(drawn(wrapped.eval(), x)),
    }


@case()
def streams_start_together() -> Any:
    """One checkpoint holds for all: the first process's streams are everybody's."""
    x, model = data()[0][0], net()
    torch.manual_seed(dist.get_rank())
    prior = AttributionPrior(ExpectedGradients(model), l2, baselines=x, n_samples=1)
    prior = AcrossProcesses(Lazy(Subsample(prior, 0.5), every=2))
    drawn(prior, x[part()])
    state = torch.cat([v.flatten() % 1_000_003 for v in prior.state_dict().values()]).double()
    return {"apart": alike(state), "tensors": len(state)}


@case()
def lazy_in_step() -> Any:
    x = data()[0][0]
    prior = Lazy(Subsample(prior_of(net()), 0.5), every=2)
    due = torch.tensor([float(prior(x[part()], target=0) != 0) for _ in range(5)])
    return {"apart": alike(due), "due": float(due.sum())}


@case()
def evaluation_on_one_process() -> Any:
    """No process waits for another where no gradient is recorded."""
    prior = AcrossProcesses(prior_of(net(), penalty=gini))
    x = data()[0][0]
    if dist.get_rank() == 0:
        with torch.no_grad():
            value = prior(x, target=0)
        return {"same": bool(value == prior.eval()(x, target=0))}
    return {"same": True}


# Refused


def step_with(
    explained: Callable[[DDP], Any],
    backward: Callable[[DDP, Tensor, Tensor, Any], None],
    options: dict[str, Any],
    way: str = "double_backprop",
) -> Any:
    model = net()
    ddp = DDP(model, **options)
    prior = prior_of(explained(ddp), way)
    x, y = data()
    optimizer = optimiser(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(ddp, x[step][part()], y[step][part()], prior)
        optimizer.step()
    return {"apart": alike(values_of(model))}


def together(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    (F.cross_entropy(ddp(x), y) + prior(x, target=y)).backward()


def loss_first(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    F.cross_entropy(ddp(x), y).backward()
    prior(x, target=y).backward()


def loss_first_after_both(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    loss, value = F.cross_entropy(ddp(x), y), prior(x, target=y)
    loss.backward()
    value.backward()


def prior_first(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    prior(x, target=y).backward()
    F.cross_entropy(ddp(x), y).backward()


def prior_first_unreduced(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    with ddp.no_sync():
        prior(x, target=y).backward()
    F.cross_entropy(ddp(x), y).backward()


def past_the_wrapper(ddp: DDP, x: Tensor, y: Tensor, prior: Any) -> None:
    (F.cross_entropy(ddp.module(x), y) + prior(x, target=y)).backward()


def hidden(ddp: DDP) -> Any:
    held = {"anything": [lambda: ddp]}

    def forward(x: Tensor) -> Tensor:
        out: Tensor = held["anything"][0]()(x)
        return out

    return forward


def module_of(ddp: DDP) -> nn.Module:
    module: nn.Module = ddp.module
    return module


_STATIC: dict[str, Any] = {"static_graph": True}
for _backward in (loss_first, loss_first_after_both, prior_first, past_the_wrapper):
    for _options in DDP_OPTIONS:
        case(module_of, _backward, DDP_OPTIONS[_options], name=f"{_backward.__name__} {_options}")(
            step_with
        )
case(module_of, prior_first_unreduced, _STATIC, name="static_graph under no_sync")(step_with)
for _way in ("double_backprop", "recompute", "finite_difference"):
    case(lambda ddp: ddp, together, {}, _way, name=f"wrapper {_way}")(step_with)
case(lambda ddp: ddp, together, _STATIC, name="wrapper static_graph")(step_with)
case(hidden, together, _STATIC, name="wrapper hidden")(step_with)


@case()
def bare_explainer_static_graph() -> Any:
    """Without a prior, too."""
    ddp = DDP(net(), static_graph=True)
    x, y = data()
    maps = ig(ddp).attribute(x[0], target=y[0], n_steps=4)
    return {"apart": alike(maps.detach())}


@case()
def gradients_of_a_prior() -> Any:
    """``torch.autograd.grad`` accumulates nothing: it may be asked past the wrapper."""
    model = net()
    _ddp = DDP(model)
    x, y = data()
    value = prior_of(model)(x[0], target=y[0])
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return {"found": sum(g is not None for g in found)}


@case()
def undecided() -> Any:
    prior = prior_of(net(), penalty=gini)
    x = data()[0][0]
    with torch.no_grad():
        prior(x, target=0)
    prior(x, target=0)


@case()
def out_of_step() -> Any:
    prior = AcrossProcesses(Lazy(prior_of(net()), every=2))
    x = data()[0][0]
    if dist.get_rank() == 0:
        prior.prior(x, target=0)
    prior(x, target=0)


def another_group(wrap: Callable[[nn.Module, Any], nn.Module]) -> Any:
    """Two processes that train a model each."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    model = net()
    _wrapped = wrap(model, groups[dist.get_rank()])
    AcrossProcesses(prior_of(model))(data()[0][0], target=0)


def alone_sharded(model: nn.Module, group: Any) -> nn.Module:
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    model(data()[0][0])
    return model


case(lambda m, group: DDP(m, process_group=group), name="ddp")(another_group)
case(alone_sharded, name="fsdp")(another_group)


@case()
def joined_without() -> Any:
    """A prior of each example needs no other process: one may have a batch more."""
    model = net()
    ddp, optimizer = DDP(model), optimiser(model)
    prior = prior_of(model)
    x, y = data()
    with Join([ddp]):
        for step in range(STEPS - dist.get_rank()):
            optimizer.zero_grad()
            together(ddp, x[step][part()], y[step][part()], prior)
            optimizer.step()
    return {
        "apart": alike(values_of(model)),
        "moved": float((values_of(model) - values_of(net())).abs().max()),
    }


@case()
def joined() -> Any:
    model = net()
    ddp = DDP(model)
    prior = AcrossProcesses(prior_of(model))
    x, y = data()
    with Join([ddp]):
        together(ddp, x[0], y[0], prior)


@case()
def fsdp1() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
        prior_of(model, "finite_difference")(data()[0][0], target=0)


def tensor_parallel(way: str, told: bool) -> Any:
    """Two processes that compute one model's outputs on the same examples."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    model = net()
    plan = {"first.0": ColwiseParallel(), "second.0": RowwiseParallel()}
    parallelize_module(model, mesh["model"], plan)
    torch.manual_seed(3)
    prior = AttributionPrior(
        ExpectedGradients(model, differentiation=way), l2, baselines=data()[0][0], n_samples=2
    )
    prior = AcrossProcesses(prior, mesh["data"].get_group() if told else None)
    found = train(model, model, prior, slice(None), clip=False)

    def make(model: nn.Module) -> Any:
        torch.manual_seed(3)
        return AttributionPrior(
            ExpectedGradients(model, differentiation=way), l2, baselines=data()[0][0], n_samples=2
        )

    return error(found, alone(make, clip=False))


case("finite_difference", False, name="undecided")(tensor_parallel)
for _way in ("double_backprop", "recompute", "finite_difference"):
    case(_way, True, name=_way)(tensor_parallel)


# Sharded


def spoil(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Examples of this process, of which the second process's are not finite."""
    rows = x[part()].clone()
    return (rows * float("nan") if dist.get_rank() else rows), y[part()]


@case("Guarded", name="Guarded")
@case("StepGuard", name="StepGuard")
def bad_batch_on_one_process(piece: str) -> Any:
    """One process's batch is not finite: both go without the prior, or without the step."""
    model = net()
    ddp, optimizer = DDP(model), optimiser(model)
    prior: Any = Guarded(prior_of(model), "skip")
    guard = StepGuard(optimizer, "skip")
    x, y = data()
    before = values_of(model)
    inputs, labels = spoil(x[0], y[0])
    task = x[0][part()] if piece == "Guarded" else inputs
    loss = F.cross_entropy(ddp(task), labels)
    if piece == "Guarded":
        loss = loss + prior(inputs, target=labels)
    loss.backward()
    optimizer.step()
    found = values_of(model)
    return {
        "skipped": int(prior.skips) if piece == "Guarded" else guard.skipped,
        "moved": float((found - before).abs().max()),
        "finite": bool(found.isfinite().all()),
        "apart": alike(found),
    }


@case()
def fsdp_bad_batch() -> Any:
    """Each process sees the gradients of its own shards only."""
    model = sharded(net(), layers=True, reshard=True)
    optimizer = optimiser(model)
    guard = StepGuard(optimizer, "skip")
    before = values_of(model)
    model(data()[0][0][part()]).square().mean().backward()
    if dist.get_rank() == 1:
        next(iter(model.parameters())).grad.to_local()[0] = float("nan")
    optimizer.step()
    moved = float((values_of(model) - before).abs().max())
    return {"skipped": guard.skipped, "moved": moved}


def sharded(model: nn.Module, *, layers: bool, reshard: bool, **options: Any) -> nn.Module:
    if layers:
        for layer in (model.first, model.second):
            fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=reshard, **options)
    return model


def fsdp_trains(make_prior: Callable[[nn.Module], Any], layers: bool, reshard: bool) -> Any:
    model = sharded(net(), layers=layers, reshard=reshard)
    found = train(model, model, make_prior(model), part())
    groups = [
        group.reshard_after_backward
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]
    assert groups
    assert all(groups)
    return error(found, alone(make_prior))


for _name in PRIORS:
    for _layers in (True, False):
        for _reshard in (True, False):
            if _name in {"double_backprop", "finite_difference"} or (_layers and _reshard):
                _label = f"{'layers' if _layers else 'root'}{' reshard' if _reshard else ''}"
                case(PRIORS[_name], _layers, _reshard, name=f"{_label}: {_name}")(fsdp_trains)


@case()
def fsdp_shared_statistic() -> Any:
    def make(model: nn.Module) -> Any:
        return prior_of(model, penalty=gini)

    model = sharded(net(), layers=True, reshard=True)
    prior = AcrossProcesses(make(model))
    found = train(model, model, prior, part(uneven=True), share=prior.share)
    return error(found, alone(make))


@case()
def fsdp_accumulation() -> Any:
    model = sharded(net(), layers=True, reshard=True)

    def no_sync(last: bool) -> Any:
        model.set_requires_gradient_sync(last)
        return nullcontext()

    found = train(model, model, prior_of(model), part(), micro=2, no_sync=no_sync)
    return error(found, alone(prior_of))


@case()
def fsdp_two_backwards() -> Any:
    model = sharded(net(), layers=True, reshard=True)
    prior, optimizer = prior_of(model), optimiser(model)
    x, y = data()
    for step in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x[step][part()]), y[step][part()]).backward()
        prior(x[step][part()], target=y[step][part()]).backward()
        optimizer.step()
    return error(values_of(model), alone(prior_of, clip=False))


def fsdp_prior_first(way: str) -> Any:
    """The prior's graph is made before the loss's, and so comes back after it."""
    model = sharded(net(), layers=True, reshard=True)
    prior, optimizer = prior_of(model, way), optimiser(model)
    x, y = data()
    for step in range(STEPS):
        optimizer.zero_grad()
        value = prior(x[step][part()], target=y[step][part()])
        (value + F.cross_entropy(model(x[step][part()]), y[step][part()])).backward()
        optimizer.step()
    return error(values_of(model), alone(prior_of, clip=False))


case("double_backprop", name="double_backprop")(fsdp_prior_first)
case("recompute", name="recompute")(fsdp_prior_first)
case("finite_difference", name="finite_difference")(fsdp_prior_first)


@case()
def fsdp_two_terms() -> Any:
    """Terms of both kinds, each in turn the one whose graph comes first."""

    def make(model: nn.Module) -> Any:
        exact, first_order = prior_of(model), prior_of(model, "finite_difference")
        return exact + first_order + 0.5 * exact

    model = sharded(net(), layers=True, reshard=True)
    found = train(model, model, make(model), part())
    return error(found, alone(make))


@case()
def fsdp_draws_differ() -> Any:
    model = sharded(net(), layers=True, reshard=True)
    x = data()[0][0]
    prior = AttributionPrior(ExpectedGradients(model), l2, baselines=x, n_samples=1)
    return {"apart": alike(drawn(prior, x))}


def fsdp_mixed_precision(way: str) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(net().float(), layers=True, reshard=True, mp_policy=policy)
    x, y = data()
    loss = F.cross_entropy(model(x[0][part()].float()), y[0][part()])
    plain, full = net(), prior_of
    prior = prior_of(model, way)
    (0 * loss + prior(x[0][part()].float(), target=y[0][part()])).backward()
    full(plain)(x[0], target=y[0]).backward()
    found = [p.grad.full_tensor().double().flatten() for p in model.parameters()]
    expected = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
        for p in plain.parameters()
    ]
    cosine = F.cosine_similarity(torch.cat(found), torch.cat(expected), dim=0)
    return {"cosine": float(cosine)}


case("double_backprop", name="double_backprop")(fsdp_mixed_precision)
case("finite_difference", name="finite_difference")(fsdp_mixed_precision)


def run(cases: dict[str, Case]) -> Iterator[tuple[str, Any]]:
    for name, function in cases.items():
        torch.manual_seed(0)
        try:
            yield name, function()
        except Exception as problem:  # what it met is the result
            yield name, {"raised": type(problem).__name__, "message": str(problem)}
        dist.barrier()


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    chosen = {k: v for k, v in CASES.items() if not names or any(n in k for n in names)}
    found = dict(run(chosen))
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(everybody), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
