"""The comparison as a table, a JSON file and a picture."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from captum_priors._demo.data import Images
from captum_priors._demo.evaluation import Evaluation, attribution_maps
from captum_priors._demo.training import Run, Settings

_MOST_SHOWN = 8  # one image of each class, up to this many
_COLOURS = ("0.45", "tab:red")


def table(names: tuple[str, str], evaluations: tuple[Evaluation, Evaluation]) -> Table:
    """Figures of both models side by side."""
    result = Table(title="Test set")
    result.add_column("")
    for name in (*names, "difference"):
        result.add_column(name, justify="right")

    def row(label: str, before: float, after: float, form: str) -> None:
        difference = f"{after - before:+{form}}"
        result.add_row(label, f"{before:{form}}", f"{after:{form}}", difference)

    a, b = evaluations
    row("accuracy, clean", a.clean_accuracy, b.clean_accuracy, ".3f")
    for level, accuracy in a.gaussian_accuracy.items():
        row(f"accuracy, Gaussian noise {level}", accuracy, b.gaussian_accuracy[level], ".3f")
    for level, accuracy in a.salt_and_pepper_accuracy.items():
        row(
            f"accuracy, salt and pepper {level}", accuracy, b.salt_and_pepper_accuracy[level], ".3f"
        )
    row(
        "total variation of attribution maps",
        a.attribution_total_variation,
        b.attribution_total_variation,
        ".0f",
    )
    return result


def figures(
    images: Images,
    settings: Settings,
    prior: str,
    runs: dict[str, Run],
    evaluations: dict[str, Evaluation],
) -> dict[str, Any]:
    """Return everything that was measured, and what is needed to measure it again."""
    return {
        "data": {"name": images.name, "split": images.split, "range": [-1, 1]},
        "settings": {**asdict(settings), "prior": prior},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("captum_priors", "torch", "captum", "numpy")},
        },
        "models": {
            name: {
                "seconds": runs[name].seconds,
                "epochs": [asdict(epoch) for epoch in runs[name].epochs],
                **asdict(evaluations[name]),
            }
            for name in runs
        },
    }


def write(
    folder: Path,
    result: dict[str, Any],
    images: Images,
    runs: dict[str, Run],
    evaluations: dict[str, Evaluation],
) -> None:
    """Write ``report.json`` and ``report.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _draw(folder / "report.png", images, runs, evaluations, result["settings"]["seed"])


def _draw(
    path: Path,
    images: Images,
    runs: dict[str, Run],
    evaluations: dict[str, Evaluation],
    seed: int,
) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # after the choice of a backend that needs no screen

    classes = images.test[1].unique()[:_MOST_SHOWN]
    first = [int((images.test[1] == label).nonzero()[0]) for label in classes]
    shown, labels = (t[first] for t in images.test)
    maps = {
        name: attribution_maps(run.model, shown, labels, images.train[0], seed)
        for name, run in runs.items()
    }
    figure = plt.figure(figsize=(9, 5.8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    top, bottom = halves
    top.suptitle("What speaks for (red) and against (blue) the true class", fontsize=11)
    for row, axes in zip(
        (shown, *maps.values()), top.subplots(1 + len(maps), len(shown)), strict=True
    ):
        for i, axis in enumerate(axes):
            axis.set(xticks=[], yticks=[])
            if row is shown:
                axis.imshow(row[i, 0].numpy(), cmap="gray_r")
            else:  # one scale for all maps of an image
                sizes = torch.stack([m[i, 0] for m in maps.values()]).abs().numpy()
                limit = float(np.percentile(sizes, 99)) or 1.0
                axis.imshow(row[i, 0].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for axes, label in zip(top.axes[:: len(shown)], ("image", *maps), strict=True):
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, kind, label in zip(
        bottom.subplots(1, 2, sharey=True),
        ("gaussian_accuracy", "salt_and_pepper_accuracy"),
        ("standard deviation of Gaussian noise", "fraction of pixels set to black or white"),
        strict=True,
    ):
        for (name, evaluation), colour in zip(evaluations.items(), _COLOURS, strict=True):
            levels: dict[str, float] = getattr(evaluation, kind)
            axis.plot(
                [0.0, *map(float, levels)],
                [evaluation.clean_accuracy, *levels.values()],
                marker="o",
                label=name,
                color=colour,
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.label_outer()
    bottom.axes[0].set_ylabel("test accuracy")
    bottom.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show(console: Console, images: Images, runs: dict[str, Run], result: Table) -> None:
    """Print what was compared and how it came out."""
    console.print(f"{images.name}: {images.split}. torch {torch.__version__}.")
    console.print(result)
    seconds = ", ".join(f"{name} {run.seconds:.0f} s" for name, run in runs.items())
    console.print(f"Training: {seconds}.")
