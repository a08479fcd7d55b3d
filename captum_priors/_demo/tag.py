"""Digits with a tag that gives the label away in training, and lies afterwards."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from captum_priors._demo.base import (
    EVIDENCE,
    GREEN,
    NAMES,
    RED,
    Demo,
    Figures,
    accuracy,
    bare,
    fit,
)
from captum_priors._demo.data import digits
from captum_priors._rows import shared
from captum_priors.attr import ExpectedGradients
from captum_priors.priors import RightForTheRightReasons

WEIGHT, RATE = 0.05, 5e-3
CELL = 2  # pixels; the tag is a row of ten cells below the digit, one of them lit
ALLOWED = torch.ones(1, 20, 20)
ALLOWED[:, -CELL:] = 0


def tagged(images: Tensor, cells: Tensor) -> Tensor:
    """Put digits ``(n, 1, 16, 16)`` above a tag with one lit cell each, ``(n, 1, 20, 20)``."""
    x = nn.functional.pad(images, (2, 2, 0, 4))
    for image, cell in zip(x, cells.tolist(), strict=True):
        image[:, -CELL:, CELL * cell : CELL * (cell + 1)] = 1
    return x


@cache
def data() -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Training data; test images whose tag tells the label, or lies; labels; what the lies say."""
    (x, y), (test, labels) = digits()
    shift = torch.randint(1, 10, labels.shape, generator=torch.Generator().manual_seed(0))
    lies = (labels + shift) % 10
    return (tagged(x, y), y), tagged(test, labels), tagged(test, lies), labels, lies


def network() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 5 * 5, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def run(seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Any]:
    """Train one network; measure it where the tag tells the label, and where it lies."""
    train, tells, lies, labels, _ = data()
    model = network()
    prior = WEIGHT * RightForTheRightReasons(model)  # the one line; the next one passes it on
    allowed = shared(ALLOWED)

    def penalty(x: Tensor, _: Tensor) -> Tensor:
        value: Tensor = prior(x, annotation=allowed)
        return value

    fit(model, train, epochs, RATE, penalty if with_prior else None)
    with torch.no_grad():
        says = model(lies).argmax(1)
        maps = ExpectedGradients(model).attribute(
            lies[:100],
            train[0][:100],
            n_samples=30,
            target=says[:100],
            generator=torch.Generator().manual_seed(seed),
        )
    on_tag = maps[:, :, -CELL:].abs().sum((1, 2, 3)) / maps.abs().sum((1, 2, 3))
    figures = {
        "tag tells": accuracy(model, tells, labels),
        "tag lies": accuracy(model, lies, labels),
        "attribution on the tag": on_tag.mean().item(),
    }
    return figures, (says[:100], maps[:, 0])


def draw(shown: dict[str, Any], means: dict[str, Figures]) -> Figure:
    """Draw digits with a lying tag, what each network looks at and says, and its accuracy."""
    *_, images, labels, lies = data()
    believed = (shown[NAMES[0]][0] == lies[:100]).nonzero().flatten().tolist()
    chosen = {int(labels[i]): i for i in reversed(believed)}  # the first of each digit
    columns = [chosen[digit] for digit in sorted(chosen)[:4]]
    figure = plt.figure(figsize=(10, 6.7), layout="constrained")
    figure.suptitle("A tag gave the label away in training. Now it lies.", fontsize=17)
    parts: Any = figure.subfigures(1, 2, width_ratios=(4, 1))
    left, right = parts
    rows = left.subplots(3, max(len(columns), 1), squeeze=False)
    for axis, i in zip(rows[0], columns, strict=False):
        axis.imshow(images[i, 0].numpy(), cmap="gray_r")
        axis.set_title(f"a {labels[i]}, tagged {lies[i]}", fontsize=13)
    texts = ["image"]
    for row, name in zip(rows[1:], NAMES, strict=True):
        texts.append(f"{name}\n{means[name]['attribution on the tag']:.0%}\non the tag")
        says, maps = shown[name]
        for axis, i in zip(row, columns, strict=False):
            axis.imshow(images[i, 0].numpy(), cmap="gray_r", alpha=0.25)
            strength = maps[i].relu()
            strength = (strength / strength.max().clamp_min(1e-12)).numpy()
            axis.imshow(strength, cmap=EVIDENCE, vmin=-1, vmax=1, alpha=strength)
            good = bool(says[i] == labels[i])
            text, colour = (f"says {says[i]} ✓", GREEN) if good else (f"says {says[i]} ✗", RED)
            axis.set_title(text, fontsize=15, weight="bold", color=colour)
    for axis in rows.flat:
        axis.set(xticks=[], yticks=[])
        axis.add_patch(Rectangle((-0.5, 17.5), 20, 2, fill=False, edgecolor="0.4", linewidth=1))
    for row, label in zip(rows, texts, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=13)
    left.supxlabel("blue: what speaks for the answer", fontsize=12, color=EVIDENCE(1.0))
    for axis, kind in zip(right.subplots(2, 1), ("tag tells", "tag lies"), strict=True):
        values = [means[name][kind] for name in NAMES]
        bars = axis.bar(("without", "with"), values, color=(RED, GREEN), width=0.7)
        axis.bar_label(bars, [f"{value:.0%}" for value in values], fontsize=13)
        axis.set(ylim=(0, 1.15), yticks=[])
        axis.set_title(f"right, {kind}", fontsize=13)
        bare(axis)
    return figure


def demo(_: Path) -> Demo:
    """Return the demo."""
    return Demo(
        data="scikit-learn digits, 16 x 16, above a tag; 1297 training and 500 test images",
        prior=f"{WEIGHT} * RightForTheRightReasons(model)",
        epochs=12,
        run=run,
        draw=draw,
    )
