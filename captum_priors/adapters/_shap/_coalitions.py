r"""Values of coalitions, with their graph.

SHAP's masked-model explainers see a model only through the numbers

.. math:: v(S) = \operatorname{link}\Big(\frac1R \sum_r f(x_S, b^{(r)}_{\bar S})\Big),

and are linear in them. A stand-in for the masker answers a mask with the number of its coalition,
a stand-in for the model answers that number with :math:`v(S)`, computed by the torch model on what
the real masker makes of the mask. Memory: the model's graph on all masked rows; of the masks one
byte for each feature and coalition.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters._shap._door import shap_module
from captum_priors.adapters._shap._links import Link, identity, linearising_weights
from captum_priors.adapters._shap._torch_model import TorchModel, rows_at_once


class Coalitions:
    """The game of one row: coalitions in the order in which SHAP asks for them, with values."""

    def __init__(
        self,
        model: TorchModel,
        masker: Any,
        link: Link,
        row: tuple[Any, ...],
        *,
        linearized: bool,
        check: Any,
    ) -> None:
        self._model, self._masker, self._row = model, masker, row
        self._link = link
        self._linearized = linearized and link is not identity
        self._weights: Tensor | None = None
        self._table: tuple[Tensor, Tensor] | None = None
        self._check = check
        self._asked: list[np.ndarray] = []
        self._places: dict[bytes, int] = {}
        self._taken: list[int] = []
        self._values: list[Tensor] = []
        self._answers: np.ndarray | None = None
        self.calls: list[np.ndarray] = []
        self._n = 0

    def foresee(self, masks: np.ndarray) -> list[int]:
        """Evaluate coalitions together, each once, also if SHAP will ask for them one by one.

        Return the places of their values.
        """
        width = (masks.shape[1] + 7) // 8
        packed, known = np.packbits(masks, axis=1).tobytes(), self._places
        places, new = [], []
        for i in range(len(masks)):
            key = packed[i * width : (i + 1) * width]
            place = known.get(key)
            if place is None:
                place = known[key] = len(known)
                new.append(i)
            places.append(place)
        if new:
            values = self._evaluate(masks if len(new) == len(masks) else masks[new])
            answers = values.detach().cpu().numpy()
            before = self._answers
            self._values.append(values)
            self._answers = answers if before is None else np.concatenate([before, answers])
        return places

    def number(self, masks: np.ndarray) -> np.ndarray:
        """Number new coalitions, given as rows of a boolean matrix."""
        self._asked.append(masks)
        self._n += len(masks)
        return np.arange(self._n - len(masks), self._n)

    def evaluate(self, numbers: np.ndarray) -> np.ndarray:
        """Evaluate the coalitions that were numbered since the last time."""
        masks = np.concatenate(self._asked)
        assert len(numbers) == len(masks)  # SHAP evaluates what it has masked, in order
        self._asked.clear()
        self.calls.append(masks)
        taken = self.foresee(masks)
        self._taken += taken
        assert self._answers is not None
        answers: np.ndarray = self._answers[taken]
        return answers

    def masks(self) -> np.ndarray:
        """Return all coalitions so far, one row each."""
        return np.concatenate(self.calls)

    def values(self) -> Tensor:
        """Return the values of all coalitions so far, ``(coalitions,)`` or with outputs behind."""
        values = torch.cat(self._values)
        if self._taken == list(range(len(values))):
            return values
        return values[torch.tensor(self._taken, device=values.device)]

    def _evaluate(self, masks: np.ndarray) -> Tensor:
        if is_tabular(self._masker):
            return self._tabular(masks)
        each: list[tuple[Any, ...]] = []
        for mask in masks:
            masked = self._masker(mask, *map(_array, self._row))
            masked = masked if isinstance(masked, tuple) else (masked,)
            immutable = getattr(self._masker, "immutable_outputs", False)
            each.append(masked if immutable else copy.deepcopy(masked))
        counts = [len(masked[0]) for masked in each]
        arguments = tuple(np.concatenate(parts) for parts in zip(*each, strict=True))
        self._check(arguments)
        outputs = self._model(*arguments).double()
        if len(set(counts)) == 1:
            return self._average(outputs.reshape(len(masks), counts[0], *outputs.shape[1:]))
        return torch.cat([self._average(part.unsqueeze(0)) for part in outputs.split(counts)])

    def _tabular(self, masks: np.ndarray) -> Tensor:
        """Mask a background table in torch: the inputs keep their graph, and no row is copied."""
        if self._table is None:
            background = self._model.convert(np.asarray(self._masker.data, dtype=float))
            row = self._row[0]
            row = row if isinstance(row, Tensor) else torch.tensor(np.asarray(row, dtype=float))
            self._table = row.to(background), background
        row, background = self._table
        keep = torch.as_tensor(masks, device=background.device)
        n_background = len(background)
        values = []
        for part in keep.split(max(1, rows_at_once(background.device) // n_background)):
            rows = torch.where(part.unsqueeze(1), row, background)
            rows = rows.reshape(-1, background.shape[1])
            if self._model.converts:
                self._check((rows,))
                outputs = self._model(rows)
            else:  # SHAP's own function takes what SHAP passes
                outputs = self._model(_frame(self._masker, rows.detach().cpu().double().numpy()))
            outputs = outputs.double().reshape(len(part), n_background, *outputs.shape[1:])
            values.append(self._average(outputs))
        return torch.cat(values)

    def _average(self, outputs: Tensor) -> Tensor:
        """Average over background rows, ``(coalitions, rows, ...)``, in the units of the link."""
        if not self._linearized:
            return self._link(outputs.mean(1))
        if self._weights is None:  # SHAP asks for the empty coalition first
            self._weights = linearising_weights(outputs[0], self._link)
        return (self._weights * self._link(outputs)).mean(1)


class MaskerStandIn:
    """Answers each mask with one row that holds the number of its coalition."""

    supports_delta_masking = True
    immutable_outputs = True
    fixed_background = False

    def __init__(self, masker: Any, game: Coalitions, *, knows_invariants: bool) -> None:
        self._masker, self._game = masker, game
        if knows_invariants and callable(getattr(masker, "invariants", None)):
            self.invariants = self._invariants
        if callable(getattr(masker, "mask_shapes", None)):
            self.mask_shapes = self._mask_shapes

    def __getattr__(self, name: str) -> Any:
        if name == "clustering" and any(
            getattr(part, name, None) is None for part in parts_of(self._masker)
        ):
            return None  # SHAP's Composite asks for the length of what is not there
        if name in ("clustering", "feature_names", "data", "partition"):
            return getattr(self._masker, name)
        raise AttributeError(name)

    def _mask_shapes(self, *row: Any) -> list[Any]:
        shapes: list[Any] = []
        for part, arguments in zip(
            parts_of(self._masker), arguments_of(self._masker, row), strict=True
        ):
            known = getattr(part, "mask_shapes", None)
            shapes += known(*arguments) if callable(known) else [a.shape for a in arguments]
        return shapes

    def shape(self, *row: Any) -> tuple[int, int]:
        """Return the number of background rows as SHAP is to see it, and of features."""
        shape = getattr(self._masker, "shape", None)
        if callable(shape):
            shape = shape(*row)
        n_features = sum(int(np.prod(a.shape)) for a in row) if shape is None else shape[1]
        return 1, int(n_features)

    def _invariants(self, *row: Any) -> np.ndarray:
        found: np.ndarray = np.all(self._masker.invariants(*row), axis=0, keepdims=True)
        return found

    def __call__(self, mask: np.ndarray, *row: Any) -> tuple[Any, ...]:
        if np.issubdtype(mask.dtype, np.integer):
            masks = full_masks(mask, self.shape(*row)[1])
            numbers = self._game.number(masks)
            return (numbers,), np.ones((len(masks), 1), dtype=bool)
        return (self._game.number(mask.reshape(1, -1).astype(bool)),)


class ModelStandIn:
    """Answers the numbers of coalitions with their values."""

    def __init__(self, model: Any, game: Coalitions, *, doubled: bool = False) -> None:
        self._model, self._game, self._doubled = model, game, doubled

    def __getattr__(self, name: str) -> Any:
        if name == "output_names":
            return getattr(self._model, name)
        raise AttributeError(name)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        values = self._game.evaluate(numbers)
        if self._doubled:
            values = values.reshape(len(values), -1).repeat(2, axis=1)
        return values


def full_masks(deltas: np.ndarray, n_features: int) -> np.ndarray:
    """Expand SHAP's delta encoding: which features each mask flips, negative ones to be continued.

    Example:
        >>> import numpy as np
        >>> from captum_priors.adapters._shap._coalitions import full_masks
        >>> noop = 2147483647
        >>> full_masks(np.array([noop, 1, -2, 0]), 2).astype(int).tolist()
        [[0, 0], [0, 1], [1, 0]]
    """
    last = deltas >= 0
    if last.all():  # one flip each, or none
        flips = np.zeros((len(deltas), n_features), dtype=bool)
        real = np.flatnonzero(deltas < n_features)
        flips[real, deltas[real]] = True
    else:
        which = np.concatenate([[0], np.cumsum(last)[:-1]])
        feature = np.where(last, deltas, -deltas - 1)
        counts = np.zeros((int(last.sum()), n_features), dtype=np.int64)
        kept = feature < n_features
        np.add.at(counts, (which[kept], feature[kept]), 1)
        flips = counts % 2 == 1
    masks: np.ndarray = np.logical_xor.accumulate(flips, axis=0)
    return masks


def parts_of(masker: Any) -> tuple[Any, ...]:
    """Return the maskers that a Composite joins, or the masker itself."""
    return tuple(masker.maskers) if hasattr(masker, "arg_counts") else (masker,)


def arguments_of(masker: Any, row: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Split a row's arguments among the maskers that a Composite joins."""
    if not hasattr(masker, "arg_counts"):
        return [row]
    ends = np.cumsum(masker.arg_counts)
    return [row[end - n : end] for n, end in zip(masker.arg_counts, ends, strict=True)]


def is_tabular(masker: Any) -> bool:
    """Whether a masker is SHAP's table of background rows, with its own way of masking."""
    tabular = shap_module("maskers._tabular").Tabular
    return isinstance(masker, tabular) and type(masker).__call__ is tabular.__call__


def _array(argument: Any) -> Any:
    return argument.detach().cpu().numpy() if isinstance(argument, Tensor) else argument


def _frame(masker: Any, rows: np.ndarray) -> Any:
    if not getattr(masker, "output_dataframe", False):
        return rows
    frame: Any = shap_module("maskers._tabular").pd.DataFrame
    return frame(rows, columns=masker.feature_names)
