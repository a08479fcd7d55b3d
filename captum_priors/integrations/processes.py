"""A prior on a batch that several processes share, and whether they are still together."""

from collections.abc import Iterable
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from captum_priors._captum import as_tuple
from captum_priors._checks import check_inputs
from captum_priors._errors import expected_found
from captum_priors._types import TensorOrTuple
from captum_priors.engine.processes import Processes, spread_over, world_rank, world_size
from captum_priors.engine.random import Counter  # streams are counters, too
from captum_priors.priors.base import Prior
from captum_priors.priors.combined import Wrapper


class AcrossProcesses(Wrapper):
    r"""Evaluate a prior on the batch that all processes share, not on each one's part of it.

    With :math:`W` processes that hold :math:`n_r` of :math:`N` examples and whose gradients
    ``DistributedDataParallel`` or ``fully_shard`` averages, training is that of one process with
    the whole batch:

    .. math:: \frac1W \sum_r \nabla_\theta\, \frac{W n_r}{N} \Omega_r
        = \nabla_\theta\, \frac1N \sum_{\text{examples}} \omega

    for penalties of each example; a statement about the batch (Gini, graph) is made of the
    attributions of all processes, with its gradient. The loss needs the same weights where the
    parts are uneven: multiply it by :meth:`share`. All processes take the streams and counters of
    the first; each then draws different numbers for its own examples.

    Processes exchange numbers in each call while they train: all must make it, so none may stop
    before the others (in a ``join`` context those would wait). Without gradients, or after
    ``eval()``, nothing is exchanged and the value is that of the process's own examples.

    Args:
        prior: The prior.
        ddp_or_group: The processes that share the batch: a ``DistributedDataParallel`` (those that
            it averages over), a process group, a ``DeviceMesh`` of one dimension, by default all;
            ``"self"`` where this process has a batch of its own.

    Raises:
        ValueError: If the processes are not at the same step of the same prior.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients
        >>> from captum_priors.integrations import AcrossProcesses
        >>> from captum_priors.penalties import gini
        >>> x = torch.randn(8, 3)
        >>> explainer = ExpectedGradients(torch.nn.Linear(3, 1))
        >>> prior = AttributionPrior(explainer, gini, baselines=x)
        >>> shared = AcrossProcesses(prior)
        >>> torch.allclose(shared(x), prior(x))  # one process alone
        True
    """

    def __init__(self, prior: Prior, ddp_or_group: Any = None) -> None:
        super().__init__(prior)
        self.process_group = _group_of(ddp_or_group)
        self._started_together = False

    def forward(self, inputs: TensorOrTuple, *data: Any, **named: Any) -> Tensor:
        """Return this process's part of the value, whose average over processes is the value."""
        value: Tensor
        if not self.training_step():
            value = self.prior(inputs, *data, **named)
            return value
        check_inputs(inputs)
        with spread_over(self._processes(as_tuple(inputs)[0])):
            value = self.prior(inputs, *data, **named)
        return value

    def share(self, inputs: TensorOrTuple) -> float:
        r"""Return :math:`W n_r / N`, the weight of a mean over this process's examples.

        Every process of the group must ask.

        Example:
            >>> import torch
            >>> from captum_priors import AttributionPrior, ExpectedGradients
            >>> from captum_priors.integrations import AcrossProcesses
            >>> from captum_priors.penalties import l1
            >>> explainer = ExpectedGradients(torch.nn.Linear(3, 1))
            >>> AcrossProcesses(AttributionPrior(explainer, l1)).share(torch.randn(8, 3))
            1.0
        """
        check_inputs(inputs)
        if self._size() == 1:
            return 1.0
        like = as_tuple(inputs)[0]
        return self._share(self._all(torch.tensor([len(like)], device=like.device))[:, 0])

    def _processes(self, like: Tensor) -> Processes:
        """Tell the others how many examples there are, and see that all are at the same step."""
        if self._size() == 1:
            return Processes(None, world_rank() if self.process_group == "self" else 0, 1, 1.0)
        parts = [module for module in self.modules() if isinstance(module, Counter)]
        if not self._started_together:
            told = [[part.get_extra_state() for part in parts]]
            group: Any = self.process_group or dist.group.WORLD
            dist.broadcast_object_list(told, dist.get_global_rank(group, 0), group)
            for part, state in zip(parts, told[0], strict=False):  # another prior: see below
                part.set_extra_state(state)
            self._started_together = True
        place = crc32(self.formula().encode())
        for part in parts:
            place = crc32(part.get_extra_state().numpy().tobytes(), place)
        counts, places = self._all(torch.tensor([len(like), place], device=like.device)).T
        if bool((places != place).any()):
            raise ValueError(
                expected_found(
                    f"prior {self!r}",
                    "the same prior at the same step on every process",
                    "another than here",
                    "Load one state_dict on all of them, and call it on all of them.",
                )
            )
        rank = dist.get_rank(self.process_group)
        return Processes(self.process_group, rank, self._size(), self._share(counts))

    def _share(self, counts: Tensor) -> float:
        rank = dist.get_rank(self.process_group)
        return int(counts[rank]) * len(counts) / int(counts.sum())

    def _all(self, row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(self._size())]
        dist.all_gather(rows, row, group=self.process_group)
        return torch.stack(rows)

    def _size(self) -> int:
        if self.process_group == "self" or world_size() == 1:
            return 1
        return dist.get_world_size(self.process_group)


def _group_of(ddp_or_group: Any) -> Any:
    if isinstance(ddp_or_group, DistributedDataParallel):
        return ddp_or_group.process_group
    if hasattr(ddp_or_group, "get_group"):  # a DeviceMesh
        return ddp_or_group.get_group()
    if ddp_or_group in (None, "self") or isinstance(ddp_or_group, dist.ProcessGroup):
        return ddp_or_group
    raise ValueError(
        expected_found(
            "`ddp_or_group`",
            "a DistributedDataParallel, a process group, None or 'self'",
            repr(ddp_or_group),
            "Pass for example mesh['data'].get_group().",
        )
    )


def check_synchronised(model: nn.Module, process_group: Any = None) -> None:
    """Raise where processes that train one model no longer have the same parameters.

    Nothing says so when gradients are averaged for a part of a step only: a backward pass of the
    prior's own after that of ``DistributedDataParallel``, a loss that went past the wrapper, a
    ``no_sync`` forgotten, another start. Ask every few hundred steps; it reads each parameter once
    and exchanges two numbers. Parameters that ``fully_shard`` or tensor parallelism has spread are
    left out, since each process has a part of its own.

    Args:
        model: The model, or its wrapper.
        process_group: Processes that train it together, by default all. Every one must ask.

    Raises:
        RuntimeError: On every process, if any bit differs.

    Example:
        >>> import torch
        >>> from captum_priors.integrations import check_synchronised
        >>> check_synchronised(torch.nn.Linear(3, 1))  # one process alone
    """
    if world_size() == 1:
        return
    sums = {n: _checksum(p.detach()) for n, p in model.named_parameters() if not _is_spread(p)}
    if not sums:
        return
    device = next(model.parameters()).device
    ours = torch.tensor(crc32(repr(sums.items()).encode()), device=device)
    both = torch.stack([ours, -ours])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=process_group)
    if int(both[0]) == -int(both[1]):
        return
    everybody: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everybody, sums, group=process_group)
    names = dict.fromkeys(name for each in everybody for name in each)
    apart = [name for name in names if len({each.get(name) for each in everybody}) > 1]
    raise RuntimeError(
        expected_found(
            "parameters",
            "the same on every process",
            f"{len(apart)} of {len(names)} that differ, the first of them {apart[0]}",
            "Run one backward pass for everything, through the wrapper: (F.cross_entropy(ddp(x), y)"
            " + prior(x, target=y)).backward(). A backward pass of the prior's own goes first, "
            "under ddp.no_sync().",
        )
    )


def _is_spread(parameter: Tensor) -> bool:
    return hasattr(parameter, "placements")


def _checksum(tensor: Tensor) -> int:
    """Return a number made of every bit, by place: one that differs makes another number."""
    word = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    words = tensor.contiguous().flatten().view(word)
    pieces: Iterable[Tensor] = words.split(1 << 20)  # the memory for a large parameter's
    odd = 2 * torch.arange(1 << 20, device=tensor.device) + 1
    return crc32(repr([int((piece * odd[: len(piece)]).sum()) for piece in pieces]).encode())
