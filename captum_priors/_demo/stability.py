"""Digits under an attack that moves the explanation."""

from typing import Any

from captum.attr import Saliency
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from captum_priors._demo.base import COLOURS, NAMES, Figures, accuracy, fit
from captum_priors._demo.data import digits as load
from captum_priors.attacks import TopKAttack
from captum_priors.metrics import top_k_intersection
from captum_priors.stability import HessianPenalty, smooth_activations

WEIGHT, RATE, RADIUS, K = 0.01, 4e-3, 0.15, 25
DATA = f"scikit-learn digits, 16 x 16; every pixel may change by {RADIUS} of 1"
PRIOR = f"{WEIGHT} * HessianPenalty(model), on smooth_activations(network)"
EPOCHS, SEEDS = 12, 1
STAYS = f"top {K} pixels that stay"

__all__ = ["DATA", "EPOCHS", "PRIOR", "SEEDS", "draw", "load", "run"]


def run(data: Any, seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Any]:
    """Train one network; attack the gradients of what it predicts."""
    train, (x, y) = data
    model: nn.Module = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    model = smooth_activations(model, beta=10) if with_prior else model
    prior = WEIGHT * HessianPenalty(model)
    penalty = (lambda x, y: prior(x, target=y)) if with_prior else None
    fit(model, train, epochs, RATE, penalty)
    explainer, images = Saliency(model), x[:60]
    target = model(images).argmax(1)
    box: Any = {"lower_bound": 0.0, "upper_bound": 1.0}
    attack = TopKAttack(explainer, K, radius=RADIUS, step_num=15, seed=seed, **box)
    attacked: Any = attack.perturb(images, target=target)
    maps = [
        explainer.attribute(each.clone().requires_grad_(), target=target).detach()
        for each in (images, attacked)
    ]
    figures = {
        "accuracy": accuracy(model, x, y),
        "same prediction under attack": accuracy(model, attacked, target),
        STAYS: top_k_intersection(*maps, K).mean().item(),
    }
    return figures, {"image": images, "attacked": attacked, "its map": maps[0], "then": maps[1]}


def draw(_: Any, shown: list[Any], means: list[Figures]) -> Figure:
    """Draw digits, and maps before and after the attack."""
    figure = plt.figure(figsize=(10, 4.3), layout="constrained")
    parts: Any = figure.subfigures(1, 2)
    for part, name, colour, tiles, mean in zip(parts, NAMES, COLOURS, shown, means, strict=True):
        text = f"{name}: {mean[STAYS]:.0%} of the top {K} stay"
        part.suptitle(text, fontsize=14, weight="bold", color=colour)
        for row, axes in enumerate(part.subplots(3, 4)):
            for axis, (title, images) in zip(axes, tiles.items(), strict=True):
                colours = "magma" if title in ("its map", "then") else "gray_r"
                axis.imshow(images[row, 0].numpy(), cmap=colours)
                axis.set(xticks=[], yticks=[], title="" if row else title)
    return figure
