r"""SHAP's own sampling loop of GradientExplainer, run on stand-ins for rows.

The loop decides where gradients are taken and what they are multiplied by, as sums

.. math:: s\,(x_j + \varepsilon) + o\,b_r

of an example, its smoothing and a background row. On stand-ins it writes down :math:`s, o, r` and
:math:`\varepsilon`, and touches neither the model nor the device the data are on. So the draws and
their arithmetic are SHAP's, and the gradients can be taken in batches with their graph.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors._engine._numpy_state import NumPyState
from captum_priors._engine._random import in_turn
from captum_priors._errors import NotDifferentiableError, expected_found


class _Row:
    """A multiple of an example, of a background row, or the sum of both."""

    __slots__ = ("example", "loop", "noise", "number", "other", "shape", "share")

    def __init__(
        self,
        loop: "_Loop",
        shape: Any,
        share: float,
        example: int | None,
        other: float,
        number: int | None,
        noise: Any,
    ) -> None:
        self.loop, self.shape, self.noise = loop, shape, noise
        self.share, self.example, self.other, self.number = share, example, other, number

    def clone(self) -> "_Row":
        return self

    detach = cpu = numpy = clone

    def __rmul__(self, by: float) -> "_Row":
        share, other = by * self.share, by * self.other
        return _Row(self.loop, self.shape, share, self.example, other, self.number, self.noise)

    __mul__ = __rmul__

    def __add__(self, added: Any) -> Any:
        if isinstance(added, Tensor) and (self.share, self.other, self.noise) == (1.0, 0.0, None):
            return _Row(self.loop, self.shape, 1.0, self.example, 0.0, self.number, added)
        return self._plus(added, 1.0)

    def __sub__(self, taken: Any) -> Any:
        return self._plus(taken, -1.0)

    def _plus(self, row: Any, sign: float) -> Any:
        if not isinstance(row, _Row):
            return NotImplemented
        example, number = _either(self.example, row.example), _either(self.number, row.number)
        share, other = self.share + sign * row.share, self.other + sign * row.other
        noise = _either(self.noise, row.noise)
        return _Row(self.loop, self.shape, share, example, other, number, noise)

    def __float__(self) -> float:  # on its way into an array
        return self.loop.number_of(self)

    @classmethod
    def __torch_function__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is not Tensor.__setitem__:
            return NotImplemented
        samples, place, row = args
        row.loop.keep(samples, place, row)
        return None


def _either(mine: Any, theirs: Any) -> Any:
    if mine is None:
        return theirs
    if theirs is None:
        return mine
    raise TypeError("two of a kind in one sum")


class _Rows:
    """Examples, or background rows, of one input."""

    def __init__(self, loop: "_Loop", rows: Tensor, *, background: bool) -> None:
        self.shape, self.device = (len(rows),), rows.device
        self._loop, self._shape, self._background = loop, rows.shape[1:], background
        self._made: dict[int, _Row] = {}  # few, asked for often

    def __getitem__(self, number: Any) -> _Row:
        place = int(number)
        row = self._made.get(place)
        if row is None and self._background:
            row = self._made[place] = _Row(self._loop, self._shape, 0.0, None, 1.0, place, None)
        elif row is None:
            row = self._made[place] = _Row(self._loop, self._shape, 1.0, place, 0.0, None, None)
        return row


class _Gradient:
    """A gradient that is yet to be taken, and what SHAP does with it."""

    def __init__(self, loop: "_Loop") -> None:
        self._loop = loop

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return self if f is np.concatenate else NotImplemented

    def __mul__(self, factors: np.ndarray) -> np.ndarray:
        self._loop.multiply(factors)
        return np.zeros(len(factors))


@dataclass(frozen=True)
class Sums:
    """Sums of rows for each example and sample, of one input."""

    share: np.ndarray
    other: np.ndarray
    number: np.ndarray
    noise: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[_Row]) -> "Sums":
        """Collect what the loop wrote down for one example."""
        share, other, number = (
            np.array([[getattr(row, name) for row in rows]])
            for name in ("share", "other", "number")
        )
        smoothed = bool(rows) and rows[0].noise is not None
        noise = torch.stack([row.noise for row in rows]).unsqueeze(0) if smoothed else None
        return cls(share, other, number, noise)

    @classmethod
    def cat(cls, each: Sequence["Sums"]) -> "Sums":
        """Put examples together."""
        share, other, number = (
            np.concatenate([getattr(sums, name) for sums in each])
            for name in ("share", "other", "number")
        )
        noises = [sums.noise for sums in each if sums.noise is not None]
        return cls(share, other, number, torch.cat(noises) if noises else None)

    def __getitem__(self, rows: slice) -> "Sums":
        noise = None if self.noise is None else self.noise[rows]
        return Sums(self.share[rows], self.other[rows], self.number[rows], noise)

    def at(self, x: Tensor, background: Tensor) -> Tensor:
        """Evaluate on some examples, ``(examples, samples, ...)``."""

        def spread(factors: np.ndarray) -> Tensor:
            return torch.as_tensor(factors).to(x).reshape(*factors.shape, *[1] * (x.dim() - 1))

        moved = x.unsqueeze(1) if self.noise is None else x.unsqueeze(1) + self.noise
        rows = background[torch.as_tensor(self.number, device=background.device)]
        return spread(self.share) * moved + spread(self.other) * rows


@dataclass(frozen=True)
class Drawn:
    """Points and factors, one each for each input."""

    points: list[Sums]
    factors: list[Sums]

    def __getitem__(self, rows: slice) -> "Drawn":
        return Drawn([s[rows] for s in self.points], [s[rows] for s in self.factors])


class _Loop:
    """What one run of the loop asks for."""

    def __init__(self, n_inputs: int, n_examples: int) -> None:
        self._n_inputs, self._n_examples, self._example = n_inputs, n_examples, 0
        self._kept: dict[int, dict[int, _Row]] = {}
        self._numbered: list[_Row] = []
        self.points: list[list[Sums]] = []  # example by example, input by input
        self.factors: list[list[Sums]] = []

    def keep(self, samples: Tensor, place: int, row: _Row) -> None:
        self._kept.setdefault(id(samples), {})[place] = row

    def number_of(self, row: _Row) -> float:
        self._numbered.append(row)
        return float(len(self._numbered) - 1)

    def gradient(self, output: Any, inputs: Sequence[Tensor]) -> list[_Gradient]:
        """Stand in for SHAP's method of this name: it gets all samples of an example."""
        self._example = len(self.points) % self._n_examples
        samples = range(len(inputs[0]))
        self.points.append([self._sums([kept[k] for k in samples]) for kept in self._kept.values()])
        self.factors.append([])
        return [_Gradient(self)] * self._n_inputs

    def multiply(self, factors: np.ndarray) -> None:
        self.factors[-1].append(self._sums([self._numbered[int(place)] for place in factors]))
        if len(self.factors[-1]) == self._n_inputs:
            self._numbered.clear()

    def _sums(self, rows: Sequence[_Row]) -> Sums:
        if any(row.example not in (None, self._example) for row in rows):
            raise TypeError("rows of another example")
        return Sums.of(rows)

    def drawn(self, examples: slice) -> Drawn:
        points, factors = (
            [Sums.cat(sums) for sums in zip(*part[examples], strict=True)]
            for part in (self.points, self.factors)
        )
        return Drawn(points, factors)


def draw(
    explainer: Any,
    inputs: Sequence[Tensor],
    background: Sequence[Tensor],
    *,
    n_samples: int,
    n_outputs: int,
    seed: int,
) -> list[Drawn]:
    """Run SHAP's loop; say what it drew for each output.

    It starts from the same seed for each of them. Only the smoothing, from torch's generator, is
    drawn anew, so that without it one run stands for all.
    """
    runs = n_outputs if explainer.local_smoothing > 0 else 1
    n = len(inputs[0])
    loop, twin = _Loop(len(inputs), n), copy.copy(explainer)
    twin.data = twin.model_inputs = [_Rows(loop, b, background=True) for b in background]
    twin.gradients, twin.batch_size = [None] * runs, n_samples
    twin.interim, twin.layer, twin.input_handle = False, None, None
    twin.gradient = loop.gradient
    rows: list[Any] = [_Rows(loop, x, background=False) for x in inputs]
    with in_turn():  # the loop seeds NumPy's global generator and draws from it
        state = NumPyState.now()
        try:
            twin.shap_values(rows if twin.multi_input else rows[0], n_samples, rseed=seed)
            each = [loop.drawn(slice(i * n, (i + 1) * n)) for i in range(runs)]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise NotDifferentiableError(
                expected_found(
                    "GradientExplainer",
                    "the sampling loop of the SHAP versions that this adapter is made for",
                    f"one that does something else with its rows ({error})",
                    "Use a SHAP version that pyproject.toml names.",
                )
            ) from error
        finally:
            state.restore()
    return each * (n_outputs // runs)
