"""Three small networks to measure on: an MLP, a convolutional network, a transformer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_priors.penalties import l1, total_variation

CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A model, a batch, reference rows, and a penalty that suits the data."""

    make: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    background: Tensor
    penalty: Callable[[Tensor], Tensor]


def mlp(batch: int = 64, features: int = 64, width: int = 128, n_background: int = 1000) -> Network:
    """Two hidden layers on a table."""
    return _network(
        lambda: nn.Sequential(
            *(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, CLASSES),
        ),
        (features,),
        batch,
        l1,
        n_background,
    )


def cnn(batch: int = 64, width: int = 16, size: int = 28) -> Network:
    """Two convolutions with pooling and two linear layers, on images."""
    return _network(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * width * (size // 4) ** 2, 128), nn.ReLU()),
            nn.Linear(128, CLASSES),
        ),
        (1, size, size),
        batch,
        total_variation,
    )


class Transformer(nn.Module):
    """A linear embedding with learned positions, a stock encoder, mean pooling, a linear head."""

    def __init__(self, length: int, features: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.encoder(self.embed(x) + self.position).mean(1))
        return logits


def transformer(
    batch: int = 32, length: int = 16, features: int = 8, width: int = 64, layers: int = 2
) -> Network:
    """A small encoder, with fused attention where nobody differentiates twice."""
    return _network(
        lambda: Transformer(length, features, width, layers),
        (length, features),
        batch,
        l1,
    )


def _network(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    batch: int,
    penalty: Callable[[Tensor], Tensor],
    n_background: int = 1000,
) -> Network:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *shape, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)
    background = torch.rand(n_background, *shape, generator=generator)
    return Network(make, x, y, background, penalty)
