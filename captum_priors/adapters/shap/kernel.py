r"""KernelExplainer: the weighted least squares of SHAP's own run, solved again on tensors.

With masks :math:`z_s`, weights :math:`\pi_s` and :math:`\Delta = \operatorname{link} f(x) -
\operatorname{link} E f`, SHAP minimises :math:`\sum_s \pi_s (\operatorname{link}\, v_s -
\operatorname{link} E f - z_s\phi)^2` under :math:`\sum_i\phi_i = \Delta`: linear in the values of
the coalitions. The features that its lasso selected are held fixed, and the others stay zero.

Private: what SHAP's run leaves on its explainer, ``varyingInds``, ``M``, ``nsamplesAdded``,
``maskMatrix``, ``kernelWeights``, ``nsamples``, ``max_samples``, ``l1_reg`` and ``fnull`` (0.51.0).
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.adapter import ShapAdapter, explanation
from captum_priors.adapters.shap.model import as_numbers, numbers, torch_link, warn_of_truncation

_CLIP = 1e-15  # as SHAP does with probabilities, and the masked-model explainers do not


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

    def _explain(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        self._check_constant(args)
        (rows,) = args
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

    def _run(self, inner: Any, instance: Any, options: dict[str, Any]) -> np.ndarray:
        found: np.ndarray = type(self.explainer).explain(inner, instance, **options)
        return found

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
