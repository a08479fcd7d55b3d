"""MNIST under noise, with the pixel prior of Erion et al. 2021."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors._demo.base import GREEN, NAMES, RED, Demo, Figures, accuracy, fit
from captum_priors._demo.data import Split, mnist
from captum_priors.priors import PixelPrior

# The weight costs less than one point of clean accuracy; it is from the sweep of
# ``benchmarks/pixel_prior.py``.
WEIGHT, RATE = 5e-4, 1e-3
NOISE = {
    "Gaussian": (0.25, 0.5, 0.75, 1.0, 1.25),
    "salt and pepper": (0.05, 0.1, 0.2, 0.3),
}


def network() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def run(data: Split, seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Any]:
    """Train one network; measure it clean and under noise, which is the same for both."""
    train, (x, y) = data
    model = network()
    prior = WEIGHT * PixelPrior(model, n_samples=1)

    def penalty(x: Tensor, y: Tensor) -> Tensor:
        # One reference for each image and step, drawn from the batch itself.
        value: Tensor = prior(x, baselines=x, target=y)
        return value

    fit(model, train, epochs, RATE, penalty if with_prior else None)
    figures = {"clean": accuracy(model, x, y)}
    for (kind, levels), corrupt in zip(NOISE.items(), (_gaussian, _salt_and_pepper), strict=True):
        for level in levels:
            draws = torch.Generator().manual_seed(seed)
            noisy = [accuracy(model, corrupt(x, level, draws), y) for _ in range(3)]
            figures[f"{kind} {level:g}"] = sum(noisy) / 3
    return figures, None


def _gaussian(images: Tensor, level: float, draws: torch.Generator) -> Tensor:
    return images + level * torch.randn(images.shape, generator=draws)


def _salt_and_pepper(images: Tensor, level: float, draws: torch.Generator) -> Tensor:
    hit = torch.rand(images.shape, generator=draws) < level
    extreme = torch.randint(2, images.shape, generator=draws).to(images.dtype) * 2 - 1
    return torch.where(hit, extreme, images)


def draw(_: dict[str, Any], means: dict[str, Figures]) -> Figure:
    """Draw accuracy under noise."""
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 3.4), layout="constrained")
    for axis, (kind, levels) in zip(axes, NOISE.items(), strict=True):
        for name, colour in zip(NAMES, (RED, GREEN), strict=True):
            values = [means[name]["clean"], *(means[name][f"{kind} {s:g}"] for s in levels)]
            axis.plot([0, *levels], values, marker="o", label=name, color=colour)
        axis.set_xlabel(f"{kind} noise")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(frameon=False)
    return figure


def demo(folder: Path) -> Demo:
    """Read the data."""
    data = mnist(folder)
    n_train, n_test = (len(labels) for _, labels in data)
    return Demo(
        data=f"MNIST t10k; {n_train} training and {n_test} test images, fixed random split",
        prior=f"{WEIGHT} * PixelPrior(model)",
        epochs=10,
        run=partial(run, data),
        draw=draw,
        seeds=1,
    )
