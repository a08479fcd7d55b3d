r"""SamplingExplainer: SHAP's samples, with its variance-weighted correction done on tensors.

Each feature's estimate is a mean of differences, and the number of samples it gets is held fixed.
The last step spreads what the sum misses over the features by the variances of those differences,
:math:`\phi \mathrel{+}= e\,v/(1 + \sum v)`: not linear in the model's outputs.

Private: ``sampling_estimate``, and the arithmetic of ``explain`` (0.51.0).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.kernel import KernelAdapter

# As SHAP: weight of the one sample of ones in its ridge regression.
_WEIGHT = 1e6


class SamplingAdapter(KernelAdapter):
    """Keeps the differences that SHAP averages, and averages them again."""

    mechanism = "SHAP's samples, correction on tensors"
    held_fixed = "samples and their numbers"
    options = ("nsamples", "min_samples_per_feature", "silent")
    defaults = {"nsamples": 2000}  # noqa: RUF012  # declared by the base

    def _run(self, inner: Any, instance: Any, options: dict[str, Any]) -> np.ndarray:
        inner.rounds = []  # how many samples a feature got, and their variance

        def estimate(*args: Any, nsamples: int = 10) -> Any:
            found = type(self.explainer).sampling_estimate(inner, *args, nsamples=nsamples)
            inner.rounds.append((int(nsamples), np.reshape(found[1], -1)))
            return found

        inner.sampling_estimate = estimate
        inner.least = options.get("min_samples_per_feature", 100)
        return super()._run(inner, instance, options)

    def _solution(self, inner: Any, null: Tensor, seen: list[Tensor], phi: np.ndarray) -> Tensor:
        moments = [_moments(answers) for answers in seen[1:]]
        variances = torch.stack([variance for _, variance in moments[: inner.M]])
        if not bool(variances.detach().any()):
            variances = variances + 1
        variances = variances / variances.sum(0)
        more = iter(moments[inner.M :])
        means, spread = [], []
        for i, added in enumerate(_second_round(inner)):
            n, (mean, _), variance = inner.rounds[i][0], moments[i], variances[i]
            if added > 0:
                mean_more, variance_more = next(more)
                mean = (mean * n + mean_more * added) / (n + added)
                variance = (variance * n + variance_more * added) / (n + added)
            means.append(mean)
            spread.append(variance / (n + added) ** 0.5)
        values, spreads = torch.stack(means), torch.stack(spread)
        missing = seen[0][0] - values.sum(0) - null
        v = spreads / spreads.amax(0) * _WEIGHT
        # SHAP's v - v S / (1 + S), without the cancellation
        return values + missing * v / (1 + v.sum(0))


def _moments(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the differences that SHAP averages: on, and off in reverse order."""
    on, off = answers.chunk(2)
    differences = on - off.flip(0)
    return differences.mean(0), differences.var(0, unbiased=False)


def _second_round(inner: Any) -> list[int]:
    """How many samples SHAP adds for each feature, from the variances of the first round.

    In its rounding it can take two from a feature that got none: such a feature is not estimated
    again, and its variance counts as that of two samples fewer.
    """
    n = max(0, inner.nsamples - inner.M * inner.least)
    share = np.zeros((inner.P, inner.D))
    share[inner.varyingInds] = [variance for _, variance in inner.rounds[: inner.M]]
    share += share.sum() == 0
    counts = ((share / share.sum(0))[inner.varyingInds].mean(1) * n).astype(int)
    counts += counts % 2
    for i in range(len(counts)):
        counts[i] += 2 * np.sign(n - counts.sum())
    return [int(count) for count in counts]
