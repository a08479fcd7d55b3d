"""Digits under an attack that moves the explanation."""

from pathlib import Path
from typing import Any

from captum.attr import Saliency
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors._demo.base import GREEN, NAMES, RED, Demo, Figures, accuracy, fit
from captum_priors._demo.data import digits
from captum_priors.attacks import TopKAttack
from captum_priors.metrics import top_k_intersection
from captum_priors.stability import HessianPenalty, smooth_activations

WEIGHT, RATE, RADIUS, K = 0.01, 4e-3, 0.15, 25


def network() -> nn.Module:
    """Two strided convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def run(seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Any]:
    """Train one network; attack the gradients of what it predicts."""
    train, (x, y) = digits()
    model = smooth_activations(network(), beta=10) if with_prior else network()
    prior = WEIGHT * HessianPenalty(model)

    def penalty(x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = prior(x, target=y)
        return value

    fit(model, train, epochs, RATE, penalty if with_prior else None)
    images = x[:60]
    target = model(images).argmax(1)
    attack = TopKAttack(
        *(Saliency(model), K),
        radius=RADIUS,
        step_num=15,
        lower_bound=0.0,
        upper_bound=1.0,
        seed=seed,
    )
    attacked: Any = attack.perturb(images, target=target)
    maps = [
        Saliency(model).attribute(each.clone().requires_grad_(), target=target).detach()
        for each in (images, attacked)
    ]
    figures = {
        "accuracy": accuracy(model, x, y),
        "same prediction under attack": accuracy(model, attacked, target),
        f"top {K} pixels that stay": top_k_intersection(*maps, K).mean().item(),
    }
    return figures, (images, attacked, *maps)


def draw(shown: dict[str, Any], means: dict[str, Figures]) -> Figure:
    """Draw digits, and maps before and after the attack."""
    figure = plt.figure(figsize=(10, 4.3), layout="constrained")
    parts: Any = figure.subfigures(1, 2)
    for part, name, colour in zip(parts, NAMES, (RED, GREEN), strict=True):
        stays = means[name][f"top {K} pixels that stay"]
        text = f"{name}: {stays:.0%} of the top {K} stay"
        part.suptitle(text, fontsize=14, weight="bold", color=colour)
        images, attacked, before, after = (each[:3, 0].numpy() for each in shown[name])
        for row, *maps in zip(part.subplots(3, 4), images, attacked, before, after, strict=True):
            for axis, each, colours in zip(
                row, maps, ("gray_r",) * 2 + ("magma",) * 2, strict=True
            ):
                axis.imshow(each, cmap=colours)
                axis.set(xticks=[], yticks=[])
        for axis, title in zip(
            part.axes, ("image", "attacked", "its map", "attacked"), strict=False
        ):
            axis.set_title(title)
    return figure


def demo(_: Path) -> Demo:
    """Return the demo."""
    return Demo(
        data=f"scikit-learn digits, 16 x 16; every pixel may change by {RADIUS} of 1",
        prior=f"{WEIGHT} * HessianPenalty(model), on smooth_activations(network)",
        epochs=12,
        run=run,
        draw=draw,
        seeds=1,
    )
