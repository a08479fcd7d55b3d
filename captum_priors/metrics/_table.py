"""The result of a stability report: rows, text, picture."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from captum_priors._errors import expected_found
from captum_priors._extras import extra


@dataclass(frozen=True)
class Score:
    """A mean over ``n`` examples with the ends of its confidence interval.

    Example:
        >>> from captum_priors.metrics import Score
        >>> print(Score(0.5, 0.25, 0.75, 8))
        0.500 [0.250, 0.750]
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], confidence: float) -> "Score":
        """Average what is not NaN.

        The interval is Student's, and Wilson's for zeros and ones, where Student's may leave [0, 1]
        or shrink to a point; NaN for fewer than two values.
        """
        known = np.asarray([v for v in values if not np.isnan(v)], np.float64)
        n, nan = len(known), float("nan")
        if n < 2:
            return cls(float(known.mean()) if n else nan, nan, nan, n)
        stats = extra("scipy.stats", "metrics")
        mean = float(known.mean())
        if set(known) <= {0.0, 1.0}:
            share = stats.binomtest(int(known.sum()), n).proportion_ci(confidence, method="wilson")
            return cls(mean, float(share.low), float(share.high), n)
        quantile = stats.t.ppf((1 + confidence) / 2, n - 1)
        half = float(quantile * known.std(ddof=1) / n**0.5)
        return cls(mean, mean - half, mean + half, n)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """One model explained by one explainer under one attack.

    Example:
        >>> from captum_priors.metrics import Row, Score
        >>> row = Row("plain", "Saliency", "TopK", {"pearson": Score(0.9, 0.8, 1.0, 50)})
        >>> row.scores["pearson"].mean
        0.9
    """

    model: str
    explainer: str
    attack: str
    scores: dict[str, Score]


@dataclass(frozen=True)
class Example:
    """An input with its clean and attacked maps, to be drawn; arrays without a batch dimension."""

    model: str
    explainer: str
    attack: str
    inputs: Tensor
    attacked: Tensor
    clean_map: Tensor
    attacked_map: Tensor


@dataclass(frozen=True)
class StabilityReport:
    """What :func:`stability_report` found: ``print`` it, or take its ``rows``.

    Example:
        >>> from captum_priors.metrics import Row, Score, StabilityReport
        >>> score = Score(0.9, 0.8, 1.0, 50)
        >>> print(StabilityReport((Row("plain", "Saliency", "TopK", {"pearson": score}),), 0.95))
        model  explainer  attack  n   pearson
        plain  Saliency   TopK    50  0.900 [0.800, 1.000]
        mean over n examples with its 95% confidence interval
    """

    rows: tuple[Row, ...]
    confidence: float
    examples: tuple[Example, ...] = field(default=(), repr=False)

    def row(self, model: str = "", explainer: str = "", attack: str = "") -> Row:
        """Return the one row of these names; an empty name fits any.

        Raises:
            KeyError: If no row fits, or several do.
        """
        wanted = (model, explainer, attack)
        found = [
            r
            for r in self.rows
            if all(
                w in ("", name)
                for w, name in zip(wanted, (r.model, r.explainer, r.attack), strict=True)
            )
        ]
        if len(found) != 1:
            raise KeyError(
                expected_found(
                    "`row`", f"one row for {wanted}", str(len(found)), "Name all three of it."
                )
            )
        return found[0]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries, for JSON."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row.scores))
        lines = [["model", "explainer", "attack", "n", *names]]
        for row in self.rows:
            n = max((score.n for score in row.scores.values()), default=0)
            cells = [str(row.scores[name]) if name in row.scores else "" for name in names]
            lines.append([row.model, row.explainer, row.attack, str(n), *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        text.append(f"mean over n examples with its {self.confidence:.0%} confidence interval")
        return "\n".join(text)

    def figure(self, *, show: Callable[[Row], bool] = lambda row: True) -> Any:
        """Draw clean and attacked inputs and maps side by side: a matplotlib ``Figure``.

        Args:
            show: Which rows of the table to draw examples of.

        Returns:
            The figure; save it with ``figure.savefig(path)``.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If there is nothing to draw.
        """
        figures = extra("matplotlib.figure", "metrics")
        kept = {(r.model, r.explainer, r.attack) for r in self.rows if show(r)}
        drawn = [e for e in self.examples if (e.model, e.explainer, e.attack) in kept]
        if not drawn:
            raise ValueError(
                expected_found(
                    "examples",
                    "at least one to draw",
                    "none",
                    "Run the report with n_shown of at least 1, on inputs with one tensor.",
                )
            )
        figure = figures.Figure(figsize=(8, 1.9 * len(drawn) + 0.4), layout="constrained")
        grid = figure.subplots(len(drawn), 4, squeeze=False)
        for axes, example in zip(grid, drawn, strict=True):
            axes[0].set_ylabel(
                f"{example.model}\n{example.explainer}\n{example.attack}", fontsize=7
            )
            _draw_pair(axes[:2], (example.inputs, example.attacked), "gray", symmetric=False)
            _draw_pair(
                axes[2:], (example.clean_map, example.attacked_map), "seismic", symmetric=True
            )
        for axis, title in zip(grid[0], ("input", "attacked", "map", "map, attacked"), strict=True):
            axis.set_title(title, fontsize=9)
        return figure


def _draw_pair(axes: Any, pair: tuple[Tensor, Tensor], colours: str, *, symmetric: bool) -> None:
    """Draw two tensors on one scale: images as images, anything else as bars."""
    arrays = [_picture(t) for t in pair]
    largest = max(float(np.nanmax(np.abs(a))) for a in arrays) or 1.0
    low = -largest if symmetric else min(float(np.nanmin(a)) for a in arrays)
    for axis, array in zip(axes, arrays, strict=True):
        if array.ndim == 2:
            axis.imshow(array, cmap=colours, vmin=low, vmax=largest)
        else:
            axis.bar(range(array.size), array.ravel(), color="tab:blue")
            axis.set_ylim(min(low, 0), largest)
        axis.set_xticks([])
        axis.set_yticks([])


def _picture(tensor: Tensor) -> Any:
    """Average an image's channels; leave a plain image and flatten the rest."""
    array = tensor.detach().cpu().double()
    if array.dim() == 3:
        array = array.mean(0)
    return (array if array.dim() == 2 else array.flatten()).numpy()
