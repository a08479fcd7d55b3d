"""What every demo is, and the training loop and the table that they share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

mpl.use("Agg")  # needs no screen

NAMES = ("without prior", "with prior")
RED, GREEN = "#c0392b", "#1e8449"
# What speaks against an answer is orange, what speaks for it blue.
EVIDENCE = LinearSegmentedColormap.from_list("evidence", ["#d35400", "#ffffff", "#0b4fd6"])
Figures = dict[str, Any]


@dataclass(frozen=True)
class Demo:
    """Two networks, of which ``run(seed, with_prior, epochs)`` trains and measures one.

    It returns figures, and what the picture needs. ``draw`` gets the latter of the first seed, and
    means of the figures, by the names of the models.
    """

    data: str
    prior: str
    epochs: int
    run: Callable[[int, bool, int], tuple[Figures, Any]]
    draw: Callable[[dict[str, Any], dict[str, Figures]], Figure]
    seeds: int = 3


def compare(demo: Demo, first: int, epochs: int) -> tuple[dict[str, Figures], Figure]:
    """Train both models from each seed; return their figures and the picture."""
    seeds = range(first, first + demo.seeds)
    found: dict[str, list[Figures]] = {name: [] for name in NAMES}
    shown: dict[str, Any] = {}
    for seed in track(seeds, "training"):
        for name in NAMES:
            torch.manual_seed(seed)  # the first steps differ by the prior alone
            figures, what = demo.run(seed, name == "with prior", epochs)
            found[name].append({"seed": seed, **figures})
            shown.setdefault(name, what)
    means = {
        name: {
            figure: sum(each[figure] for each in runs) / len(runs)
            for figure in runs[0]
            if figure != "seed"
        }
        for name, runs in found.items()
    }
    picture = demo.draw(shown, means)
    return {name: {**means[name], "seeds": found[name]} for name in NAMES}, picture


def fit(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    rate: float,
    prior: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    batch_size: int = 64,
) -> None:
    """Train a classifier, with a prior of each batch and its labels where there is one."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), rate)
    n_steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch_size):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if prior is not None:
                loss = loss + prior(x[rows], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of examples that the model gets right."""
    return float((model(x).argmax(1) == y).float().mean())


def table(models: dict[str, Figures], title: str) -> Table:
    """Figures of both models side by side."""
    without, with_prior = (models[name] for name in NAMES)
    shown = Table("", title=title)
    for name in (*NAMES, "difference"):
        shown.add_column(name, justify="right")
    for figure in (name for name in without if name != "seeds"):
        a, b = without[figure], with_prior[figure]
        shown.add_row(figure, f"{a:.3g}", f"{b:.3g}", f"{b - a:+.2g}")
    return shown


def bare(axis: Axes) -> None:
    """Leave an image or a chart its data alone."""
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
