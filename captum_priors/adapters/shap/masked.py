r"""Exact, Permutation, Partition and Coalition: linear in the values of coalitions.

These explainers of SHAP see a model only through :math:`v(S)`, and return :math:`\phi = W v`.
SHAP's own code runs on two stand-ins: one for the masker, which answers a mask with the number of
its coalition, and one for the model, which answers the number :math:`k` with :math:`[v_k, 2^{-300}
e_k]`. All that SHAP does with answers is linear, and the tiny part decides no branch, so the
further outputs of :math:`\phi` are :math:`2^{-300} W`.

Private: ``_curr_base_value``, a cache of Partition and Coalition (0.51.0).
"""

import copy
from collections.abc import Sequence
from math import comb
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.adapter import Options, ShapAdapter, with_tensors
from captum_priors.adapters.shap.coalitions import Coalitions, MaskerStandIn, is_table
from captum_priors.adapters.shap.model import (
    as_array,
    as_numbers,
    imported,
    numbers,
    torch_link,
    warn_of_truncation,
)

_TINY = 2.0**-300  # a power of two loses no bits
_NUMBERS = 1 << 23  # 64 MB of further outputs at once
_LINEAR = ("values", "expected_values", "main_effects", "hierarchical_values", "error_std")

Found = tuple[dict[str, Any], np.ndarray]


class MaskedAdapter(ShapAdapter):
    """Runs SHAP's ``explain_row`` on stand-ins that answer with values of coalitions."""

    mechanism = "linear in coalition values"
    options = ("max_evals", "fixed_context", "batch_size", "silent")
    # Whether SHAP looks for features that vary, and whether it asks for the same in every row.
    _varies: ClassVar[bool] = False
    _repeats: ClassVar[bool] = False
    _known: tuple[Any, Tensor, np.ndarray] | None = None

    def _start(self) -> None:
        torch_link(self.explainer.link)
        self.masker = self.explainer.masker
        if isinstance(self.masker, Tensor):  # SHAP takes arrays alone for tables
            self.masker = imported().maskers.Independent(as_array(self.masker))
        if is_table(self.masker):
            self.masker = copy.copy(self.masker)
            self.masker.data = numbers(self.masker.data)

    def _sample(self) -> Sequence[Any] | None:
        if not is_table(self.masker):
            return None
        rows = self.masker.data[:8]
        if getattr(self.masker, "output_dataframe", False):
            return [imported("pandas").DataFrame(rows, columns=self.masker.feature_names)]
        return [rows]

    def _base(self) -> Tensor | None:
        if not is_table(self.masker):
            return None
        return torch_link(self.explainer.link)(self._torch(self.masker.data).mean(0))

    def _explain(self, rows: Any, options: Options) -> Any:
        found: list[tuple[Tensor, Tensor]] = []
        if is_table(self.masker):
            warn_of_truncation(rows, self.explainer.masker.data)
        else:
            self._check_constant(rows)

        def explain_row(row: Any, **given: Any) -> dict[str, Any]:
            traced = isinstance(rows, Tensor) and rows.requires_grad
            result, values, base = self._row(rows[len(found)] if traced else row, given)
            found.append((values, base))
            return result

        worker = copy.copy(self.explainer)
        worker.explain_row, worker.masker = explain_row, self.masker
        made = worker(as_numbers(rows), **options)
        parts = [v.reshape(np.shape(e)) for (v, _), e in zip(found, made.values, strict=True)]
        ragged = len({part.shape for part in parts}) > 1  # stay a list, as SHAP's values do
        base = torch.stack([b for _, b in found]).reshape(np.shape(made.base_values))
        return with_tensors(made, parts if ragged else torch.stack(parts), base)

    def _row(self, row: Any, options: Options) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Explain one row: SHAP's result, its values as a tensor and the base value."""
        game = Coalitions(self._torch, self.masker, row, self.explainer)
        first = self._first_columns(game, options) if torch.is_grad_enabled() else 1
        result, weights = self._run(game, options, range(first))
        outputs, values = result.get("output_indices"), torch.cat(game.values)
        chosen = values if outputs is None else values[:, outputs]
        phi = torch.as_tensor(result["values"], device=chosen.device)
        if torch.is_grad_enabled():
            matrix = self._matrix(game, options, weights).to(chosen.device)
            phi = torch.sparse.mm(matrix, chosen.reshape(len(chosen), -1)).reshape(phi.shape)
            result["values"] = numbers(phi)
        return result, phi, chosen[0]

    def _first_columns(self, game: Coalitions, options: Options) -> int:
        """Return how many columns of W to read at the first run, at least one."""
        return 1

    def _run(self, game: Coalitions, options: Options, columns: range) -> Found:
        """Run SHAP; return its result, and these columns of W, ``(values, columns)``."""
        np.random.set_state(game.state)  # noqa: NPY002  # the same draws in every run
        n = len(columns)

        def model(asked: np.ndarray) -> np.ndarray:
            values = game.answers(asked).reshape(len(asked), -1)
            found = np.concatenate([values, np.zeros((len(asked), n))], axis=1)
            (rows,) = np.nonzero((asked >= columns.start) & (asked < columns.stop))
            found[rows, asked[rows] - columns.stop] = _TINY
            return found

        inner = copy.copy(self.explainer)
        inner.masker, inner.model = MaskerStandIn(game, varies=self._varies), model
        if hasattr(self.explainer.model, "output_names"):
            inner.model.output_names = self.explainer.model.output_names
        inner.link, inner.linearize_link = imported().links.identity, False
        inner._curr_base_value = None
        result = type(self.explainer).explain_row(inner, game.array, **options)
        weights = np.asarray(result["values"])[..., -n:].reshape(-1, n) / _TINY
        own: Any = (..., slice(-n)) if game.values[0].dim() > 1 else (..., 0)
        for name in _LINEAR:
            if result.get(name) is not None:
                result[name] = np.asarray(result[name])[own][()]
        return result, weights

    def _matrix(self, game: Coalitions, options: Options, weights: np.ndarray) -> Tensor:
        """Return W, ``(values, coalitions)``, in as many runs as its columns need."""
        key, n = (repr(options.get("interactions")), game.masks.tobytes()), len(game.masks)
        if self._known is not None and self._known[0] == key:
            return self._known[1]
        blocks = self._closed_form(game, options) or [weights[:, :n]]
        width = _width(n, max(len(weights), game.n_features))
        for i in range(blocks[0].shape[1], n, width):
            blocks.append(self._run(game, options, range(i, min(i + width, n)))[1])
        found = torch.cat([torch.as_tensor(b).to_sparse() for b in blocks], 1).coalesce()
        if self._repeats:
            self._known = key, found, game.masks
        return found

    def _closed_form(self, game: Coalitions, options: Options) -> list[np.ndarray]:
        """Return all of W, where a formula gives it."""
        return []


class PermutationAdapter(MaskedAdapter):
    """Permutations of the features, there and back."""

    held_fixed = "permutations"
    _varies = True

    def _first_columns(self, game: Coalitions, options: Options) -> int:
        n, most = game.n_features, options["max_evals"]
        most = (20 * n if most == "auto" else int(most)) + n + 1
        # Orders along a tree come from Numba's generator: nobody could run them again.
        return _width(most, n) if getattr(self.masker, "clustering", None) is None else most

    def shap_values(self, X: Any, npermutations: int = 10, **options: Any) -> Any:  # noqa: N803  # SHAP's
        """Explain as SHAP, arrays alone."""
        n, version = np.shape(X)[1], tuple(map(int, imported().__version__.split(".")[:2]))
        each = n if version < (0, 52) else 2 * n + 1  # evaluations that SHAP counts for an order
        return super().shap_values(X, max_evals=npermutations * each, **options)


class PartitionAdapter(MaskedAdapter):
    """Owen values of a tree that is expanded where the differences are large."""

    held_fixed = "expanded part of the tree"

    def _first_columns(self, game: Coalitions, options: Options) -> int:
        most = options["max_evals"]
        return _width(501 if most == "auto" else most + 1, 2 * game.n_features)

    def _run(self, game: Coalitions, options: Options, columns: range) -> Found:
        """Run SHAP, with further outputs that are not its to choose from."""
        chosen = options["outputs"]
        if chosen is not None:
            none_and_all = np.array([[False], [True]]).repeat(game.n_features, axis=1)
            full = game.answers(game.number(none_and_all))[1]
            if isinstance(chosen, imported().utils.OpChain):
                chosen = chosen.apply(imported().Explanation(full)).values
            options = {**options, "outputs": [*chosen, *range(len(full), len(full) + len(columns))]}
        result, weights = super()._run(game, options, columns)
        several = game.values[0].dim() > 1
        result["output_indices"] = result["output_indices"][: -len(columns)] if several else None
        tail = np.shape(result["expected_values"])
        result["mask_shapes"] = [(*shape[:-1], *tail) for shape in result["mask_shapes"]]
        return result, weights


class WinterAdapter(MaskedAdapter):
    """Winter values over groups that the user names."""

    _repeats = True

    def _run(self, game: Coalitions, options: Options, columns: range) -> Found:
        if self._known is not None:  # SHAP asks for them one by one
            game.answers(game.number(self._known[2]))
        return super()._run(game, options, columns)


class ExactAdapter(MaskedAdapter):
    """All coalitions, or all that a clustering allows."""

    _varies = _repeats = True

    def _closed_form(self, game: Coalitions, options: Options) -> list[np.ndarray]:
        r"""Return :math:`\pm 1/(M\binom{M-1}{s})` for coalitions with and without a feature."""
        pairs = options["interactions"] is True or options["interactions"] == 2
        if pairs or getattr(self.masker, "clustering", None) is not None:
            return []
        masks = game.masks
        varying, size = masks.any(0), masks.sum(1)[:, None]
        n = int(varying.sum())
        share = np.array([*(1 / (n * comb(n - 1, s)) for s in range(n)), 0.0])
        return [(np.where(masks, share[size - 1], -share[size]) * varying).T]


def _width(n_coalitions: int, n_rows: int) -> int:
    """Return how many columns of W fit beside as many rows as SHAP holds."""
    return max(1, min(n_coalitions, _NUMBERS // max(n_coalitions, n_rows)))
