"""The main job itself: a network trained without and with a pixel prior, and evaluated."""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from captum_priors._demo.data import Images
from captum_priors._demo.report import draw, table
from captum_priors.attr import ExpectedGradients
from captum_priors.penalties import total_variation
from captum_priors.priors import PixelPrior, Prior


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run.

    The weight costs less than one point of clean accuracy; on MNIST it is from the sweep of
    ``benchmarks/pixel_prior.py``.
    """

    seed: int
    epochs: int
    weight: float = 5e-4
    batch_size: int = 64
    learning_rate: float = 1e-3


def compare(images: Images, settings: Settings, output: Path) -> None:
    """Train both models, evaluate them alike, print and write the comparison."""
    console = Console()
    console.print(f"{images.name}: {images.split}. torch {torch.__version__}.")
    results: dict[str, dict[str, Any]] = {}
    maps: dict[str, Tensor] = {}
    for name in ("without prior", "with prior"):
        torch.manual_seed(settings.seed)  # the first steps differ by the prior alone
        model = network(images.train[0].shape[-1], int(images.train[1].max()) + 1)
        prior = PixelPrior(model, n_samples=1) if name == "with prior" else None
        start = perf_counter()
        training = train(model, prior, images, settings)
        epochs = list(track(training, name, settings.epochs, console=console))
        results[name] = {"epochs": epochs, "seconds": perf_counter() - start}
        results[name] |= evaluated(model, images, settings.seed)
        maps[name] = attribution_maps(model, images, settings.seed)
        results[name]["attribution_total_variation"] = total_variation(maps[name]).mean().item()
    console.print(table(results))
    report = {
        "data": {"name": images.name, "split": images.split, "range": [-1, 1]},
        "settings": {**asdict(settings), "prior": f"{settings.weight:g} * {prior!r}"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("captum_priors", "torch", "captum", "numpy")},
        },
        "models": results,
    }
    text = json.dumps(report, indent=2) + "\n"
    (output / "report.json").write_text(text, encoding="utf-8")
    draw(output / "report.png", images, maps, results)
    console.print(f"Written: {output / 'report.json'}, {output / 'report.png'}")


def network(size: int, n_classes: int) -> nn.Module:
    """Two convolutions and two linear layers; larger windows for larger images."""
    kernel, padding = (3, 1) if size < 20 else (5, 0)
    convolutions = nn.Sequential(
        *(nn.Conv2d(1, 16, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    )
    n_features = convolutions(torch.zeros(1, 1, size, size)).shape[1]
    hidden = nn.Linear(n_features, 128)
    return nn.Sequential(convolutions, hidden, nn.ReLU(), nn.Linear(128, n_classes))


def train(
    model: nn.Module, prior: Prior | None, images: Images, settings: Settings
) -> Iterator[dict[str, float]]:
    """Train, and say after each epoch what its means were."""
    inputs, labels = images.train
    n = len(inputs)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    n_steps = settings.epochs * -(-n // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(settings.epochs):
        sums = torch.zeros(3, dtype=torch.float64)
        for rows in torch.randperm(n).split(settings.batch_size):
            x, y = inputs[rows], labels[rows]
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            # One reference for each image and step, drawn from the batch itself.
            penalty = prior(x, baselines=x, target=y) if prior else torch.zeros(())
            optimizer.zero_grad()
            (loss + settings.weight * penalty).backward()
            optimizer.step()
            schedule.step()
            accuracy = (logits.argmax(1) == y).float().mean()
            sums += len(rows) * torch.stack([loss, penalty, accuracy]).detach()
        yield dict(zip(("loss", "penalty", "accuracy"), (sums / n).tolist(), strict=True))


@torch.no_grad()
def evaluated(model: nn.Module, images: Images, seed: int) -> dict[str, Any]:
    """Accuracy on the test set, clean and under noise, which is the same for every model."""
    inputs, labels = images.test

    def accuracy(x: Tensor) -> float:
        return float((model(x).argmax(1) == labels).float().mean())

    def noisy(kind: int, level: float) -> float:
        draws = torch.Generator().manual_seed(seed + kind)
        corrupt = (_gaussian, _salt_and_pepper)[kind]
        return sum(accuracy(corrupt(inputs, level, draws)) for _ in range(3)) / 3

    return {
        "clean_accuracy": accuracy(inputs),
        "gaussian_accuracy": {f"{s:g}": noisy(0, s) for s in (0.25, 0.5, 0.75, 1.0, 1.25)},
        "salt_and_pepper_accuracy": {f"{p:g}": noisy(1, p) for p in (0.05, 0.1, 0.2, 0.3)},
    }


def _gaussian(images: Tensor, level: float, draws: torch.Generator) -> Tensor:
    return images + level * torch.randn(images.shape, generator=draws)


def _salt_and_pepper(images: Tensor, level: float, draws: torch.Generator) -> Tensor:
    hit = torch.rand(images.shape, generator=draws) < level
    extreme = torch.randint(2, images.shape, generator=draws).to(images.dtype) * 2 - 1
    return torch.where(hit, extreme, images)


@torch.no_grad()
def attribution_maps(model: nn.Module, images: Images, seed: int) -> Tensor:
    """Expected gradients of the labels' logits, over training images as references."""
    maps: Tensor = ExpectedGradients(model).attribute(
        images.test[0][:300],
        images.train[0][:100],
        n_samples=100,
        target=images.test[1][:300],
        internal_batch_size=2048,
        generator=torch.Generator().manual_seed(seed),
    )
    return maps
