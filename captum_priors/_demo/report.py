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
from torch import Tensor

from captum_priors._demo.data import Images
from captum_priors._demo.evaluation import Evaluation, attribution_maps
from captum_priors._demo.training import Run, Settings

_SHOWN = 5


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

    figure = plt.figure(figsize=(13, 7), layout="constrained")
    halves = figure.add_gridspec(1, 2, width_ratios=(1, 1.1))
    left, right = (figure.add_subfigure(halves[0, i]) for i in (0, 1))
    left.suptitle("Expected gradients of the true class\n(red: for it, blue: against it)")
    grid = left.subplots(_SHOWN, 1 + len(runs))
    shown, labels = (t[:_SHOWN] for t in images.test)
    maps = {
        name: attribution_maps(run.model, shown, labels, images.train[0], seed)
        for name, run in runs.items()
    }
    for i, row in enumerate(grid):
        row[0].imshow(shown[i, 0].numpy(), cmap="gray_r")
        for axis, (name, attributions) in zip(row[1:], maps.items(), strict=True):
            _show_map(axis, attributions[i, 0])
            if i == 0:
                axis.set_title(name)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    axes = right.subplots(2, 1, sharey=True)
    for axis, kind, label in (
        (axes[0], "gaussian_accuracy", "standard deviation of Gaussian noise"),
        (axes[1], "salt_and_pepper_accuracy", "fraction of pixels set to black or white"),
    ):
        for name, evaluation in evaluations.items():
            levels: dict[str, float] = getattr(evaluation, kind)
            axis.plot(
                [0.0, *map(float, levels)],
                [evaluation.clean_accuracy, *levels.values()],
                marker="o",
                label=name,
            )
        axis.set_xlabel(label)
        axis.set_ylabel("test accuracy")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _show_map(axis: Any, attributions: Tensor) -> None:
    limit = float(np.percentile(attributions.abs().numpy(), 99)) or 1.0
    axis.imshow(attributions.numpy(), cmap="seismic", vmin=-limit, vmax=limit)


def show(console: Console, images: Images, runs: dict[str, Run], result: Table) -> None:
    """Print what was compared and how it came out."""
    console.print(f"{images.name}: {images.split}. torch {torch.__version__}.")
    console.print(result)
    seconds = ", ".join(f"{name} {run.seconds:.0f} s" for name, run in runs.items())
    console.print(f"Training: {seconds}.")
