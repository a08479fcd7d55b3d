"""Evaluate a prior on some of the examples."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._checks import check_inputs, check_target
from captum_priors._engine._processes import current_processes
from captum_priors._engine._random import RandomStream
from captum_priors._errors import expected_found
from captum_priors._rows import take_each
from captum_priors._types import TensorOrTuple
from captum_priors.priors._base import Prior, SumPrior, WeightedPrior, check_keywords, check_prior
from captum_priors.priors._leaf_prior import LeafPrior


class Subsample(Prior):
    r"""Evaluate a prior on a random part of the batch, drawn anew each time.

    The mean over the part estimates the mean over the batch without bias. Baselines that an
    explainer draws from stay whole; those that belong to the examples go with them.

    Args:
        prior: A prior that reduces by ``"mean"``.
        fraction: Share of the examples, in (0, 1]; at least one is taken.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients, Subsample
        >>> seen = []
        >>> def count(attributions):
        ...     seen.append(len(attributions))
        ...     return attributions.abs().sum(1)
        >>> x = torch.randn(8, 3)
        >>> prior = AttributionPrior(ExpectedGradients(torch.nn.Linear(3, 1)), count, baselines=x)
        >>> _ = Subsample(prior, fraction=0.25)(x)
        >>> seen
        [2]
    """

    def __init__(self, prior: Prior, fraction: float) -> None:
        super().__init__()
        check_prior(prior)
        if (
            isinstance(fraction, bool)
            or not isinstance(fraction, (int, float))
            or not (0 < fraction <= 1)
        ):
            raise ValueError(
                expected_found(
                    "`fraction`", "a number in (0, 1]", repr(fraction), "Pass 0.25, say."
                )
            )
        if any(m.reduction != "mean" for m in _leaves(prior)):
            raise ValueError(
                expected_found(
                    "`prior`",
                    "terms that reduce by 'mean'",
                    "one that reduces by 'sum', whose value scales with the number of examples",
                    "Use reduction='mean' and fold the batch size into the weight.",
                )
            )
        self.prior = prior
        self.fraction = float(fraction)
        self.stream = RandomStream(type(self).__name__)

    def forward(
        self,
        inputs: TensorOrTuple,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        **annotations: Any,
    ) -> Tensor:
        """Return the value on a random part of the batch."""
        check_inputs(inputs)
        like = as_tuple(inputs)[0]
        n = like.shape[0]
        check_target(target, n)
        check_keywords(self, baselines, annotations)
        processes = current_processes()
        generator = torch.Generator().manual_seed(
            self.stream.next_seed(
                advance=self.training_step(), rank=processes.rank if processes else 0
            )
        )
        rows = torch.randperm(n, generator=generator)[: max(1, round(self.fraction * n))]
        rows = rows.to(like.device)
        named = {
            "target": target,
            "additional_forward_args": additional_forward_args,
            **annotations,
        }
        chosen = {name: take_each(value, rows, n) for name, value in named.items()}
        # A target given as a tuple is one index for all examples, not one tuple entry for each.
        chosen["target"] = target if isinstance(target, tuple) else chosen["target"]
        return self._evaluate(self.prior, take_each(inputs, rows, n), baselines, rows, n, chosen)

    def _evaluate(
        self,
        prior: Prior,
        inputs: TensorOrTuple,
        baselines: Any,
        rows: Tensor,
        n: int,
        named: dict[str, Any],
    ) -> Tensor:
        """Descend to the terms: each knows whether its baselines go with the examples."""
        if isinstance(prior, WeightedPrior):
            inner = self._evaluate(prior.prior, inputs, baselines, rows, n, named)
            return prior.weight * inner
        if isinstance(prior, SumPrior):
            keep = ("target", "additional_forward_args")
            terms = [
                self._evaluate(
                    term,
                    inputs,
                    baselines if term.takes("baselines") else None,
                    rows,
                    n,
                    {k: v for k, v in named.items() if k in keep or term.takes(k)},
                )
                for term in prior.terms
            ]
            return torch.stack(terms).sum()
        if not any(leaf.draws_baselines for leaf in _leaves(prior)):
            baselines = take_each(baselines, rows, n)
        value: Tensor = prior(inputs, baselines=baselines, **named)
        return value

    def takes(self, name: str) -> bool:
        """Whether the prior inside takes the keyword."""
        return self.prior.takes(name)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        return f"Subsample({self.prior.formula()}, fraction={self.fraction:g})"


def _leaves(prior: Prior) -> list[LeafPrior]:
    return [module for module in prior.modules() if isinstance(module, LeafPrior)]
