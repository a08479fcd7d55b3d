"""What the comparison is made of: accuracy under noise, and how rough attribution maps are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_priors.attr import ExpectedGradients
from captum_priors.penalties import total_variation

GAUSSIAN = (0.25, 0.5, 0.75, 1.0, 1.25)
SALT_AND_PEPPER = (0.05, 0.1, 0.2, 0.3)
_DRAWS = 3
_EXPLAINED = 300
_REFERENCES = 100


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on the test set; noise levels in units of inputs in [-1, 1]."""

    clean_accuracy: float
    gaussian_accuracy: dict[str, float]
    salt_and_pepper_accuracy: dict[str, float]
    attribution_total_variation: float


def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, references: Tensor, seed: int
) -> Evaluation:
    """Evaluate a model; every model is shown the same noise."""

    def accuracy(inputs: Tensor) -> float:
        return float((model(inputs).argmax(1) == labels).float().mean())

    def noisy(kind: int, level: float) -> float:
        draws = torch.Generator().manual_seed(seed + kind)
        corrupt = (_gaussian, _salt_and_pepper)[kind]
        each = [accuracy(corrupt(images, level, draws)) for _ in range(_DRAWS)]
        return sum(each) / _DRAWS

    with torch.no_grad():
        maps = attribution_maps(model, images[:_EXPLAINED], labels[:_EXPLAINED], references, seed)
        return Evaluation(
            accuracy(images),
            {f"{level:g}": noisy(0, level) for level in GAUSSIAN},
            {f"{level:g}": noisy(1, level) for level in SALT_AND_PEPPER},
            total_variation(maps).mean().item(),
        )


@torch.no_grad()
def attribution_maps(
    model: nn.Module, images: Tensor, labels: Tensor, references: Tensor, seed: int
) -> Tensor:
    """Expected gradients of the labels' logits, over training images as references."""
    maps: Tensor = ExpectedGradients(model).attribute(
        images,
        references[:_REFERENCES],
        n_samples=_REFERENCES,
        target=labels,
        internal_batch_size=2048,
        generator=torch.Generator().manual_seed(seed),
    )
    return maps


def _gaussian(images: Tensor, level: float, draws: torch.Generator) -> Tensor:
    return images + level * torch.randn(images.shape, generator=draws)


def _salt_and_pepper(images: Tensor, level: float, draws: torch.Generator) -> Tensor:
    hit = torch.rand(images.shape, generator=draws) < level
    extreme = torch.randint(2, images.shape, generator=draws).to(images.dtype) * 2 - 1
    return torch.where(hit, extreme, images)
