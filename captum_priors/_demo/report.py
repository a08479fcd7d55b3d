"""The comparison as a table and as a picture."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from captum_priors._demo.data import Images

_MOST_SHOWN = 8  # one image of each class, up to this many
_COLOURS = ("0.45", "tab:red")
Results = dict[str, dict[str, Any]]


def table(results: Results) -> Table:
    """Figures of both models side by side."""
    figures = [
        {
            "training, seconds": found["seconds"],
            "accuracy, clean": found["clean_accuracy"],
            **{f"accuracy, Gaussian {s}": a for s, a in found["gaussian_accuracy"].items()},
            **{
                f"accuracy, salt and pepper {p}": a
                for p, a in found["salt_and_pepper_accuracy"].items()
            },
            "total variation of attribution maps": found["attribution_total_variation"],
        }
        for found in results.values()
    ]
    shown = Table("", title="On the test set")
    for name in (*results, "difference"):
        shown.add_column(name, justify="right")
    for label in figures[0]:
        a, b = (each[label] for each in figures)
        form = ".3f" if label.startswith("accuracy") else ".0f"
        shown.add_row(label, f"{a:{form}}", f"{b:{form}}", f"{b - a:+{form}}")
    return shown


def draw(path: Path, images: Images, maps: dict[str, Tensor], results: Results) -> None:
    """Draw one image of each class with its maps, and accuracy under noise."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # after the choice of a backend that needs no screen

    labels = images.test[1][: len(next(iter(maps.values())))]
    shown = [int((labels == label).nonzero()[0]) for label in labels.unique()[:_MOST_SHOWN]]
    figure = plt.figure(figsize=(9, 5.8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    top, bottom = halves
    top.suptitle("What speaks for (red) and against (blue) the true class", fontsize=11)
    for axes, i in zip(top.subplots(1 + len(maps), len(shown)).T, shown, strict=True):
        axes[0].imshow(images.test[0][i, 0].numpy(), cmap="gray_r")
        # One scale for all maps of an image.
        sizes = torch.stack([each[i, 0] for each in maps.values()]).abs().numpy()
        limit = float(np.percentile(sizes, 99)) or 1.0
        for axis, each in zip(axes[1:], maps.values(), strict=True):
            axis.imshow(each[i, 0].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for axis in top.axes:
        axis.set(xticks=[], yticks=[])
    for axis, label in zip(top.axes[:: len(shown)], ("image", *maps), strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, kind, label in zip(
        bottom.subplots(1, 2, sharey=True),
        ("gaussian_accuracy", "salt_and_pepper_accuracy"),
        ("standard deviation of Gaussian noise", "fraction of pixels set to black or white"),
        strict=True,
    ):
        for (name, found), colour in zip(results.items(), _COLOURS, strict=True):
            levels = [0.0, *map(float, found[kind])]
            accuracies = [found["clean_accuracy"], *found[kind].values()]
            axis.plot(levels, accuracies, marker="o", label=name, color=colour)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.label_outer()
    bottom.axes[0].set_ylabel("test accuracy")
    bottom.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
