"""One batch spread over processes, and models that are.

Explain the module, train through its wrapper, in one backward pass. Wrappers know nothing of what
happens past them, so what they need is a rule, and not looked for:
``captum_priors.integrations`` has it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from captum_priors._errors import NotDifferentiableError, refusal


@dataclass(frozen=True)
class Processes:
    """The processes that share a batch, and this one's place among them.

    Gradients are averaged over processes afterwards, as ``DistributedDataParallel`` and
    ``fully_shard`` do; ``share`` is what a mean over this process's examples counts for then.
    """

    group: Any
    rank: int
    size: int
    share: float

    def whole(self, rows: Tensor) -> Tensor:
        """Join the rows of all processes, with the graph of this one's.

        Every process computes the same statistic of the joined rows, so each knows the gradient by
        its own rows without asking; times the number of processes, because it will be averaged.
        """
        if self.size == 1:
            return rows
        own = rows.detach().contiguous()
        lengths = [torch.zeros(1, dtype=torch.long, device=own.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.full_like(lengths[0], len(own)), group=self.group)
        sizes = [int(n) for n in lengths]
        sent = own.to(torch.uint8) if own.dtype is torch.bool else own
        padded = sent.new_zeros(max(sizes), *sent.shape[1:])
        padded[: len(sent)] = sent
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self.group)
        parts = [part[:n].to(own.dtype) for part, n in zip(received, sizes, strict=True)]
        if rows.requires_grad:
            parts[self.rank] = own + self.size * (rows - own)
        return torch.cat(parts)


_current: ContextVar[Processes | None] = ContextVar("processes", default=None)
current_processes: Callable[[], Processes | None] = _current.get  # of the prior, where told


@contextmanager
def spread_over(processes: Processes) -> Iterator[None]:
    """Evaluate the priors in this block on a batch that these processes share."""
    token = _current.set(processes)
    try:
        yield
    finally:
        _current.reset(token)


is_distributed: Callable[[], bool] = dist.is_initialized if dist.is_available() else bool
"""Whether several processes may train together."""


def world_size() -> int:
    """Number of processes that train together, one where nobody said."""
    return dist.get_world_size() if is_distributed() else 1


def world_rank() -> int:
    """Place of this process among all, zero where nobody said."""
    return dist.get_rank() if is_distributed() else 0


def rank_of_draws() -> int:
    """Whose numbers a prior draws: processes with examples of their own have their own."""
    processes = _current.get()
    return world_rank() if processes is None else processes.rank


def any_process(flag: Tensor) -> bool:
    """Whether the flag is up here or in another of the processes: all have to ask."""
    processes = _current.get()
    group, size = (processes.group, processes.size) if processes else (None, world_size())
    if size > 1:
        raised = flag.int()
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
        return bool(raised)
    return bool(flag)


def _fsdp(name: str) -> tuple[type[nn.Module], ...]:
    """Return a class of FSDP, whose import takes long, where it has been imported."""
    found = getattr(sys.modules.get("torch.distributed.fsdp"), name, None)
    return () if found is None else (found,)


def wrapper_classes() -> tuple[type[nn.Module], ...]:
    """Wrappers whose forward pass is no explanation's business: the module inside is explained.

    ``DistributedDataParallel`` prepares its averaging anew in each (with ``static_graph`` it would
    stop in silence); ``FullyShardedDataParallel`` cannot be differentiated twice.
    """
    return (DataParallel, DistributedDataParallel, *_fsdp("FullyShardedDataParallel"))


def wrapped(module: nn.Module) -> NotDifferentiableError:
    """Word that a wrapper was given where the module inside is explained."""
    return refusal(
        NotDifferentiableError,
        "`forward_func`",
        "the module that is trained",
        f"the {type(module).__name__} around it, whose forward pass prepares the next backward",
        "Explain wrapper.module, call the wrapper for the training loss, and run one backward() "
        "over both.",
    )


def refuse_spread_parameters(modules: Sequence[nn.Module], *, twice: bool) -> None:
    """Refuse tensor parallelism that a prior was not told of, or that loses its gradient.

    Processes that compute an example together must draw the same numbers for it; and torch does
    not differentiate their exchange twice, and does not say so. Once is enough: in a prior's first
    training step. ``twice`` says that parameters get their gradient through that of the inputs.
    """
    if world_size() == 1 or not _computed_together(modules):
        return
    if _current.get() is None:
        raise refusal(
            ValueError,
            "model whose parameters are spread over processes",
            "to be told which processes have examples of their own",
            "nothing said",
            "Write captum_priors.integrations.AcrossProcesses(prior, mesh['data'].get_group()).",
        )
    if twice:
        raise refusal(
            NotDifferentiableError,
            "double backpropagation",
            "a model that each process computes by itself",
            "tensor-parallel parameters, whose exchange torch does not differentiate twice",
            "Use differentiation='finite_difference'.",
        )


def _sharded(modules: Sequence[nn.Module]) -> list[Any]:
    return [module for module in modules if isinstance(module, _fsdp("FSDPModule"))]


def _computed_together(modules: Sequence[nn.Module]) -> bool:
    """Whether processes share the computation of an example (tensor parallelism).

    Parameters that ``fully_shard`` alone has spread are whole when they compute. It spreads over
    one dimension of a mesh, behind one of copies in a hybrid; with tensor parallelism both spread.
    """
    of_fsdp: set[int] = set()
    for module in _sharded(modules):
        module.reshard()  # as it is stored, wherever the step is
        of_fsdp.update(map(id, module.parameters()))
    for p in (p for module in modules for p in module.parameters(recurse=False)):
        spread: Any = getattr(p, "placements", ())
        hybrid = len(spread) == 2 and spread[0].is_replicate()
        if spread and not (id(p) in of_fsdp and (len(spread) == 1 or hybrid)):
            return True
    return False


def part_of_whole(
    value: Tensor, modules: Sequence[nn.Module], *, mean: bool, of_batch: bool, training: bool
) -> Tensor:
    """Weigh the value of this process's part of a batch: a mean, a sum or a statistic of it."""
    processes = current_processes()
    if of_batch:
        if processes is None and training and world_size() > 1:
            raise refusal(
                ValueError,
                "statistic of a batch",
                "to be told which examples make the batch, because several processes train "
                "together",
                "nothing said",
                "Write captum_priors.integrations.AcrossProcesses(prior) where the processes share "
                "each batch, or AcrossProcesses(prior, 'self') where every process has a batch of "
                "its own.",
            )
    elif processes is not None:
        value = value * (processes.share if mean else processes.size)
    return needs_unsharded(value, modules)


# Modules of ``fully_shard`` whose parameters an ``unsharded`` block keeps whole.
unsharded_now: WeakSet[nn.Module] = WeakSet()


def needs_unsharded(value: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """Raise in the backward pass of a prior's value if ``fully_shard`` would spoil it.

    The graph of an input gradient refers to whole parameters, whose memory ``fully_shard`` frees
    when the first backward pass through a module is over; and what reaches a parameter after that
    is left behind, in silence.
    """
    sharded = _sharded(modules)

    def on_gradient(gradient: Tensor) -> None:
        for module in sharded:
            if module not in unsharded_now:
                raise refusal(
                    NotDifferentiableError,
                    "backward pass of a prior on a model of fully_shard",
                    "its parameters to stay whole",
                    "that they do not",
                    "Write: with captum_priors.integrations.fsdp.unsharded(model): "
                    "loss.backward().",
                )
            module.unshard()

    if sharded and value.requires_grad:
        value.register_hook(on_gradient)
    return value
