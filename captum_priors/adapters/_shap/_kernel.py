r"""KernelExplainer: the weighted least squares of SHAP's own run, solved again on tensors.

With masks :math:`z_s`, weights :math:`\pi_s` and :math:`\Delta = \operatorname{link} f(x) -
\operatorname{link} E f`, SHAP minimises :math:`\sum_s \pi_s (\operatorname{link}\, v_s -
\operatorname{link} E f - z_s\phi)^2` under :math:`\sum_i\phi_i = \Delta`: linear in the values of
the coalitions. The features that its lasso selected are held fixed, and the others stay zero.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors._engine._inference import leaves_inference_mode
from captum_priors.adapters._shap._adapter import ShapAdapter, _array, select_output
from captum_priors.adapters._shap._door import shap
from captum_priors.adapters._shap._explanation import with_tensors
from captum_priors.adapters._shap._links import Link, torch_link
from captum_priors.adapters._shap._torch_model import TorchModel


class KernelFamily(ShapAdapter):
    """Runs SHAP's ``explain`` with a model that keeps its answers as tensors."""

    link: Any
    data: Any
    fnull: np.ndarray
    vector_out: bool
    _null: Tensor | None = None
    _seen: list[Tensor] | None = None

    @classmethod
    def of(cls, explainer: Any, differentiation: Any, model: Any) -> Any:
        """Make the differentiable twin of a SHAP explainer."""
        torch_link(explainer.link)
        return super().of(explainer, differentiation, model)

    def _sample(self) -> tuple[Any, ...] | None:
        if hasattr(self.data, "convert_to_df"):
            return (self.data.convert_to_df(),)
        return (self.data.data[:8],)

    def _mean_output(self) -> Tensor:
        """Weighted mean of the outputs over the background, now."""
        rows = self.data
        rows = rows.convert_to_df() if hasattr(rows, "convert_to_df") else rows.data
        outputs = self._model()(rows).double()
        weights = torch.as_tensor(np.asarray(self.data.weights, dtype=float)).to(outputs)
        mean: Tensor = torch.tensordot(weights, outputs, dims=1)
        return mean

    def _base(self) -> Tensor:
        null = self._mean_output() if self._null is None else self._null
        return torch_link(self.link, clipped=True)(null)

    def _worker(self, args: tuple[Any, ...]) -> Any:
        worker = super()._worker(args)
        worker._null = worker._mean_output()
        return worker

    @classmethod
    def load(
        cls,
        in_file: Any,
        model_loader: Any = None,
        masker_loader: Any = None,
        instantiate: bool = True,
    ) -> Any:
        """Load what ``save`` wrote; SHAP tells by the name of its class what is in the file."""
        if instantiate:
            return cls._stock.load.__func__(cls, in_file, model_loader, masker_loader)
        return cls._stock.load(in_file, model_loader, masker_loader, instantiate=False)

    @leaves_inference_mode
    def shap_values(self, X: Any, **kwargs: Any) -> Any:  # noqa: N803  # SHAP's name
        """Return an array, as SHAP."""
        if self._torch_model() is None:
            return self._stock.shap_values(self, X, **kwargs)
        with self._still():
            return self._stock.shap_values(self, _array(X), **kwargs)

    def _explain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As SHAP, with the base value of each row and the names that its plots ask for."""
        found = super()._explain(args, kwargs)
        if found.tensor is None:
            return found
        names, shape = found.feature_names, found.values.shape
        features = len(shape) - 1 - bool(self.vector_out)  # the first axis of a row by itself
        if names is None:
            names = [f"Feature {i}" for i in range(shape[features])]
        base = found.tensor_base.reshape((*shape[:features], *shape[features + 1 :]))
        complete = shap().Explanation(
            found.values,
            base_values=base.detach().cpu().numpy()[()],
            data=found.data,
            feature_names=list(names),
            compute_time=found.compute_time,
        )
        return with_tensors(complete, found.tensor, base)

    def _values(
        self, tensors: tuple[Tensor, ...], target: Any, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        (inputs,) = tensors
        with self._still():
            worker = self._worker(tensors)
            worker.shap_values(inputs, **options)
        return (select_output(torch.stack([v for v, _ in worker._rows]), inputs, target),)

    def explain(self, incoming_instance: Any, **kwargs: Any) -> Any:
        """Explain one row, as SHAP."""
        if self._torch_model() is None:
            return self._stock.explain(self, incoming_instance, **kwargs)
        with self._still():
            null = self._mean_output() if self._null is None else self._null
            inner = copy.copy(self)
            inner._rows, inner._seen = None, []
            inner.model = _recording(self.model, self._model(), inner._seen)
            inner.fnull = np.atleast_1d(null.detach().cpu().numpy())
            phi = self._stock.explain(inner, incoming_instance, **kwargs)
        at_x = inner._seen[0][0]
        values = self._replay(inner, null.reshape(-1), at_x.reshape(-1), phi)
        link = torch_link(self.link, clipped=True)
        self._remember(values if self.vector_out else values[:, 0], link(null), phi)
        return phi

    def _replay(self, inner: Any, null: Tensor, at_x: Tensor, phi: np.ndarray) -> Tensor:
        """Attributions on tensors, ``(features, outputs)``."""
        link = torch_link(self.link, clipped=True)
        change = link(at_x) - link(null)
        varying = torch.as_tensor(np.asarray(inner.varyingInds, dtype=np.int64))
        found = change.new_zeros(inner.data.groups_size, len(change))
        if inner.M == 0:
            return found + 0 * change  # with its graph, like any other row
        if inner.M == 1:
            return found.index_put((varying,), change.unsqueeze(0))
        n = inner.nsamplesAdded
        outputs = inner._seen[1].reshape(n, inner.N, -1)
        weights = torch.as_tensor(np.asarray(inner.data.weights, dtype=float)).to(outputs)
        values = torch.einsum("snd,n->sd", outputs, weights)
        columns = []
        stock = phi.reshape(inner.data.groups_size, -1)[inner.varyingInds]
        for d in range(len(change)):
            kept = np.arange(inner.M)
            if _selects(inner):
                kept = np.flatnonzero(stock[:, d])
            columns.append(_least_squares(inner, values[:, d], null[d], change[d], link, kept))
        return found.index_put((varying.to(found.device),), torch.stack(columns, dim=1))


def _selects(inner: Any) -> bool:
    """Whether SHAP selected features, under its own condition."""
    if inner.l1_reg == "auto":
        return bool(inner.nsamples / inner.max_samples < 0.2)
    return inner.l1_reg not in (False, 0)


def _least_squares(
    inner: Any, values: Tensor, null: Tensor, change: Tensor, link: Link, kept: np.ndarray
) -> Tensor:
    if len(kept) == 0:
        return values.new_zeros(inner.M)
    n = len(values)
    masks, weights = inner.maskMatrix[:n, kept], inner.kernelWeights[:n]
    last = torch.as_tensor(masks[:, -1]).to(values)
    others = masks[:, :-1] - masks[:, -1:]
    weighted = weights[:, None] * others
    try:
        solution = np.linalg.solve(others.T @ weighted, weighted.T)
    except np.linalg.LinAlgError:  # SHAP's own way out
        root = np.sqrt(weights)
        solution = np.linalg.pinv(root[:, None] * others) * root
    residual = link(values) - link(null) - last * change
    rest = torch.as_tensor(solution).to(values) @ residual
    phi = torch.cat([rest, (change - rest.sum()).reshape(1)])
    places = torch.as_tensor(kept, device=values.device)
    return values.new_zeros(inner.M).index_put((places,), phi)


def _recording(stock: Any, model: TorchModel, seen: list[Tensor]) -> Any:
    """Stand in for SHAP's model: the torch model's answers as arrays, remembered as tensors."""

    def function(rows: Any) -> np.ndarray:
        seen.append(model.on_rows(rows).double())
        answers: np.ndarray = seen[-1].detach().cpu().numpy()
        return answers

    return type(stock)(function, stock.out_names)
