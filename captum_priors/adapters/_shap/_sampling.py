r"""SamplingExplainer: SHAP's samples, with its variance-weighted correction done on tensors.

Each feature's estimate is a mean of differences, and the number of samples it gets is held fixed.
The last step spreads what the sum misses over the features by the variances of those differences,
:math:`\phi \mathrel{+}= e\,v/(1 + \sum v)`: not linear in the model's outputs.
"""

from typing import Any

import torch
from torch import Tensor

from captum_priors.adapters._shap._kernel import KernelFamily

# As SHAP: weight of the one sample of ones in its ridge regression.
_WEIGHT = 1e6


class SamplingFamily(KernelFamily):
    """Keeps the differences that SHAP averages, and averages them again."""

    _estimates: dict[int, list[tuple[int, Tensor, Tensor]]] | None = None

    def sampling_estimate(
        self,
        j: int,
        f: Any,
        x: Any,
        X: Any,  # noqa: N803  # SHAP's name
        nsamples: int = 10,
    ) -> Any:
        """Estimate one feature, as SHAP."""
        found = self._stock.sampling_estimate(self, j, f, x, X, nsamples)
        if self._seen is not None:
            evals = self._seen[-1].reshape(2 * nsamples, -1)
            differences = evals[:nsamples] - evals[nsamples:].flip(0)
            if self._estimates is None:
                self._estimates = {}
            self._estimates.setdefault(j, []).append(
                (int(nsamples), differences.mean(0), differences.var(0, unbiased=False))
            )
        return found

    def _replay(self, inner: Any, null: Tensor, at_x: Tensor, phi: Any) -> Tensor:
        found = at_x.new_zeros(inner.P, len(at_x))
        places = torch.as_tensor([int(i) for i in inner.varyingInds], device=found.device)
        if inner.M == 0:
            return found + 0 * at_x  # with its graph, like any other row
        if inner.M == 1:
            return found.index_put((places,), (at_x - null).unsqueeze(0))
        estimates = [inner._estimates[int(i)] for i in inner.varyingInds]
        variances = torch.stack([first[2] for first, *_ in estimates])
        if float(variances.detach().sum()) == 0:
            variances = variances + 1
        variances = variances / variances.sum(0)
        means, spread = [], []
        for variance, ((n, mean, _), *more) in zip(variances, estimates, strict=True):
            for n_more, mean_more, variance_more in more:
                total = n + n_more
                mean = (mean * n + mean_more * n_more) / total
                variance = (variance * n + variance_more * n_more) / total
                n = total
            means.append(mean)
            spread.append(variance / n**0.5)
        values, spreads = torch.stack(means), torch.stack(spread)
        missing = at_x - values.sum(0) - null
        v = spreads / spreads.amax(0) * _WEIGHT
        # SHAP's v - v S / (1 + S), without the cancellation
        corrected = values + missing * v / (1 + v.sum(0))
        return found.index_put((places,), corrected)
