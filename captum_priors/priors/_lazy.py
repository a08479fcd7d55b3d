"""Evaluate a prior on some of the steps."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._checks import check_count, check_inputs
from captum_priors._engine._random import Counter
from captum_priors._types import TensorOrTuple
from captum_priors.priors._base import Prior, check_prior


class Lazy(Prior):
    r"""Evaluate a prior on every k-th training step, weighted by k, and skip the others.

    The average over k steps is that of the prior at a k-th of the cost. The step counter is part
    of the ``state_dict``. A skipped step returns a constant: add it to the loss as ever. Where no
    gradient is recorded, or after ``eval()``, the prior is evaluated unweighted and nothing is
    counted. (Karras et al. 2020 do the same with a gradient penalty.)

    Under gradient accumulation it counts micro-batches, not optimizer steps: the average is the
    same, the gradient more even (with four micro-batches and ``every=4`` one of each four is due),
    and it needs no framework to tell it. All processes of a distributed training count alike.

    Args:
        prior: The prior.
        every: :math:`k \ge 1`.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients, Lazy
        >>> from captum_priors.penalties import l1
        >>> x = torch.randn(4, 3)
        >>> prior = AttributionPrior(ExpectedGradients(torch.nn.Linear(3, 1)), l1, baselines=x)
        >>> lazy = Lazy(prior, every=3)
        >>> [lazy(x).item() > 0 for _ in range(6)]
        [True, False, False, True, False, False]
    """

    def __init__(self, prior: Prior, every: int) -> None:
        super().__init__()
        check_prior(prior)
        check_count("every", every)
        self.prior = prior
        self.every = every
        self.counter = Counter()

    def forward(self, inputs: TensorOrTuple, *data: Any, **named: Any) -> Tensor:
        """Return the weighted value on every k-th step, and zero on the others."""
        if not self.training_step():
            value: Tensor = self.prior(inputs, *data, **named)
            return value
        tensors = isinstance(inputs, (Tensor, tuple))  # some explainers take prompts
        if tensors:
            check_inputs(inputs)
        due = int(self.counter) % self.every == 0
        if due:
            value = self.every * self.prior(inputs, *data, **named)
        else:
            like = as_tuple(inputs)[0] if tensors else torch.zeros(())
            dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
            value = torch.zeros((), dtype=dtype, device=like.device)
        self.counter.advance()
        return value

    def takes(self, name: str) -> bool:
        """Whether the prior inside takes the keyword."""
        return self.prior.takes(name)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        return f"Lazy({self.prior.formula()}, every={self.every})"
