r"""KernelExplainer: the weighted least squares of SHAP's own run, solved again on tensors.

With masks :math:`z_s`, weights :math:`\pi_s` and :math:`\Delta = \operatorname{link} f(x) -
\operatorname{link} E f`, SHAP minimises :math:`\sum_s \pi_s (\operatorname{link}\, v_s -
\operatorname{link} E f - z_s\phi)^2` under :math:`\sum_i\phi_i = \Delta`: linear in the values of
the coalitions. The features that its lasso selected are held fixed, and the others stay zero.

Private: what SHAP's run leaves on its explainer, ``varyingInds``, ``M``, ``nsamplesAdded``,
``maskMatrix``, ``kernelWeights``, ``nsamples``, ``max_samples``, ``l1_reg`` and ``fnull`` (0.51.0).
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors._types import Target
from captum_priors.adapters.shap.adapter import ShapAdapter, explanation, select_output
from captum_priors.adapters.shap.model import (
    Link,
    as_numbers,
    numbers,
    table,
    torch_link,
    warn_of_truncation,
)


class KernelAdapter(ShapAdapter):
    """Runs SHAP's ``explain`` with a model that keeps its answers as tensors."""

    options = ("nsamples", "l1_reg", "silent", "gc_collect")

    def _start(self) -> None:
        self._link: Link = torch_link(self.explainer.link, clipped=True)

    def _sample(self) -> tuple[Any, ...]:
        return (self._background()[:8],)

    def _background(self) -> Any:
        """The background as SHAP passes it to the model."""
        data = self.explainer.data
        return data.convert_to_df() if hasattr(data, "convert_to_df") else data.data

    def _null(self) -> Tensor:
        """Weighted mean of the outputs over the background, now."""
        outputs = self._torch(self._background())
        return torch.tensordot(self._weights(outputs), outputs, dims=1)

    def _weights(self, like: Tensor) -> Tensor:
        return torch.as_tensor(np.asarray(self.explainer.data.weights, dtype=float)).to(like)

    def _base(self) -> Tensor:
        return self._link(self._null())

    def _explain(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        (rows,) = args
        found, base = self._rows(rows, options)
        single = np.ndim(rows) == 1
        values = found[0] if single else torch.stack(found)
        if found[0].dim() == 1:  # SamplingExplainer drops the axis of one output
            base = base.reshape(())
        base = base if single else base.expand(len(found), *base.shape)
        names = getattr(self.explainer, "data_feature_names", None)
        return explanation(values, base, rows, names, features=0 if single else 1)

    def _values(
        self, tensors: tuple[Tensor, ...], target: Target, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        found, _ = self._rows(tensors[0], options)
        return (select_output(torch.stack(found), tensors[0], target),)

    def _rows(self, rows: Any, options: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
        """Attributions of each row, and the base value."""
        self._check_constant([rows])
        null = self._null()
        found: list[Tensor] = []

        def explain(instance: Any, **given: Any) -> np.ndarray:
            inner, seen, phi = self._run(instance, given, null)
            values = torch.as_tensor(phi, device=null.device)
            if torch.is_grad_enabled():
                flat = [outputs.reshape(len(outputs), -1) for outputs in seen]
                values = self._replay(inner, null.reshape(-1), flat, phi).reshape(phi.shape)
            found.append(values)
            return numbers(values)

        self._worker("explain", explain).shap_values(as_numbers(rows), **options)
        return found, self._link(null)

    def _run(
        self, instance: Any, options: dict[str, Any], null: Tensor
    ) -> tuple[Any, list[Tensor], np.ndarray]:
        """Run SHAP on one row: its explainer afterwards, what the model answered, the values."""
        inner, seen = copy.copy(self.explainer), list[Tensor]()
        inner.fnull = np.atleast_1d(numbers(null))
        inner.data = copy.copy(inner.data)
        if not hasattr(inner.data.data, "toarray"):
            row = getattr(instance, "x", instance)
            warn_of_truncation(row, inner.data.data)
            inner.data.data = table(inner.data.data)

        def answer(rows: Any) -> np.ndarray:
            seen.append(self._torch(rows))
            return numbers(seen[-1])

        inner.model = type(inner.model)(answer, inner.model.out_names)
        return inner, seen, self._explained(inner, instance, options)

    def _explained(self, inner: Any, instance: Any, options: dict[str, Any]) -> np.ndarray:
        found: np.ndarray = type(self.explainer).explain(inner, instance, **options)
        return found

    def _replay(self, inner: Any, null: Tensor, seen: list[Tensor], phi: np.ndarray) -> Tensor:
        """Attributions on tensors, ``(features, outputs)``; ``seen`` starts with f(x)."""
        change = self._link(seen[0][0]) - self._link(null)
        found = change.new_zeros(len(phi), len(change))
        varying = torch.as_tensor(np.asarray(inner.varyingInds, dtype=np.int64)).to(found.device)
        if inner.M == 0:
            return found + 0 * change  # with its graph, like any other row
        if inner.M == 1:
            return found.index_put((varying,), change.unsqueeze(0))
        outputs = seen[1].unflatten(0, (inner.nsamplesAdded, -1))
        values = torch.einsum("snd,n->sd", outputs, self._weights(outputs))
        selects = inner.l1_reg not in (False, 0, "auto") or (
            inner.l1_reg == "auto" and inner.nsamples / inner.max_samples < 0.2
        )
        stock, columns = phi.reshape(len(phi), -1)[inner.varyingInds], []
        for d in range(len(change)):
            kept = np.flatnonzero(stock[:, d]) if selects else np.arange(inner.M)
            residual = self._link(values[:, d]) - self._link(null[d])
            columns.append(_least_squares(inner, residual, change[d], kept))
        return found.index_put((varying,), torch.stack(columns, dim=1))


def _least_squares(inner: Any, residual: Tensor, change: Tensor, kept: np.ndarray) -> Tensor:
    if len(kept) == 0:
        return residual.new_zeros(inner.M)
    masks = inner.maskMatrix[: len(residual), kept]
    weights = inner.kernelWeights[: len(residual)]
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
    places = torch.as_tensor(kept, device=phi.device)
    return residual.new_zeros(inner.M).index_put((places,), phi)
