"""What the stability study measures of a network: attacks on its maps, and how they look."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _stability import TOP, Batch, Sizes, Study, pgd
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from matplotlib.image import imread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_priors.attacks import RandomAttack, TopKAttack
from captum_priors.metrics import StabilityReport, gini, spearman, stability_report

FASHION_RADII = (0.02, 0.04, 0.06, 0.08)
PUBLISHED_FASHION = {  # top-50 at these radii, in the plot of the authors' code
    "original": (0.70, 0.636, 0.586, 0.545),
    "ATEX": (0.76, 0.688, 0.635, 0.592),
}


def attacked(
    explainer: Any, data: Batch, radii: Iterable[float], sizes: Sizes, **options: Any
) -> StabilityReport:
    """Attack the maps of images at each radius, and move them by noise."""
    attacks: dict[str, Any] = {}
    for radius in radii:
        ball: Any = {"radius": radius, "lower_bound": 0.0, "upper_bound": 1.0, "seed": 0}
        attacks[f"noise {radius}"] = RandomAttack(explainer, **ball)
        attacks[f"attack {radius}"] = TopKAttack(
            explainer, TOP, step_num=sizes.step_num, n_restarts=sizes.n_restarts, **ball, **options
        )
    return stability_report(
        {"model": (explainer, options)},
        {"model": attacks},
        DataLoader(TensorDataset(*data), batch_size=100),
        k=TOP,
        metrics={"spearman": spearman},
    )


def curves(report: StabilityReport, radii: Iterable[float]) -> dict[str, float]:
    """Top-k intersections by kind and radius, and the rank correlation under attack."""
    found = {}
    for radius in radii:
        for kind in ("noise", "attack"):
            scores = report.row(attack=f"{kind} {radius}").scores
            found[f"{kind} {radius}"] = scores[f"top-{TOP}"].mean
        found[f"rank correlation {radius}"] = scores["spearman"].mean
    return found


def looks(model: nn.Module, data: Batch) -> dict[str, float]:
    """Sparsity of gradient maps, and their share on the digit."""
    x, y = data
    maps = Saliency(model).attribute(x.clone().requires_grad_(), target=y).detach()
    ink = (x > 0.2).float()
    return {
        "Gini": float(gini(maps).mean()),
        "mass on the digit": float(((maps * ink).sum((1, 2, 3)) / maps.sum((1, 2, 3))).mean()),
    }


def evaluate(study: Study, model: nn.Module, part: str, radii: Sequence[float]) -> dict[str, float]:
    """All figures of one network."""
    data = study.data[part]
    few = (data[0][: study.sizes.images], data[1][: study.sizes.images])
    some = (data[0][:300], data[1][:300])
    return {
        "accuracy": study.accuracy(model, part),
        **looks(model, some),
        **curves(attacked(Saliency(model), few, radii, study.sizes), radii),
    }


def robust(model: nn.Module, data: Batch, radius: float = 0.1) -> float:
    """Accuracy under captum.robust's PGD."""
    x, y = (t[:300] for t in data)
    moved = pgd(model).perturb(x, radius, radius / 4, 10, y)
    with torch.no_grad():
        return float((model(moved).argmax(1) == y).float().mean())


def other_maps(
    model: nn.Module, study: Study, images: int, radii: Sequence[float]
) -> dict[str, Any]:
    """The same for IG and SmoothGrad maps, of fewer images."""
    few = tuple(t[:images] for t in study.data["test"])
    smoothgrad = {"nt_type": "smoothgrad", "nt_samples": 10, "stdevs": 0.1}
    kinds: Any = {
        "IG": (IntegratedGradients(model), {"n_steps": 10}),
        "SmoothGrad": (NoiseTunnel(Saliency(model)), smoothgrad),
    }
    return {
        f"{kind}, {column}": value
        for kind, (explainer, options) in kinds.items()
        for column, value in curves(
            attacked(explainer, few, radii, study.sizes, **options), radii
        ).items()
    }


def sprites(folder: Path) -> Batch:
    """Read 900 images of 28 x 28 in 30 rows, three for each class, from one picture."""
    pixels = torch.from_numpy(imread(folder / "sprite.png")[..., 0].copy())
    tiles = pixels.reshape(30, 28, 30, 28).permute(0, 2, 1, 3).reshape(900, 1, 28, 28)
    return tiles, torch.arange(900) // 90


def fashion(folder: Path, sizes: Sizes, images: int) -> dict[str, Any]:
    """Evaluate the ATEX authors' two networks on images of Fashion-MNIST."""
    tiles, labels = sprites(folder)
    some = torch.arange(0, 900, 900 // images)
    results: dict[str, Any] = {
        "images": len(some),
        "radii": FASHION_RADII,
        "published": PUBLISHED_FASHION,
    }
    for name, file in (("original", "params.pt"), ("ATEX", "params_advintp.pt")):
        model = authors_network()
        model.load_state_dict(torch.load(folder / file, map_location="cpu", weights_only=True))
        report = attacked(Saliency(model), (tiles[some], labels[some]), FASHION_RADII, sizes)
        with torch.no_grad():
            accuracy = float((model(tiles).argmax(1) == labels).float().mean())
        results[name] = {"accuracy": accuracy}
        for row in report.rows:
            score = row.scores[f"top-{TOP}"]
            results[name][row.attack] = {"mean": score.mean, "low": score.low, "high": score.high}
    return results


def authors_network() -> nn.Sequential:
    """The network whose parameters they saved, under the names they have there."""
    model = nn.Sequential()
    convolutions = [
        layer
        for channels in (1, 32)
        for layer in (nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    model.add_module("features", nn.Sequential(*convolutions))
    model.add_module("rows", nn.Flatten())
    head = (nn.Linear(1568, 120), nn.Tanh(), nn.Linear(120, 10))
    model.add_module("fc_model", nn.Sequential(*head))
    return model
