r"""Exact, Permutation, Partition and Coalition: linear in the values of coalitions.

These explainers of SHAP see a model only through :math:`v(S)`, and return :math:`\phi = W v`.
SHAP's own code runs on two stand-ins: one for the masker, which answers a mask with the number of
its coalition, and one for the model, which answers the number :math:`k` with :math:`[v_k, 2^{-300}
e_k]`. All that SHAP does with answers is linear, and the tiny part decides no branch, so the
further outputs of :math:`\phi` are :math:`2^{-300} W`.
"""

import copy
from collections.abc import Callable, Sequence
from math import comb
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.adapter import ShapAdapter, with_tensors
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

    def _sample(self) -> Sequence[Any] | None:
        if not is_table(self.masker):
            return None
        rows = numbers(self.masker.data[:8])
        if getattr(self.masker, "output_dataframe", False):
            return [imported("pandas").DataFrame(rows, columns=self.masker.feature_names)]
        return [rows]

    def _base(self) -> Tensor | None:
        if not is_table(self.masker):
            return None
        return torch_link(self.explainer.link)(self._torch(self.masker.data).mean(0))

    def _explain(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        rows: list[tuple[Tensor, Tensor]] = []
        if is_table(self.masker):
            warn_of_truncation(args[0], self.masker.data)
        else:
            self._check_constant(args)

        def explain_row(*row: Any, **given: Any) -> dict[str, Any]:
            kept = [
                a[len(rows)] if isinstance(a, Tensor) and a.requires_grad else r
                for a, r in zip(args, row, strict=False)
            ]
            result, values, base = self._row(kept, given)
            rows.append((values, base))
            return result

        worker = self._worker("explain_row", explain_row)
        worker.masker = self.masker
        return _beside(worker(*map(as_numbers, args), **options), rows)

    def _row(
        self, row: Sequence[Any], options: dict[str, Any]
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Explain one row: SHAP's result, its values as a tensor and the base value."""
        game = Coalitions(self._torch, self.masker, row, self.explainer)
        state = np.random.get_state()  # noqa: NPY002  # the generator that SHAP draws from

        def run(columns: range) -> Found:
            np.random.set_state(state)  # noqa: NPY002  # as above
            return self._run(game, dict(options), columns)

        result, weights = run(range(self._first_columns(game, options)))
        outputs, values = result.get("output_indices"), game.values()
        chosen = values if outputs is None else values[:, outputs]
        phi = torch.as_tensor(result["values"], device=chosen.device)
        if torch.is_grad_enabled():
            matrix = self._matrix(game, options, weights, run).to(chosen.device)
            phi = torch.sparse.mm(matrix, chosen.reshape(len(chosen), -1)).reshape(phi.shape)
            result["values"] = numbers(phi)
        return result, phi, chosen[0]

    def _first_columns(self, game: Coalitions, options: dict[str, Any]) -> int:
        """Return how many columns of W to read at the first run."""
        return 0

    def _run(self, game: Coalitions, options: dict[str, Any], columns: range) -> Found:
        """Run SHAP; return its result, and these columns of W, ``(values, columns)``."""

        def model(asked: np.ndarray) -> np.ndarray:
            values = game.answers(asked)
            if not columns:
                return values
            found = np.zeros((len(asked), values[0].size + len(columns)))
            found[:, : values[0].size] = values.reshape(len(asked), -1)
            (rows,) = np.nonzero((asked >= columns.start) & (asked < columns.stop))
            found[rows, asked[rows] - columns.start + values[0].size] = _TINY
            return found

        inner = copy.copy(self.explainer)
        inner.masker, inner.model = MaskerStandIn(game, varies=self._varies), model
        if hasattr(self.explainer.model, "output_names"):
            inner.model.output_names = self.explainer.model.output_names
        inner.link, inner.linearize_link = imported().links.identity, False
        inner._curr_base_value = None  # private: Partition's and Coalition's cache (0.51.0)
        result = type(self.explainer).explain_row(inner, *game.arrays, **options)
        if not columns:
            return result, np.zeros((np.size(result["values"]), 0))
        further = np.asarray(result["values"])[..., -len(columns) :]
        kept: Any = (..., slice(-len(columns))) if game.values().dim() > 1 else (..., 0)
        for name in _LINEAR:
            if result.get(name) is not None:
                result[name] = np.asarray(result[name])[kept][()]
        return result, further.reshape(-1, len(columns)) / _TINY

    def _matrix(
        self,
        game: Coalitions,
        options: dict[str, Any],
        weights: np.ndarray,
        run: Callable[[range], Found],
    ) -> Tensor:
        """Return W, ``(values, coalitions)``, in as many runs as its columns need."""
        key, n = (repr(options.get("interactions")), game.key()), len(game)
        if self._known is not None and self._known[0] == key:
            return self._known[1]
        blocks = self._closed_form(game, options) or ([weights[:, :n]] if weights.size else [])
        start, width = (
            sum(b.shape[1] for b in blocks),
            _width(n, max(len(weights), game.n_features)),
        )
        blocks += [run(range(i, min(i + width, n)))[1] for i in range(start, n, width)]
        found = torch.cat([torch.as_tensor(b).to_sparse() for b in blocks], 1).coalesce()
        if self._repeats:
            self._known = key, found, game.masks()
        return found

    def _closed_form(self, game: Coalitions, options: dict[str, Any]) -> list[np.ndarray]:
        return []


class PermutationAdapter(MaskedAdapter):
    """Permutations of the features, there and back."""

    held_fixed = "permutations"
    _varies = True

    def _first_columns(self, game: Coalitions, options: dict[str, Any]) -> int:
        n, most = game.n_features, options["max_evals"]
        most = 20 * n if most == "auto" else int(most)
        if not torch.is_grad_enabled():
            return 0
        if getattr(self.masker, "clustering", None) is not None:
            # Orders along a tree come from Numba's generator: nobody could run them again.
            return most + n + 1
        return _width(most // (2 * n + 1) * 2 * n + 1, n)

    def shap_values(self, X: Any, npermutations: int = 10, **options: Any) -> Any:  # noqa: N803
        """Explain as SHAP, arrays alone."""
        return super().shap_values(X, max_evals=npermutations * np.shape(X)[1], **options)


class PartitionAdapter(MaskedAdapter):
    """Owen values of a tree that is expanded where the differences are large."""

    held_fixed = "expanded part of the tree"

    def _first_columns(self, game: Coalitions, options: dict[str, Any]) -> int:
        most = 501 if options["max_evals"] == "auto" else options["max_evals"] + 1
        return _width(most, 2 * game.n_features) if torch.is_grad_enabled() else 0

    def _run(self, game: Coalitions, options: dict[str, Any], columns: range) -> Found:
        """Run SHAP, with further outputs that are not its to choose from."""
        chosen, n = options["outputs"], len(columns)
        if n and chosen is not None:
            none_and_all = np.array([[False], [True]]).repeat(game.n_features, axis=1)
            full = game.answers(game.number(none_and_all))[1]
            if isinstance(chosen, imported().utils.OpChain):
                chosen = chosen.apply(imported().Explanation(full)).values
            options["outputs"] = np.concatenate([chosen, len(full) + np.arange(n)])
        result, weights = super()._run(game, options, columns)
        if n:
            several = game.values().dim() > 1
            result["output_indices"] = result["output_indices"][:-n] if several else None
            tail = np.shape(result["expected_values"])
            result["mask_shapes"] = [(*shape[:-1], *tail) for shape in result["mask_shapes"]]
        return result, weights


class WinterAdapter(MaskedAdapter):
    """Winter values over groups that the user names."""

    _repeats = True

    def _first_columns(self, game: Coalitions, options: dict[str, Any]) -> int:
        if self._known is not None:  # SHAP asks for them one by one
            game.answers(game.number(self._known[2]))
        # With one output SHAP converts arrays of one element to numbers, which NumPy 2.4 refuses.
        return 1


class ExactAdapter(MaskedAdapter):
    """All coalitions, or all that a clustering allows."""

    _varies = _repeats = True

    def _closed_form(self, game: Coalitions, options: dict[str, Any]) -> list[np.ndarray]:
        r"""Return :math:`\pm 1/(M\binom{M-1}{s})` for coalitions with and without a feature."""
        pairs = options["interactions"] is True or options["interactions"] == 2
        if pairs or getattr(self.masker, "clustering", None) is not None:
            return []
        masks = game.masks()
        varying, size = masks.any(0), masks.sum(1)[:, None]
        n = int(varying.sum())
        share = np.array([*(1 / (n * comb(n - 1, s)) for s in range(n)), 0.0])
        return [(np.where(masks, share[size - 1], -share[size]) * varying).T]


def _width(n_coalitions: int, n_rows: int) -> int:
    """Return how many columns of W fit beside as many rows as SHAP holds."""
    return max(1, min(n_coalitions, _NUMBERS // max(n_coalitions, n_rows)))


def _beside(explanations: Any, rows: list[tuple[Tensor, Tensor]]) -> Any:
    """Put the rows' tensors beside one Explanation, or each of one for each argument."""
    each = explanations if isinstance(explanations, list) else [explanations]
    places, found = [0] * len(rows), []
    for explanation in each:
        parts = []
        for i, (values, _) in enumerate(rows):
            shape = np.shape(explanation.values[i])
            n = int(np.prod(shape)) // int(np.prod(values.shape[1:]))
            parts.append(values[places[i] : places[i] + n].reshape(shape))
            places[i] += n
        base = torch.stack([b for _, b in rows])
        if np.size(explanation.base_values) == base.numel():
            base = base.reshape(np.shape(explanation.base_values))
        ragged = len({p.shape for p in parts}) > 1  # stay a list, as SHAP's values do
        found.append(with_tensors(explanation, parts if ragged else torch.stack(parts), base))
    return found if isinstance(explanations, list) else found[0]
