"""MNIST under noise, with the pixel prior of Erion et al. 2021."""

from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors._demo.base import COLOURS, NAMES, Figures, accuracy, fit
from captum_priors._demo.data import mnist as load
from captum_priors.priors import PixelPrior

# The weight costs less than one point of clean accuracy; it is from the sweep of
# ``benchmarks/pixel_prior.py``.
WEIGHT, RATE = 5e-4, 1e-3
DATA = "MNIST's t10k images, four fifths to train on, one to test"
PRIOR = f"{WEIGHT} * PixelPrior(model)"
EPOCHS, SEEDS = 10, 1
NOISE = {"Gaussian": (0.25, 0.5, 0.75, 1.0, 1.25), "salt and pepper": (0.05, 0.1, 0.2, 0.3)}

__all__ = ["DATA", "EPOCHS", "PRIOR", "SEEDS", "draw", "load", "run"]


def run(data: Any, seed: int, with_prior: bool, epochs: int) -> tuple[Figures, None]:
    """Train one network; measure it clean and under noise, which is the same for both."""
    train, (x, y) = data
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    prior = WEIGHT * PixelPrior(model, n_samples=1)
    # One reference for each image and step, drawn from the batch itself.
    penalty = (lambda x, y: prior(x, baselines=x, target=y)) if with_prior else None
    fit(model, train, epochs, RATE, penalty)
    figures, draws = {"clean": accuracy(model, x, y)}, torch.Generator()
    for kind, levels in NOISE.items():
        for level in levels:
            draws.manual_seed(seed)
            noisy = [accuracy(model, _corrupt(x, kind, level, draws), y) for _ in range(3)]
            figures[f"{kind} {level:g}"] = sum(noisy) / 3
    return figures, None


def _corrupt(images: Tensor, kind: str, level: float, draws: torch.Generator) -> Tensor:
    if kind == "Gaussian":
        return images + level * torch.randn(images.shape, generator=draws)
    hit = torch.rand(images.shape, generator=draws) < level
    extreme = torch.randint(2, images.shape, generator=draws).to(images.dtype) * 2 - 1
    return torch.where(hit, extreme, images)


def draw(_: Any, shown: Any, means: list[Figures]) -> Figure:
    """Draw accuracy under noise."""
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 3.4), layout="constrained")
    for axis, (kind, levels) in zip(axes, NOISE.items(), strict=True):
        for name, colour, mean in zip(NAMES, COLOURS, means, strict=True):
            values = [mean["clean"], *(mean[f"{kind} {level:g}"] for level in levels)]
            axis.plot([0, *levels], values, marker="o", label=name, color=colour)
        axis.set(xlabel=f"{kind} noise", ylabel="test accuracy")
        axis.legend(frameon=False)
    return figure
