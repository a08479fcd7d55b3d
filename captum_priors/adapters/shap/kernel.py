r"""KernelExplainer and SamplingExplainer: SHAP's own run, its last steps again on tensors.

Kernel, a least squares: with masks :math:`z_s`, weights :math:`\pi_s` and :math:`\Delta =
\operatorname{link} f(x) - \operatorname{link} E f`, SHAP minimises :math:`\sum_s \pi_s
(\operatorname{link}\, v_s - \operatorname{link} E f - z_s\phi)^2` under :math:`\sum_i\phi_i =
\Delta`: linear in the values of the coalitions. The features that its lasso selected are held
fixed, and the others stay zero.

Private: what SHAP's run leaves on its explainer, ``varyingInds``, ``M``, ``nsamplesAdded``,
``maskMatrix``, ``kernelWeights``, ``nsamples``, ``max_samples``, ``l1_reg`` and ``fnull``; and
SamplingExplainer's ``sampling_estimate`` and the arithmetic of its ``explain`` (0.51.0).
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.adapter import Options, ShapAdapter, explanation
from captum_priors.adapters.shap.model import as_numbers, numbers, torch_link, warn_of_truncation

_CLIP = 1e-15  # as SHAP does with probabilities, and the masked-model explainers do not
_WEIGHT = 1e6  # as SHAP, of the one sample of ones in SamplingExplainer's ridge regression


class KernelAdapter(ShapAdapter):
    """Runs SHAP's ``explain`` with a model that keeps its answers as tensors."""

    mechanism = "least squares of SHAP's run, solved on tensors"
    held_fixed = "sampled coalitions, selected features"
    options: ClassVar[tuple[str, ...]] = ("nsamples", "l1_reg", "silent", "gc_collect")

    def _start(self) -> None:
        self._link = torch_link(self.explainer.link, clip=_CLIP)

    def _sample(self) -> Sequence[Any]:
        data = self.explainer.data
        return [data.convert_to_df() if hasattr(data, "convert_to_df") else data.data[:8]]

    def _null(self) -> Tensor:
        """Weighted mean of the outputs over the background, now."""
        outputs = self._torch(self.explainer.data.data)
        null: Tensor = torch.tensordot(self._weights(outputs), outputs, dims=1)
        return null

    def _weights(self, like: Tensor) -> Tensor:
        return torch.as_tensor(np.asarray(self.explainer.data.weights, dtype=float)).to(like)

    def _base(self) -> Tensor:
        return self._link(self._null())

    def _explain(self, rows: Any, options: Options) -> Any:
        self._check_constant(rows)
        background, null = self.explainer.data.data, self._null()
        warn_of_truncation(rows, background)
        found: list[Tensor] = []

        def explain(instance: Any, **given: Any) -> np.ndarray:
            inner, seen = copy.copy(self.explainer), list[Tensor]()

            def model(rows: Any) -> np.ndarray:
                seen.append(self._torch(rows))
                return numbers(seen[-1])

            inner.model = type(inner.model)(model, inner.model.out_names)
            inner.fnull, inner.data = np.atleast_1d(numbers(null)), copy.copy(inner.data)
            if not hasattr(background, "toarray"):
                inner.data.data = numbers(background)
            phi = self._run(inner, instance, given)
            values = torch.as_tensor(phi, device=null.device)
            if torch.is_grad_enabled():
                flat = [outputs.reshape(len(outputs), -1) for outputs in seen]
                values = self._replay(inner, null.reshape(-1), flat, phi).reshape(phi.shape)
            found.append(values)
            return numbers(values)

        worker = copy.copy(self.explainer)
        worker.explain = explain
        worker.shap_values(as_numbers(rows), **options)
        values, base = found[0], self._link(null)
        base = base if values.dim() > 1 else base.reshape(())  # Sampling drops one output's axis
        if np.ndim(rows) > 1:
            values, base = torch.stack(found), base.expand(len(found), *base.shape)
        return explanation(values, base, rows, getattr(self.explainer, "data_feature_names", None))

    def _run(self, inner: Any, instance: Any, options: Options) -> Any:
        return type(self.explainer).explain(inner, instance, **options)

    def _replay(self, inner: Any, null: Tensor, seen: list[Tensor], phi: np.ndarray) -> Tensor:
        """Attributions on tensors, ``(features, outputs)``; ``seen`` starts with f(x)."""
        change = self._link(seen[0][0]) - self._link(null)
        varying = torch.as_tensor(np.asarray(inner.varyingInds, dtype=np.int64)).to(change.device)
        found = change.new_zeros(len(phi), len(change)) + 0 * change  # with a graph in any case
        several = inner.M > 1
        values = self._solution(inner, null, seen, phi) if several else change.expand(inner.M, -1)
        return found.index_put((varying,), values)

    def _solution(self, inner: Any, null: Tensor, seen: list[Tensor], phi: np.ndarray) -> Tensor:
        """Attributions of the features that vary."""
        change = self._link(seen[0][0]) - self._link(null)
        outputs = seen[1].unflatten(0, (inner.nsamplesAdded, -1))
        values = torch.einsum("snd,n->sd", outputs, self._weights(outputs))
        residuals = self._link(values) - self._link(null)
        selects = inner.l1_reg not in (False, 0, "auto") or (
            inner.l1_reg == "auto" and inner.nsamples / inner.max_samples < 0.2
        )
        stock, columns = phi.reshape(len(phi), -1)[inner.varyingInds], []
        for d in range(len(change)):
            kept = np.flatnonzero(stock[:, d]) if selects else np.arange(inner.M)
            columns.append(_least_squares(inner, residuals[:, d], change[d], kept))
        return torch.stack(columns, dim=1)


def _least_squares(inner: Any, residual: Tensor, change: Tensor, kept: np.ndarray) -> Tensor:
    if len(kept) == 0:
        return residual.new_zeros(inner.M)
    masks, weights = inner.maskMatrix[: len(residual), kept], inner.kernelWeights[: len(residual)]
    others = masks[:, :-1] - masks[:, -1:]
    weighted = weights[:, None] * others
    try:
        solution = np.linalg.solve(others.T @ weighted, weighted.T)
    except np.linalg.LinAlgError:  # SHAP's own way out
        root = np.sqrt(weights)
        solution = np.linalg.pinv(root[:, None] * others) * root
    last = torch.as_tensor(masks[:, -1]).to(residual)
    rest = torch.as_tensor(solution).to(residual) @ (residual - last * change)
    phi = torch.cat([rest, (change - rest.sum()).reshape(1)])
    return residual.new_zeros(inner.M).index_put((torch.as_tensor(kept).to(phi.device),), phi)


class SamplingAdapter(KernelAdapter):
    r"""Keeps the differences that SHAP averages, and averages them again.

    The last step spreads what the sum misses over the features by the variances of those
    differences, :math:`\phi \mathrel{+}= e\,v/(1 + \sum v)`: not linear in the model's outputs.
    """

    mechanism = "SHAP's samples, correction on tensors"
    held_fixed = "samples and their numbers"
    options = ("nsamples", "min_samples_per_feature", "silent")
    defaults = {"nsamples": 2000}  # noqa: RUF012  # declared by the base

    def _run(self, inner: Any, instance: Any, options: Options) -> Any:
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
