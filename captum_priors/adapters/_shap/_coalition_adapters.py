"""Permutation, Exact, Partition and Coalition: linear in the values of coalitions."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors._engine._numpy_state import NumPyState
from captum_priors._engine._random import in_turn
from captum_priors.adapters._shap import _weights
from captum_priors.adapters._shap._adapter import ShapAdapter
from captum_priors.adapters._shap._coalitions import (
    Coalitions,
    MaskerStandIn,
    ModelStandIn,
    is_tabular,
)
from captum_priors.adapters._shap._door import shap
from captum_priors.adapters._shap._links import torch_link
from captum_priors.adapters._shap._weights import Weights, weigh


class CoalitionFamily(ShapAdapter):
    """Runs ``explain_row`` of SHAP on stand-ins that answer with values of coalitions."""

    link: Any
    linearize_link: bool
    _knows_invariants = True

    @classmethod
    def of(cls, explainer: Any, differentiation: Any, model: Any) -> Any:
        """Make the differentiable twin of a SHAP explainer."""
        torch_link(explainer.link)
        if isinstance(explainer.masker, Tensor):  # SHAP takes arrays alone for tables
            explainer = copy.copy(explainer)
            table = explainer.masker.detach().cpu().numpy()
            explainer.masker = shap().maskers.Independent(table)
        return super().of(explainer, differentiation, model)

    def _sample(self) -> tuple[Any, ...] | None:
        if not is_tabular(self.masker):
            return None
        table = np.asarray(self.masker.data[:8], dtype=float)
        if getattr(self.masker, "output_dataframe", False):
            from captum_priors.adapters._shap._coalitions import _frame

            return (_frame(self.masker, table),)
        return (table,)

    def _base(self) -> Tensor | None:
        if not is_tabular(self.masker):
            return None
        table = np.asarray(self.masker.data, dtype=float)
        arguments = (table,)
        return torch_link(self.link)(self._model()(*arguments).double().mean(0))

    def _check_input_graph(self) -> None:
        if not is_tabular(self.masker):
            super()._check_input_graph()

    def _worker(self, args: tuple[Any, ...]) -> Any:
        worker = super()._worker(args)
        if len(args) > 1 and worker.feature_names is None and hasattr(self.masker, "arg_counts"):
            # SHAP counts columns to name features, and a fixed argument need not have any.
            worker.feature_names = [
                [
                    f"Feature {i}"
                    for i in range(int(np.prod(np.shape(a)[1:])) if np.ndim(a) > 1 else 0)
                ]
                for a in args
            ]
        return worker

    feature_names: Any

    def _row(self, row_args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the row's arguments, those of a tensor with a graph as they were given."""
        if self._rows is None:
            return row_args
        i = len(self._rows)
        return tuple(
            given[i] if isinstance(given, Tensor) and given.requires_grad else row
            for given, row in zip(self._inputs, row_args, strict=False)
        )

    def explain_row(self, *row_args: Any, **options: Any) -> dict[str, Any]:
        """Explain one row, as SHAP."""
        if self._torch_model() is None:
            found: dict[str, Any] = self._stock.explain_row(self, *row_args, **options)
            return found
        game = Coalitions(
            self._model(),
            self.masker,
            torch_link(self.link),
            self._row(row_args),
            linearized=self.linearize_link,
            check=self._check_on,
        )
        self._look_ahead(game, row_args, options)
        inner = copy.copy(self)
        inner.masker = MaskerStandIn(self.masker, game, knows_invariants=self._knows_invariants)
        inner.model = self._model_stand_in(game)
        inner.link, inner.linearize_link = shap().links.identity, False
        inner._curr_base_value = None  # of the model as it is now
        with self._still():
            result = self._undoubled(self._stock.explain_row(inner, *row_args, **options), game)
        self._take_results(inner)
        values = game.values()
        outputs = result.get("output_indices")
        chosen = values if outputs is None or values.dim() == 1 else values[:, outputs]
        weights = self._weights(inner, game, options)
        matrix = weights.matrix(len(chosen), chosen.device)
        self._remember(weigh(matrix, chosen), chosen[0], result["values"])
        return result

    def _look_ahead(
        self, game: Coalitions, row_args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Evaluate at once what is known to be asked for."""

    def _model_stand_in(self, game: Coalitions) -> ModelStandIn:
        return ModelStandIn(self.model, game)

    def _undoubled(self, result: dict[str, Any], game: Coalitions) -> dict[str, Any]:
        return result

    def _weights(self, inner: Any, game: Coalitions, options: dict[str, Any]) -> Weights:
        raise NotImplementedError

    _curr_base_value: Any = None


class PermutationFamily(CoalitionFamily):
    """Permutations of the features, there and back."""

    def _look_ahead(
        self, game: Coalitions, row_args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Draw the orders that SHAP is about to draw; another one is evaluated when asked for."""
        if not is_tabular(self.masker) or self.masker.clustering is not None:
            return
        features = np.flatnonzero(~self.masker.invariants(*row_args).all(0))
        n_all, n = self.masker.shape[1], len(features)
        most = options.get("max_evals", 0)  # SHAP itself says what it lacks
        most = 20 * n_all if most == "auto" else most
        orders = []
        with in_turn():
            state = NumPyState.now()
            try:
                for _ in range(most // (2 * n + 1)):
                    np.random.shuffle(features)  # noqa: NPY002  # the generator that SHAP draws from
                    orders.append(features.copy())
            finally:
                state.restore()
        if n and orders:
            masks = _there_and_back(np.stack(orders), n_all)
            if options["main_effects"]:  # SHAP's loop sets it itself from the second row on
                masks = np.concatenate([masks, np.eye(n_all, dtype=bool)[features]])
            with self._still():
                game.foresee(masks)

    def _weights(self, inner: Any, game: Coalitions, options: dict[str, Any]) -> Weights:
        passes: Sequence[np.ndarray] = game.calls
        if options["main_effects"] and len(passes) > 1:
            passes = passes[:-1]
        return _weights.permutation(game.calls[0].shape[1], passes)


def _there_and_back(orders: np.ndarray, n_features: int) -> np.ndarray:
    """Coalitions that features join one by one and leave again, ``(coalitions, features)``."""
    n_orders, n = orders.shape
    flips = np.zeros((n_orders, 2 * n + 1, n_features), dtype=bool)
    for start in (1, n + 1):
        steps = np.arange(start, start + n)
        flips[np.arange(n_orders)[:, None], steps, orders] = True
    masks: np.ndarray = np.logical_xor.accumulate(flips, axis=1).reshape(-1, n_features)
    return masks


class ExactFamily(CoalitionFamily):
    """All coalitions, or all that a clustering allows."""

    def _weights(self, inner: Any, game: Coalitions, options: dict[str, Any]) -> Weights:
        masks = game.calls[0]
        if getattr(self.masker, "clustering", None) is not None:
            return _weights.exact_partition(masks.shape[1], self._partition_masks_inds)
        varying = np.flatnonzero(masks.any(0))
        interactions = options["interactions"]
        pairs = interactions is True or interactions == 2
        cache: dict[Any, Weights] = self.__dict__.setdefault("_matrices", {})
        key = (pairs, varying.tobytes(), masks.shape[1])
        if key not in cache:
            make = _weights.exact_interactions if pairs else _weights.exact
            cache.clear()
            cache[key] = make(masks, varying)
            if pairs:
                _add_main_effects(cache[key], game, varying)
        return cache[key]

    _partition_masks_inds: Any


def _add_main_effects(weights: Weights, game: Coalitions, varying: np.ndarray) -> None:
    """SHAP puts v({i}) - v(empty) on the diagonal, from a call of its own."""
    n_features, start = game.calls[0].shape[1], len(game.calls[0])
    diagonal = varying * n_features + varying
    weights.add(diagonal, start + 1 + np.arange(len(varying)), 1.0)
    weights.add(diagonal, start, -1.0)


class PartitionFamily(CoalitionFamily):
    """Owen values of a tree that is expanded where the differences are large."""

    _results = ("values", "dvalues")
    _knows_invariants = False

    def _weights(self, inner: Any, game: Coalitions, options: dict[str, Any]) -> Weights:
        context = options.get("fixed_context")
        return _weights.partition(
            game.masks(),
            inner._clustering,
            inner._mask_matrix,
            None if context == "auto" else context,
        )


class WinterFamily(CoalitionFamily):
    """Winter values over groups that the user names."""

    _results = ("values", "dvalues")
    _knows_invariants = False

    def _model_stand_in(self, game: Coalitions) -> ModelStandIn:
        # One output makes SHAP convert arrays of one element to numbers, which NumPy 2.4 refuses;
        # two equal ones do not.
        if self._one_output is None:
            with torch.no_grad():
                base = self._base()
            self._one_output = base is not None and base.numel() == 1
        return ModelStandIn(self.model, game, doubled=self._one_output)

    _one_output: bool | None = None

    def _undoubled(self, result: dict[str, Any], game: Coalitions) -> dict[str, Any]:
        shape = tuple(game.values().shape[1:])
        if np.shape(result["expected_values"]) == shape:
            return result
        kept: Any = (..., slice(1)) if shape else (..., 0)
        names = ("values", "hierarchical_values", "expected_values")
        return {**result, **{name: result[name][kept][()] for name in names}}

    def _weights(self, inner: Any, game: Coalitions, options: dict[str, Any]) -> Weights:
        masks = game.masks()
        key = masks.tobytes()  # the tree asks for the same coalitions in every row
        if self._known is None or self._known[0] != key:
            numbers = {mask.tobytes(): i for i, mask in enumerate(masks)}
            names = self.masker.feature_names
            self._known = key, _weights.winter(names, numbers, inner.mask_permutations), masks
        return self._known[1]

    def _look_ahead(
        self, game: Coalitions, row_args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if self._known is not None:
            with self._still():
                game.foresee(self._known[2])

    _known: tuple[bytes, Weights, np.ndarray] | None = None
