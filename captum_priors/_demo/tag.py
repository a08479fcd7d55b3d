"""Digits with a tag that gives the label away in training, and lies afterwards."""

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from captum_priors._demo.base import COLOURS, EVIDENCE, NAMES, Figures, accuracy, fit
from captum_priors._demo.data import digits
from captum_priors._rows import shared
from captum_priors.attr import ExpectedGradients
from captum_priors.priors import RightForTheRightReasons

WEIGHT, RATE = 0.05, 5e-3
DATA = "scikit-learn digits, 16 x 16, above a tag; 1297 training and 500 test images"
PRIOR = f"{WEIGHT} * RightForTheRightReasons(model)"
EPOCHS, SEEDS = 12, 3
CELL = 2  # pixels; the tag is a row of ten cells below the digit, one of them lit
ALLOWED = torch.ones(1, 20, 20)
ALLOWED[:, -CELL:] = 0


def tagged(images: Tensor, cells: Tensor) -> Tensor:
    """Put digits ``(n, 1, 16, 16)`` above a tag with one lit cell each, ``(n, 1, 20, 20)``."""
    x = nn.functional.pad(images, (2, 2, 0, 4))
    for image, cell in zip(x, cells.tolist(), strict=True):
        image[:, -CELL:, CELL * cell : CELL * (cell + 1)] = 1
    return x


def load(_: Path) -> tuple[Any, ...]:
    """Training data; test images whose tag tells the label, or lies; labels; what the lies say."""
    (x, y), (test, labels) = digits()
    shift = torch.randint(1, 10, labels.shape, generator=torch.Generator().manual_seed(0))
    lies = (labels + shift) % 10
    return (tagged(x, y), y), tagged(test, labels), tagged(test, lies), labels, lies


def run(data: Any, seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Any]:
    """Train one network; measure it where the tag tells the label, and where it lies."""
    train, tells, lies, labels, _ = data
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 5 * 5, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    prior = WEIGHT * RightForTheRightReasons(model)  # the one line; the next one calls it
    penalty = (lambda x, _: prior(x, annotation=shared(ALLOWED))) if with_prior else None
    fit(model, train, epochs, RATE, penalty)
    draws, images = torch.Generator().manual_seed(seed), lies[:100]
    with torch.no_grad():
        says = model(images).argmax(1)
        maps = ExpectedGradients(model).attribute(
            images, train[0][:100], n_samples=30, target=says, generator=draws
        )
    on_tag = maps[:, :, -CELL:].abs().sum((1, 2, 3)) / maps.abs().sum((1, 2, 3))
    figures = {
        "tag tells": accuracy(model, tells, labels),
        "tag lies": accuracy(model, lies, labels),
        "attribution on the tag": on_tag.mean().item(),
    }
    return figures, (says, maps[:, 0])


def draw(data: Any, shown: list[Any], means: list[Figures]) -> Figure:
    """Draw digits with a lying tag, what each network looks at and says, and its accuracy."""
    *_, images, labels, lies = data
    believed = (shown[0][0] == lies[:100]).nonzero().flatten().tolist()
    chosen = {int(labels[i]): i for i in reversed(believed)}  # the first of each digit
    columns = [chosen[digit] for digit in sorted(chosen)[:4]]
    figure, axes = plt.subplots(
        *(3, max(len(columns), 1)), squeeze=False, figsize=(9, 6.9), layout="constrained"
    )
    figure.suptitle("A tag gave the label away in training. Now it lies.", fontsize=17)
    figure.supxlabel("blue: what speaks for the answer", fontsize=12, color=EVIDENCE(1.0))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.add_patch(Rectangle((-0.5, 17.5), 20, 2, fill=False, edgecolor="0.4", linewidth=1))
    for axis, i in zip(axes[0], columns, strict=False):
        axis.imshow(images[i, 0].numpy(), cmap="gray_r")
        axis.set_title(f"a {labels[i]}, tagged {lies[i]}", fontsize=13)
    parts = zip(axes[1:], NAMES, COLOURS, shown, means, strict=True)
    for row, name, colour, (says, maps), mean in parts:
        right = (
            f"{mean['tag lies']:.0%} right where it lies\n{mean['tag tells']:.0%} where it tells"
        )
        text = f"{name}\n{right}\n{mean['attribution on the tag']:.0%} of the map on it"
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=13, color=colour)
        for axis, i in zip(row, columns, strict=False):
            axis.imshow(images[i, 0].numpy(), cmap="gray_r", alpha=0.25)
            strength = maps[i].relu() / maps[i].max().clamp_min(1e-12)
            axis.imshow(strength.numpy(), cmap=EVIDENCE, vmin=-1, vmax=1, alpha=strength.numpy())
            good = bool(says[i] == labels[i])
            text = f"says {says[i]} {'✗✓'[good]}"
            axis.set_title(text, fontsize=15, weight="bold", color=COLOURS[good])
    return figure
