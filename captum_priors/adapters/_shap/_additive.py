r"""AdditiveExplainer: for :math:`f(x) = c + \sum_i g_i(x_i)`, each feature by itself.

.. math:: \phi_i = f(x_i e_i) - f(0) - E\big[f(b_i e_i) - f(0)\big]
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from torch import Tensor

from captum_priors.adapters._shap._adapter import ShapAdapter, table_of


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
        zero, offsets, _ = self._evaluate(np.zeros((0, self.masker.shape[1])))
        return zero, offsets

    def _evaluate(self, table: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return f(0), the offsets, and f of each feature of the table alone, in one pass."""
        background = np.asarray(self.masker.data, dtype=float)
        n, n_features = background.shape
        rows = np.concatenate([np.zeros((1, n_features)), _alone(background), _alone(table)])
        outputs = self._model()(rows).double()
        zero = outputs[0]
        offsets = outputs[1 : 1 + n * n_features].reshape(n, n_features).mean(0) - zero
        return zero, offsets, outputs[1 + n * n_features :].reshape(len(table), n_features)

    def _base(self) -> Tensor:
        zero, offsets = self._current_offsets()
        return zero + offsets.sum()

    def _worker(self, args: tuple[Any, ...]) -> Any:
        worker = super()._worker(args)
        table = table_of(args)
        if table is None:
            worker._offsets = worker._current_offsets()
            return worker
        zero, offsets, answers = worker._evaluate(table)
        worker._whole = answers - zero - offsets, zero + offsets.sum()
        ready = zip(table, answers.detach().cpu().numpy(), strict=True)

        def prepared(rows: Any) -> np.ndarray:
            row, answer = next(ready)
            if np.array_equal(rows, np.diag(row)):
                return cast("np.ndarray", answer)
            found: np.ndarray = worker._model().numbers(rows)
            return found

        return worker._with(prepared, zero, offsets)._as_stock()

    def _with(self, model: Callable[[Any], np.ndarray], zero: Tensor, offsets: Tensor) -> Any:
        """Return a copy for SHAP's own code, with the offsets of now."""
        twin = copy.copy(self)
        twin.model = model
        twin._zero_offset = float(zero.detach())
        twin._input_offsets = offsets.detach().cpu().numpy()
        twin._expected_value = float((zero + offsets.sum()).detach())
        return twin

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
            twin = self._with(recording, zero, offsets)
            result: dict[str, Any] = self._stock.explain_row(twin, *row_args, **options)
        self._remember(seen[0] - zero - offsets, zero + offsets.sum(), result["values"])
        return result


def _alone(table: np.ndarray) -> np.ndarray:
    """Return each entry by itself in a row of zeros, ``(rows * features, features)``."""
    n, n_features = table.shape
    rows = np.zeros((n, n_features, n_features))
    rows[:, range(n_features), range(n_features)] = table
    return rows.reshape(-1, n_features)
