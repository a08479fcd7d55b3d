"""A prior on a batch that several processes share."""

from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._checks import check_inputs
from captum_priors._engine._processes import Processes, spread_over
from captum_priors._engine._random import Counter, RandomStream
from captum_priors._engine._wrappers import computed_together, ranks_that_train, wrappers_of
from captum_priors._errors import expected_found
from captum_priors._types import TensorOrTuple
from captum_priors.priors._base import Prior, check_prior
from captum_priors.priors._leaf_prior import LeafPrior


class AcrossProcesses(Prior):
    r"""Evaluate a prior on the batch that all processes share, not on each one's part of it.

    With :math:`W` processes that hold :math:`n_r` of :math:`N` examples and whose gradients
    ``DistributedDataParallel`` or ``fully_shard`` averages, training is that of one process with
    the whole batch:

    .. math:: \frac1W \sum_r \nabla_\theta\, \frac{W n_r}{N} \Omega_r
        = \nabla_\theta\, \frac1N \sum_{\text{examples}} \omega

    for penalties of each example; a statement about the batch (Gini, graph) is made of the
    attributions of all processes, with its gradient. The loss needs the same weights where the
    parts are uneven: multiply it by :meth:`share`. All processes take the seed of the first;
    each then draws different numbers for its own examples.

    Processes exchange numbers in each call while they train: all must make it. Without gradients,
    or after ``eval()``, nothing is exchanged and the value is that of the process's own examples.

    Args:
        prior: The prior.
        process_group: The processes that share the batch, by default all of them; ``"self"`` where
            this process has a batch of its own.

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

    prior: Prior

    def __init__(self, prior: Prior, process_group: Any = None) -> None:
        super().__init__()
        check_prior(prior)
        if isinstance(process_group, str) and process_group != "self":
            raise ValueError(
                expected_found(
                    "`process_group`",
                    "a process group, None or 'self'",
                    repr(process_group),
                    "Pass for example mesh['data'].get_group().",
                )
            )
        self.prior = prior
        self.process_group = process_group
        self._same_streams = False

    def forward(self, inputs: TensorOrTuple, *data: Any, **named: Any) -> Tensor:
        """Return this process's part of the value, whose average over processes is the value."""
        if not self.training_step():
            value: Tensor = self.prior(inputs, *data, **named)
            return value
        processes = Processes(None, 0, 1, 1.0)
        if self._size() > 1:
            check_inputs(inputs)
            self._check_split()
            processes = self._processes(as_tuple(inputs)[0])
        with spread_over(processes):
            shared: Tensor = self.prior(inputs, *data, **named)
        return shared

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
        if not self._same_streams:
            for stream in self._each(RandomStream):
                seed = stream.seed.to(like.device)
                stream.seed.copy_(self._all(seed.reshape(1))[0, 0])
            self._same_streams = True
        steps = [int(counter) for counter in self._each(Counter)]
        place = crc32(repr((self.formula(), steps)).encode())
        told = self._all(torch.tensor([len(like), place], device=like.device))
        if bool((told[:, 1] != place).any()):
            raise ValueError(
                expected_found(
                    f"prior {self!r}",
                    "the same prior at the same step on every process",
                    f"another than here (steps {steps} of its parts)",
                    "Load one state_dict on all of them, and call it on all of them.",
                )
            )
        rank = dist.get_rank(self.process_group)
        return Processes(self.process_group, rank, self._size(), self._share(told[:, 0]))

    def _share(self, counts: Tensor) -> float:
        rank = dist.get_rank(self.process_group)
        return int(counts[rank]) * len(counts) / int(counts.sum())

    def _all(self, row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(self._size())]
        dist.all_gather(rows, row, group=self.process_group)
        return torch.stack(rows)

    def _size(self) -> int:
        if self.process_group == "self" or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    def _check_split(self) -> None:
        """Refuse processes that do other work than examples of this model, and those that stop."""
        for leaf in self._each(LeafPrior):
            modules = leaf.explained_modules()
            if self.process_group is None and computed_together(modules):
                raise ValueError(
                    expected_found(
                        "`process_group`",
                        "the processes that have different examples, because the model is spread "
                        "over processes in another way, too",
                        "none",
                        "Pass process_group=mesh['data'].get_group().",
                    )
                )
            averaged = ranks_that_train(modules)
            ranks = set(dist.get_process_group_ranks(self.process_group or dist.group.WORLD))
            if averaged and averaged != ranks:
                raise ValueError(
                    expected_found(
                        "`process_group`",
                        f"the processes that train the model together, {sorted(averaged)}",
                        str(sorted(ranks)),
                        "Pass the group that its wrapper was given.",
                    )
                )
            if any(wrapper._join_config.enable for wrapper in wrappers_of(modules)):
                raise ValueError(
                    expected_found(
                        f"prior {self!r}",
                        "all processes to make every call",
                        "a join context, in which some stop before others",
                        "Give every process equally many batches (DistributedSampler does), or use "
                        "priors of each example without AcrossProcesses.",
                    )
                )

    def _each(self, kind: type[Any]) -> list[Any]:
        return [module for module in self.modules() if isinstance(module, kind)]

    def takes(self, name: str) -> bool:
        """Whether the prior inside takes the keyword."""
        return self.prior.takes(name)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        return f"AcrossProcesses({self.prior.formula()})"
