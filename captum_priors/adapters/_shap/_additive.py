r"""AdditiveExplainer: for :math:`f(x) = c + \sum_i g_i(x_i)`, each feature by itself.

.. math:: \phi_i = f(x_i e_i) - f(0) - E\big[f(b_i e_i) - f(0)\big]
"""

import copy
from typing import Any

import numpy as np
from torch import Tensor

from captum_priors.adapters._shap._adapter import ShapAdapter


class AdditiveFamily(ShapAdapter):
    """Runs SHAP's ``explain_row`` with offsets of the model as it is now."""

    _zero_offset: float
    _input_offsets: np.ndarray
    _expected_value: float
    _offsets: tuple[Tensor, Tensor] | None = None

    def _sample(self) -> tuple[Any, ...] | None:
        return (np.asarray(self.masker.data[:8], dtype=float),)

    def _current_offsets(self) -> tuple[Tensor, Tensor]:
        """Return f(0), and each feature's mean over the background beyond it."""
        table = np.asarray(self.masker.data, dtype=float)
        n, n_features = table.shape
        rows = np.zeros((1 + n_features * n, n_features))
        for i in range(n_features):
            rows[1 + i * n : 1 + (i + 1) * n, i] = table[:, i]
        outputs = self._model()(rows).double()
        zero = outputs[0]
        return zero, outputs[1:].reshape(n_features, n).mean(1) - zero

    def _base(self) -> Tensor:
        zero, offsets = self._current_offsets()
        return zero + offsets.sum()

    def _worker(self, args: tuple[Any, ...]) -> Any:
        worker = super()._worker(args)
        worker._offsets = worker._current_offsets()
        return worker

    def explain_row(self, *row_args: Any, **options: Any) -> dict[str, Any]:
        """Explain one row, as SHAP."""
        if self._torch_model() is None:
            found: dict[str, Any] = self._stock.explain_row(self, *row_args, **options)
            return found
        seen: list[Tensor] = []
        model = self._model()

        def recording(rows: Any) -> np.ndarray:
            seen.append(model(rows).double())
            answers: np.ndarray = seen[-1].detach().cpu().numpy()
            return answers

        with self._still():
            zero, offsets = self._offsets or self._current_offsets()
            inner = copy.copy(self)
            inner.model = recording
            inner._zero_offset = float(zero.detach())
            inner._input_offsets = offsets.detach().cpu().numpy()
            inner._expected_value = float((zero + offsets.sum()).detach())
            result: dict[str, Any] = self._stock.explain_row(inner, *row_args, **options)
        self._remember(seen[0] - zero - offsets, zero + offsets.sum(), result["values"])
        return result
