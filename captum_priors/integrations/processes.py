"""A prior on a batch that several processes share, and whether they are still together."""

from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from captum_priors._captum import as_tuple
from captum_priors._checks import check_inputs
from captum_priors._errors import refusal
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
        >>> shared.share(x)
        1.0
    """

    def __init__(self, prior: Prior, ddp_or_group: Any = None, *, name: str | None = None) -> None:
        super().__init__(prior, name=name)
        if isinstance(ddp_or_group, DistributedDataParallel):
            ddp_or_group = ddp_or_group.process_group
        is_mesh = hasattr(ddp_or_group, "get_group")
        self.process_group = ddp_or_group.get_group() if is_mesh else ddp_or_group
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
        """
        check_inputs(inputs)
        return self._exchanged(as_tuple(inputs)[0], 0)[0].share

    def _processes(self, like: Tensor) -> Processes:
        """Tell the others how many examples there are, and see that all are at the same step."""
        counting = [module for module in self.modules() if isinstance(module, Counter)]
        if not self._is_alone() and not self._started_together:
            told = [[each.get_extra_state() for each in counting]]
            group: Any = self.process_group or dist.group.WORLD
            dist.broadcast_object_list(told, dist.get_global_rank(group, 0), group)
            for each, state in zip(counting, told[0], strict=False):  # another prior: see below
                each.set_extra_state(state)
            self._started_together = True
        place = crc32(self.formula().encode())
        for each in counting:
            place = crc32(each.get_extra_state().numpy().tobytes(), place)
        processes, places = self._exchanged(like, place)
        if bool((places != place).any()):
            raise refusal(
                ValueError,
                f"prior {self!r}",
                "the same prior at the same step on every process",
                "another than here",
                "Load one state_dict on all of them, and call it on all of them.",
            )
        return processes

    def _exchanged(self, like: Tensor, place: int) -> tuple[Processes, Tensor]:
        """Return what a mean over this process's examples counts for, and everybody's place."""
        row = torch.tensor([len(like), place], device=like.device)
        if self._is_alone():
            rank = world_rank() if self.process_group == "self" else 0
            return Processes(None, rank, 1, 1.0), row[1:]
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(rows, row, group=self.process_group)
        counts, places = torch.stack(rows).T
        share = len(like) * len(counts) / int(counts.sum())
        rank = dist.get_rank(self.process_group)
        return Processes(self.process_group, rank, len(counts), share), places

    def _is_alone(self) -> bool:
        return world_size() == 1 or self.process_group == "self"


def check_synchronised(model: nn.Module, process_group: Any = None) -> None:
    """Raise where processes that train one model no longer have the same parameters.

    Nothing says so when gradients are averaged for a part of a step only: a backward pass of the
    prior's own after that of ``DistributedDataParallel``, a loss that went past the wrapper, a
    ``no_sync`` forgotten, another start. Ask every few hundred steps; it reads each parameter once
    and exchanges a number for each. Parameters that ``fully_shard`` or tensor parallelism has
    spread are left out, since each process has a part of its own.

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
    sums = {
        name: crc32(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        for name, p in model.named_parameters()
        if not hasattr(p, "placements")
    }
    everybody: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everybody, sums, group=process_group)
    names = sorted(set().union(*everybody))
    apart = [name for name in names if len({each.get(name) for each in everybody}) > 1]
    if apart:
        raise refusal(
            RuntimeError,
            "parameters",
            "the same on every process",
            f"{len(apart)} of {len(names)} that differ, the first of them {apart[0]}",
            "Run one backward pass for everything, through the wrapper: (F.cross_entropy("
            "ddp(x), y) + prior(x, target=y)).backward(). A backward pass of the prior's own "
            "goes first, under ddp.no_sync().",
        )
