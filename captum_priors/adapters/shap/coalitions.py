r"""Values of coalitions, with their graph, and the masker that hands their numbers to SHAP.

.. math:: v(S) = \operatorname{link}\Big(\frac1R \sum_r f(x_S, b^{(r)}_{\bar S})\Big)

Private: ``_convert_delta_mask_to_full`` of shap.utils._masked_model, which expands SHAP's encoding
of masks by the features that each flips (0.51.0).
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.model import (
    TorchModel,
    as_array,
    identity,
    imported,
    linearising_weights,
    rows_at_once,
    torch_link,
)


class Coalitions:
    """The game of one row: its coalitions, each once, in the order in which SHAP asks for them.

    The model's graph is held on all masked rows, and a row that is a tensor keeps its own where
    the masker is a table.
    """

    def __init__(self, model: TorchModel, masker: Any, row: Any, explainer: Any) -> None:
        self.masker, self._model = masker, model
        self._table = [*map(model.convert, (row, masker.data))] if is_table(masker) else []
        self._link = torch_link(explainer.link)
        self._linearized = explainer.linearize_link and self._link is not identity
        self._weights: Tensor | None = None
        self._places: dict[bytes, int] = {}
        self._new: list[np.ndarray] = []
        self.values: list[Tensor] = []  # in parts, ``(coalitions,)`` or with outputs behind
        self._answers: list[np.ndarray] = []
        self.array = as_array(row) if isinstance(row, Tensor) else row
        shape = getattr(masker, "shape", None)
        shape = shape(self.array) if callable(shape) else shape
        self.state = np.random.get_state()  # noqa: NPY002  # of the generator that SHAP draws from
        self.n_features = int(np.prod(self.array.shape) if shape is None else shape[1])
        self.masks = np.zeros((0, self.n_features), dtype=bool)  # in the order of their numbers

    def number(self, masks: np.ndarray) -> np.ndarray:
        """Number coalitions, given as rows of a boolean matrix."""
        places = []
        for mask, packed in zip(masks, map(bytes, np.packbits(masks, axis=1)), strict=True):
            if packed not in self._places:
                self._new.append(mask)
            places.append(self._places.setdefault(packed, len(self._places)))
        return np.array(places)

    def answers(self, asked: np.ndarray) -> np.ndarray:
        """Return values without a graph; what is new is evaluated together."""
        if self._new:
            new = np.stack(self._new)
            self._new.clear()
            self.masks = np.concatenate([self.masks, new])
            self.values.append(self._evaluate(new))
            self._answers = [np.concatenate([*self._answers, as_array(self.values[-1])])]
        found: np.ndarray = self._answers[0][asked]
        return found

    def _evaluate(self, masks: np.ndarray) -> Tensor:
        if self._table:
            return self._of_table(masks)
        each: list[tuple[Any, ...]] = []
        for mask in masks:
            masked = self.masker(mask, self.array)
            masked = masked if isinstance(masked, tuple) else (masked,)
            immutable = getattr(self.masker, "immutable_outputs", False)
            each.append(masked if immutable else copy.deepcopy(masked))
        arguments = [np.concatenate(parts) for parts in zip(*each, strict=True)]
        self._model.settle(arguments)
        parts = self._model(*arguments).split([len(masked[0]) for masked in each])
        return torch.cat([self._average(part.unsqueeze(0)) for part in parts])

    def _of_table(self, masks: np.ndarray) -> Tensor:
        """Mask a background table in torch: the inputs keep their graph, and no row is copied."""
        row, background = self._table
        keep = torch.as_tensor(masks, device=background.device)
        values = []
        for part in keep.split(max(1, rows_at_once(background.device) // len(background))):
            rows = torch.where(part.unsqueeze(1), row, background).flatten(0, 1)
            values.append(self._average(self._model(rows).unflatten(0, (len(part), -1))))
        return torch.cat(values)

    def _average(self, outputs: Tensor) -> Tensor:
        """Average over background rows, ``(coalitions, rows, ...)``, in the units of the link."""
        if not self._linearized:
            return self._link(outputs.mean(1))
        if self._weights is None:  # SHAP asks for the empty coalition first
            self._weights = linearising_weights(outputs[0], self._link)
        return (self._weights * self._link(outputs)).mean(1)


class MaskerStandIn:
    """Answers each mask with one row that holds the number of its coalition.

    SHAP leaves out features that do not vary, where it is to see which (``varies``).
    """

    supports_delta_masking = True
    immutable_outputs = True
    fixed_background = False

    def __init__(self, game: Coalitions, *, varies: bool) -> None:
        self._game = game
        self.shape = (1, game.n_features)  # of background rows SHAP is to see one
        invariants = getattr(game.masker, "invariants", None)
        if varies and callable(invariants):
            self.invariants = lambda row: np.all(invariants(row), axis=0, keepdims=True)

    def __getattr__(self, name: str) -> Any:
        if name not in ("clustering", "feature_names", "data", "partition", "mask_shapes"):
            raise AttributeError(name)
        return getattr(self._game.masker, name)

    def __call__(self, mask: np.ndarray, row: Any) -> tuple[Any, ...]:
        """Mask one row, or (given which features to flip) several."""
        if not np.issubdtype(mask.dtype, np.integer):
            return (self._game.number(mask.reshape(1, -1).astype(bool)),)
        masks = np.zeros((int((mask >= 0).sum()), self._game.n_features), dtype=bool)
        imported("shap.utils._masked_model")._convert_delta_mask_to_full(mask, masks)
        asked = self._game.number(masks)
        return (asked,), np.ones((len(asked), 1), dtype=bool)


def is_table(masker: Any) -> bool:
    """Whether a masker is SHAP's table of background rows, with its own way of masking."""
    maskers = imported().maskers
    return type(masker) in (maskers.Independent, maskers.Partition)
