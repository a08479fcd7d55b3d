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

    options = ("nsamples", "min_samples_per_feature", "silent")
    _defaults = {"nsamples": 2000}  # noqa: RUF012  # as the base declares

    def _explained(self, inner: Any, instance: Any, options: dict[str, Any]) -> np.ndarray:
        inner.rounds = {}  # of each feature: how many samples, in which of the model's answers

        def estimate(j: int, *args: Any, nsamples: int = 10) -> Any:
            found = type(self.explainer).sampling_estimate(inner, j, *args, nsamples=nsamples)
            inner.rounds.setdefault(int(j), []).append((int(nsamples), found[1]))
            return found

        inner.sampling_estimate = estimate
        inner.least = options.get("min_samples_per_feature", 100)
        return super()._explained(inner, instance, options)

    def _replay(self, inner: Any, null: Tensor, seen: list[Tensor], phi: np.ndarray) -> Tensor:
        at_x = seen[0][0]
        found = at_x.new_zeros(len(phi), len(at_x))
        places = torch.as_tensor([int(i) for i in inner.varyingInds], device=found.device)
        if inner.M == 0:
            return found + 0 * at_x  # with its graph, like any other row
        if inner.M == 1:
            return found.index_put((places,), (at_x - null).unsqueeze(0))
        features = [int(i) for i in inner.varyingInds]
        first = [inner.rounds[i][0][0] for i in features]
        means, variances = map(torch.stack, zip(*map(_moments, seen[1 : 1 + inner.M]), strict=True))
        second = _second_round(inner, features)
        if not bool(variances.detach().any()):
            variances = variances + 1
        variances = variances / variances.sum(0)
        answers = iter(seen[1 + inner.M :])
        each, spread = [], []
        for mean, variance, n, more in zip(means, variances, first, second, strict=True):
            if more > 0:
                mean_more, variance_more = _moments(next(answers))
                mean = (mean * n + mean_more * more) / (n + more)
                variance = (variance * n + variance_more * more) / (n + more)
            each.append(mean)
            spread.append(variance / (n + more) ** 0.5)
        values, spreads = torch.stack(each), torch.stack(spread)
        missing = at_x - values.sum(0) - null
        v = spreads / spreads.amax(0) * _WEIGHT
        # SHAP's v - v S / (1 + S), without the cancellation
        corrected = values + missing * v / (1 + v.sum(0))
        return found.index_put((places,), corrected)


def _moments(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the differences that SHAP averages: on, and off in reverse order."""
    on, off = answers.chunk(2)
    differences = on - off.flip(0)
    return differences.mean(0), differences.var(0, unbiased=False)


def _second_round(inner: Any, features: list[int]) -> list[int]:
    """How many samples SHAP adds for each feature, from the variances of the first round.

    In its rounding it can take two from a feature that got none: such a feature is not estimated
    again, and its variance counts as that of two samples fewer.
    """
    n = max(0, inner.nsamples - inner.M * inner.least)
    share = np.zeros((inner.P, inner.D))
    share[features] = np.stack([np.reshape(inner.rounds[i][0][1], -1) for i in features])
    if share.sum() == 0:
        share += 1
    counts = ((share / share.sum(0))[features].mean(1) * n).astype(int)
    counts += counts % 2
    for i in range(len(counts)):
        counts[i] += 2 * np.sign(n - counts.sum())
    return [int(count) for count in counts]
