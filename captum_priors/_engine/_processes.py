"""One batch spread over processes: what a statement about all of its examples needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def current_processes() -> Processes | None:
    """Return the processes that share the batch of the prior that is being evaluated, if told."""
    return _current.get()


@contextmanager
def spread_over(processes: Processes) -> Iterator[None]:
    """Evaluate the priors in this block on a batch that these processes share."""
    token = _current.set(processes)
    try:
        yield
    finally:
        _current.reset(token)


def world_size() -> int:
    """Number of processes that train together, one where nobody said."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
