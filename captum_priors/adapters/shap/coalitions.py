r"""Values of coalitions, with their graph, and the stand-ins that hand them to SHAP.

.. math:: v(S) = \operatorname{link}\Big(\frac1R \sum_r f(x_S, b^{(r)}_{\bar S})\Big)

A stand-in for the masker answers a mask with the number of its coalition, and one for the model
answers the number :math:`k` with :math:`[v_k, 2^{-300} e_k]`.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.model import (
    Link,
    TorchModel,
    as_array,
    identity,
    imported,
    linearising_weights,
    numbers,
    rows_at_once,
    table,
)

TINY = 2.0**-300  # a power of two loses no bits


class Coalitions:
    """The game of one row: its coalitions, each once, in the order in which SHAP asks for them.

    Memory: the model's graph on all masked rows.
    """

    def __init__(
        self, model: TorchModel, masker: Any, row: tuple[Any, ...], link: Link, *, linearized: bool
    ) -> None:
        self._model, self._masker, self._row, self._link = model, masker, row, link
        self._linearized = linearized and link is not identity
        self._weights: Tensor | None = None
        self._places: dict[bytes, int] = {}
        self._new: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._values: list[Tensor] = []
        self._answers: np.ndarray | None = None
        self.arrays = tuple(as_array(a) if isinstance(a, Tensor) else a for a in row)
        shape = getattr(masker, "shape", None)
        shape = shape(*self.arrays) if callable(shape) else shape
        n_features = sum(np.prod(a.shape) for a in self.arrays) if shape is None else shape[1]
        self.n_features = int(n_features)

    def __len__(self) -> int:
        return len(self._places)

    def key(self) -> bytes:
        """Return what tells these coalitions and their order from others."""
        return b"".join(self._places)

    def masks(self) -> np.ndarray:
        """Return the coalitions, one row each."""
        return np.concatenate(self._masks)

    def values(self) -> Tensor:
        """Return the values of all coalitions, ``(coalitions,)`` or with outputs behind."""
        return torch.cat(self._values)

    def number(self, masks: np.ndarray) -> np.ndarray:
        """Number coalitions, given as rows of a boolean matrix."""
        width = (masks.shape[1] + 7) // 8
        packed, places, new = np.packbits(masks, axis=1).tobytes(), [], []
        for i in range(len(masks)):
            mask = packed[i * width : (i + 1) * width]
            if mask not in self._places:
                new.append(i)
            places.append(self._places.setdefault(mask, len(self._places)))
        if new:
            self._new.append(masks[new])
        return np.array(places)

    def answers(self, asked: np.ndarray) -> np.ndarray:
        """Return values without a graph; what is new is evaluated together."""
        if self._new:
            self._masks.append(np.concatenate(self._new))
            self._new.clear()
            self._values.append(self._evaluate(self._masks[-1]))
            fresh = self._values[-1].detach().cpu().numpy()
            before = self._answers
            self._answers = fresh if before is None else np.concatenate([before, fresh])
        assert self._answers is not None  # the first that are asked for are new
        found: np.ndarray = self._answers[asked]
        return found

    def _evaluate(self, masks: np.ndarray) -> Tensor:
        if is_table(self._masker):
            return self._of_table(masks)
        each: list[tuple[Any, ...]] = []
        for mask in masks:
            masked = self._masker(mask, *self.arrays)
            masked = masked if isinstance(masked, tuple) else (masked,)
            immutable = getattr(self._masker, "immutable_outputs", False)
            each.append(masked if immutable else copy.deepcopy(masked))
        counts = [len(masked[0]) for masked in each]
        arguments = tuple(np.concatenate(parts) for parts in zip(*each, strict=True))
        self._model.settle(arguments)
        outputs = self._model(*arguments)
        return torch.cat([self._average(part.unsqueeze(0)) for part in outputs.split(counts)])

    def _of_table(self, masks: np.ndarray) -> Tensor:
        """Mask a background table in torch: the inputs keep their graph, and no row is copied."""
        model = self._model
        background = torch.as_tensor(model.convert(table(self._masker.data)))
        row = self._row[0] if isinstance(self._row[0], Tensor) else table(self._row[0])
        row = torch.as_tensor(model.convert(row)).to(background)
        keep = torch.as_tensor(masks, device=background.device)
        values = []
        for part in keep.split(max(1, rows_at_once(background.device) // len(background))):
            rows: Any = torch.where(part.unsqueeze(1), row, background).flatten(0, 1)
            if not model.converts:  # SHAP's own function takes what SHAP passes
                rows = framed(self._masker, numbers(rows))
            values.append(self._average(model(rows).unflatten(0, (len(part), -1))))
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

    def __init__(self, masker: Any, game: Coalitions, *, varies: bool) -> None:
        self._masker, self._game = masker, game
        # As SHAP is to see it: one background row.
        self.shape = (1, game.n_features)
        if varies and callable(getattr(masker, "invariants", None)):
            self.invariants = self._invariants

    def __getattr__(self, name: str) -> Any:
        if name not in ("clustering", "feature_names", "data", "partition", "mask_shapes"):
            raise AttributeError(name)
        return getattr(self._masker, name)

    def _invariants(self, *row: Any) -> np.ndarray:
        if is_table(self._masker):
            same = np.isclose(table(row[0]), table(self._masker.data))
        else:
            same = self._masker.invariants(*row)
        found: np.ndarray = np.all(same, axis=0, keepdims=True)
        return found

    def __call__(self, mask: np.ndarray, *row: Any) -> tuple[Any, ...]:
        if np.issubdtype(mask.dtype, np.integer):
            asked = self._game.number(full_masks(mask, self._game.n_features))
            return (asked,), np.ones((len(asked), 1), dtype=bool)
        return (self._game.number(mask.reshape(1, -1).astype(bool)),)


class ModelStandIn:
    """Answers the numbers of coalitions with their values, and with columns of the identity."""

    def __init__(self, model: Any, game: Coalitions, columns: range) -> None:
        self._game, self._columns = game, columns
        if hasattr(model, "output_names"):
            self.output_names = model.output_names

    def __call__(self, asked: np.ndarray) -> np.ndarray:
        values = self._game.answers(asked)
        if not len(self._columns):
            return values
        unit = TINY * (asked[:, None] == np.array(self._columns))
        return np.concatenate([values.reshape(len(asked), -1), unit], axis=1)


def full_masks(deltas: np.ndarray, n_features: int) -> np.ndarray:
    """Expand SHAP's delta encoding: which features each mask flips, negative ones to be continued.

    Example:
        >>> import numpy as np
        >>> from captum_priors.adapters.shap.coalitions import full_masks
        >>> noop = 2147483647
        >>> full_masks(np.array([noop, 1, -2, 0]), 2).astype(int).tolist()
        [[0, 0], [0, 1], [1, 0]]
    """
    last = deltas >= 0
    which = np.cumsum(last) - last
    feature = np.minimum(np.where(last, deltas, -deltas - 1), n_features)  # no-ops behind
    flips = np.zeros((int(last.sum()), n_features + 1), dtype=np.uint8)
    np.add.at(flips, (which, feature), 1)
    masks: np.ndarray = np.bitwise_xor.accumulate(flips & 1, axis=0)[:, :-1].astype(bool)
    return masks


def is_table(masker: Any) -> bool:
    """Whether a masker is SHAP's table of background rows, with its own way of masking."""
    maskers = imported().maskers
    return type(masker) in (maskers.Independent, maskers.Partition)


def framed(masker: Any, rows: np.ndarray) -> Any:
    """Return rows as SHAP's table of background rows passes them to the model."""
    if not getattr(masker, "output_dataframe", False):
        return rows
    return imported("pandas").DataFrame(rows, columns=masker.feature_names)
