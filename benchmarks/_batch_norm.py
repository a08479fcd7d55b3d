"""What the benchmark of BatchNorm trains: decoy images, networks, priors and written-out loops.

A loop is the prior as published code writes it: the model in training mode on whatever rows go
through, whose statistics move with them and tie the examples together.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _common import mnist
from _published import PublishedLoop
from captum.attr import InputXGradient, Saliency
from decoy_mnist import decoys
from sklearn.datasets import load_digits
from torch import Tensor, nn

from captum_priors import AttributionPrior, StabilityPrior
from captum_priors.distances import mse
from captum_priors.penalties import l1, outside, total_variation
from captum_priors.priors import PixelPrior, RightForTheRightReasons, RRRGradCAM

PATCH = {"digits": 6, "mnist": 4}
TRAIN = {"digits": 600, "mnist": 1200}
TEST = {"digits": 1197, "mnist": 2000}
MAPS = (7, 7)


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.wider = stride, width - before

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both paths, rectified."""
        found = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.wider))
        return F.relu(found + shortcut)


class Network(nn.Module):
    """Convolutions with BatchNorm, and a linear layer.

    ``maps`` is the last layer of 7 by 7 places: what Grad-CAM looks at.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        if layers == 17:  # ResNet-18 at an eighth of its width
            widths = (8, 8, 8, 16, 16, 32, 32, 64, 64)
            blocks = [
                Block(*pair, stride=1 + (pair[0] < pair[1])) for pair in itertools.pairwise(widths)
            ]
            stem = (nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.features, head = nn.Sequential(*stem, *blocks), 64
            self.maps: nn.Module = blocks[3]
            self.pool: nn.Module = nn.AdaptiveAvgPool2d(1)
        else:
            norms: list[nn.Module] = []
            for i in range(layers):
                convolution = nn.Conv2d(16 if i else 1, 16, 3, 2 if i < 2 else 1, 1)
                norms += [convolution, nn.BatchNorm2d(16), nn.ReLU()]
            self.features, head = nn.Sequential(*norms), 16 * 49
            self.maps, self.pool = norms[-1], nn.Identity()
        self.head = nn.Linear(head, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.pool(self.features(x)).flatten(1))
        return logits


@dataclass(frozen=True)
class Data:
    """Images with a patch that tells the label, and others whose patch tells another."""

    x: Tensor
    y: Tensor
    allowed: Tensor
    test_x: Tensor
    test_y: Tensor


@functools.lru_cache(maxsize=2)
def load(name: str, source: str, seed: int) -> Data:
    """Draw the split and the patches."""
    if name == "mnist":
        x, y = mnist(source)
    else:
        pixels, labels = load_digits(return_X_y=True)
        small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
        x = F.pad(F.interpolate(small, scale_factor=2, mode="bilinear"), (6,) * 4)
        y = torch.from_numpy(labels).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    seen, unseen = order[: TRAIN[name]], order[TRAIN[name] :][: TEST[name]]
    images, allowed = decoys(x[seen], y[seen], generator=generator, size=PATCH[name])
    others = torch.randint(10, (len(unseen),), generator=generator)
    test, _ = decoys(x[unseen], others, generator=generator, size=PATCH[name])
    return Data(images, y[seen], allowed, test, y[unseen])


def noisy(x: Tensor) -> Tensor:
    """What attributions are to be stable under."""
    return x + 0.1 * torch.randn_like(x)


def gradient(of: Tensor, x: Tensor) -> Tensor:
    """Return the gradient with its graph."""
    return torch.autograd.grad(of.sum(), x, create_graph=True)[0]


def of_class(logits: Tensor, y: Tensor) -> Tensor:
    """Logits of the label."""
    return logits.gather(1, y.unsqueeze(1))


Scored = tuple[Tensor, Tensor]  # logits of the loss, and a score of each example


def loop_rrr(model: Network, x: Tensor, y: Tensor, allowed: Tensor, data: Data) -> Scored:
    """Forbid gradients of the pass that is trained."""
    logits = model(x)
    return logits, outside(gradient(logits.log_softmax(1), x), annotation=allowed)


def loop_input_x_gradient(
    model: Network, x: Tensor, y: Tensor, allowed: Tensor, data: Data
) -> Scored:
    """Make gradients of the pass that is trained sparse."""
    logits = model(x)
    return logits, l1(x * gradient(of_class(logits, y), x))


def loop_pixel(model: Network, x: Tensor, y: Tensor, allowed: Tensor, data: Data) -> Scored:
    """Run the authors' loop of expected gradients."""
    maps = PublishedLoop(data.x, len(x), 1).attribute(model, x, y)
    return model(x), total_variation(maps)


def loop_grad_cam(model: Network, x: Tensor, y: Tensor, allowed: Tensor, data: Data) -> Scored:
    """Forbid Grad-CAM of the pass that is trained."""
    seen: list[Tensor] = []
    hook = model.maps.register_forward_hook(lambda *found: seen.append(found[2]))
    logits = model(x)
    hook.remove()
    weights = gradient(of_class(logits, y), seen[0]).mean((2, 3), keepdim=True)
    cam = (weights * seen[0]).sum(1, keepdim=True).relu()
    cam = cam / cam.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return logits, outside(
        cam, annotation=F.adaptive_avg_pool2d(allowed, (cam.shape[2], cam.shape[3]))
    )


def loop_stability(model: Network, x: Tensor, y: Tensor, allowed: Tensor, data: Data) -> Scored:
    """Hold the gradient of the pass that is trained where it is under noise."""
    logits, moved = model(x), noisy(x.detach()).requires_grad_()
    here, there = gradient(of_class(logits, y), x), gradient(of_class(model(moved), y), moved)
    return logits, mse(here, there)


Loop = Callable[[Network, Tensor, Tensor, Tensor, Data], Scored]


@dataclass(frozen=True)
class Compared:
    """A prior, how it is written by hand, and its weights: two decades."""

    make: Callable[..., Any]
    loop: Loop
    weights: tuple[float, ...]


PRIORS = {
    "RRR": Compared(RightForTheRightReasons, loop_rrr, (0.001, 0.01, 0.1)),
    "InputXGradient + l1": Compared(
        lambda model, **options: AttributionPrior(InputXGradient(model), l1, **options),
        loop_input_x_gradient,
        (0.003, 0.03, 0.3),
    ),
    "PixelPrior": Compared(PixelPrior, loop_pixel, (5e-5, 5e-4, 5e-3)),
    "RRR-GradCAM": Compared(
        lambda model, **options: RRRGradCAM(model, model.maps, **options),
        loop_grad_cam,
        (0.1, 1.0, 10.0),
    ),
    "StabilityPrior": Compared(
        lambda model, **options: StabilityPrior(Saliency(model), mse, noisy, abs=False, **options),
        loop_stability,
        (1.0, 10.0, 100.0),
    ),
}
