"""A small convolutional network, trained with or without a prior."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors.priors import Prior


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run."""

    seed: int
    epochs: int
    weight: float
    batch_size: int = 64
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Epoch:
    """Means over one epoch."""

    loss: float
    penalty: float
    accuracy: float


@dataclass
class Run:
    """A trained model and how it got there."""

    model: nn.Module
    seconds: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)


def network(size: int, n_classes: int) -> nn.Module:
    """Two convolutions and two linear layers; larger windows for larger images."""
    kernel, padding = (3, 1) if size < 20 else (5, 0)
    convolutions = nn.Sequential(
        nn.Conv2d(1, 16, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    with torch.no_grad():
        n_features = convolutions(torch.zeros(1, 1, size, size)).shape[1]
    return nn.Sequential(
        convolutions, nn.Linear(n_features, 128), nn.ReLU(), nn.Linear(128, n_classes)
    )


def train(
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    make_prior: Callable[[nn.Module], Prior] | None,
    on_epoch: Callable[[Epoch], None],
) -> Run:
    """Train from the seed: with the same one, the first steps differ only by the prior."""
    torch.manual_seed(settings.seed)
    model = network(images.shape[-1], int(labels.max()) + 1)
    prior = make_prior(model) if make_prior else None
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    n_steps = settings.epochs * -(-len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    run = Run(model)
    start = perf_counter()
    for _ in range(settings.epochs):
        loss_sum = penalty_sum = correct = 0.0
        for rows in torch.randperm(len(images)).split(settings.batch_size):
            x, y = images[rows], labels[rows]
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            penalty = prior(x, baselines=x, target=y) if prior else torch.zeros(())
            optimizer.zero_grad()
            (loss + settings.weight * penalty).backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(rows)
            penalty_sum += penalty.item() * len(rows)
            correct += (logits.argmax(1) == y).sum().item()
        n = len(images)
        run.epochs.append(Epoch(loss_sum / n, penalty_sum / n, correct / n))
        on_epoch(run.epochs[-1])
    run.seconds = perf_counter() - start
    return run
