"""What the stability study trains: networks, one function for each method, settings to try."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from _common import mnist
from captum.robust import PGD
from torch import Tensor, nn

from captum_priors.stability import (
    ATEX,
    R2ET,
    ActivationSensitivity,
    HessianPenalty,
    JacobianRegularization,
    smooth_activations,
    weight_decay_groups,
)

TOP = 50
PARTS = {"train": 7000, "validation": 1000, "test": 2000}
Batch = tuple[Tensor, Tensor]
Term = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much is trained on, how long, and how much is attacked."""

    train: int = 7000
    epochs: int = 2
    batch: int = 64
    atex_steps: int = 180
    images: int = 60
    step_num: int = 20
    n_restarts: int = 1
    radii: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)


def network(head: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two strided convolutions and two linear layers: no pooling, whose kinks nothing smooths."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), head(), nn.Linear(64, 10)),
    )


class Study:
    """MNIST's parts, and training on them."""

    def __init__(self, source: str, sizes: Sizes) -> None:
        x, y = mnist(source)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        share = min(1.0, len(x) / sum(PARTS.values()))
        counts = [int(share * n) for n in PARTS.values()]
        parts = order[: sum(counts)].split(counts)
        self.data: dict[str, Batch] = {
            name: (x[rows], y[rows]) for name, rows in zip(PARTS, parts, strict=True)
        }
        self.data["train"] = (x[parts[0][: sizes.train]], y[parts[0][: sizes.train]])
        self.sizes = sizes

    def fit(
        self,
        model: nn.Module,
        seed: int,
        *,
        term: Term | None = None,
        shrinkage: float = 0.0,
        prepare: Callable[[Tensor, Tensor], Tensor] = lambda x, y: x,
    ) -> nn.Module:
        """Adam with cosine decay; ``term`` is added to the loss, ``prepare`` makes the inputs.

        Weight decay alone would shrink weights by ``exp(-shrinkage)``, however long the training.
        """
        x, y = self.data["train"]
        torch.manual_seed(1000 + seed)
        steps = self.sizes.epochs * -(-len(x) // self.sizes.batch)
        rate = 3e-3  # half of it on average
        groups = weight_decay_groups(model, shrinkage / (steps * rate / 2))
        optimizer = torch.optim.AdamW(groups, rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.sizes.epochs):
            for rows in torch.randperm(len(x)).split(self.sizes.batch):
                inputs = prepare(x[rows], y[rows])
                loss = F.cross_entropy(model(inputs), y[rows])
                if term is not None:
                    loss = loss + term(inputs, y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        return model

    def distil(self, model: nn.Module, seed: int, loss: Term) -> nn.Module:
        """Train on a loss of its own, as ATEX's authors do: Adam at 1.5e-3, no schedule."""
        x, y = self.data["train"]
        torch.manual_seed(2000 + seed)
        optimizer = torch.optim.Adam(model.parameters(), 1.5e-3)
        for _ in range(self.sizes.atex_steps):
            rows = torch.randint(len(x), (20,))
            optimizer.zero_grad(set_to_none=True)
            loss(x[rows], y[rows]).backward()
            optimizer.step()
        return model

    def accuracy(self, model: nn.Module, part: str) -> float:
        """Share of right answers."""
        x, y = self.data[part]
        with torch.no_grad():
            return float((model(x).argmax(1) == y).float().mean())

    @functools.cache  # noqa: B019  # one study for the length of the program
    def start(self, name: str, seed: int) -> nn.Module:
        """Train a network that is compared with, or distilled."""
        return METHODS[name].train(self, seed)


def pgd(model: nn.Module) -> PGD:
    """captum.robust's attack on predictions."""
    loss = functools.partial(F.cross_entropy, reduction="none")
    return PGD(model, loss, lower_bound=0.0, upper_bound=1.0)


def _seeded(seed: int, head: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    return network(head)


def _standard(study: Study, seed: int, head: type[nn.Module] = nn.ReLU) -> nn.Module:
    return study.fit(_seeded(seed, head), seed)


def _weight_decay(study: Study, seed: int, shrinkage: float) -> nn.Module:
    return study.fit(_seeded(seed), seed, shrinkage=shrinkage)


def _softplus(study: Study, seed: int, beta: float, weight: float = 0.0) -> nn.Module:
    model = smooth_activations(_seeded(seed), beta)
    penalty = HessianPenalty(model)
    term: Term | None = (lambda x, y: weight * penalty(x, target=y)) if weight else None
    return study.fit(model, seed, term=term)


def _sensitivity(
    study: Study, seed: int, weight: float, radius: float = 0.1, jacobian: float = 0.0
) -> nn.Module:
    model = _seeded(seed)
    relus = [layer for layer in model if isinstance(layer, nn.ReLU)]
    prior: Any = weight * ActivationSensitivity(model, radius, layers=relus)
    if jacobian:
        prior = prior + jacobian * JacobianRegularization(model)
    return study.fit(model, seed, term=lambda x, y: prior(x, target=y))


def _adversarial(study: Study, seed: int, radius: float) -> nn.Module:
    model = _seeded(seed)
    attack = pgd(model)
    return study.fit(
        model, seed, prepare=lambda x, y: attack.perturb(x, radius, radius / 2, 3, y).detach()
    )


def _r2et(study: Study, seed: int, weight: float, curvature: float) -> nn.Module:
    model = _seeded(seed)
    prior = R2ET(model, top_k=TOP, curvature=curvature)
    return study.fit(model, seed, term=lambda x, y: weight * prior(x, target=y))


def _atex(study: Study, seed: int, radius: float = 0.32, weight: float | None = None) -> nn.Module:
    """Distil the network with the tanh head along its own maps, and train it on if weighted."""
    student = copy.deepcopy(study.start("tanh head", seed))
    prior = ATEX(student, radius=radius, temperature=4.0, n_samples=8, positions=(-1.0, 0.0))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = prior(x, target=y)
        return value if weight is None else F.cross_entropy(student(x), y) + weight * value

    return study.distil(student, seed, loss)


@dataclass(frozen=True)
class Method:
    """How a network is trained, the values to try, and what it is compared with."""

    train: Callable[..., nn.Module]
    axes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    start: str = "standard"
    fixed: Mapping[str, float] = field(default_factory=dict)


_TENS = (1e-4, 1e-3, 1e-2, 1e-1)
_RADII = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2)
_SHRINKAGES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
_BETAS = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 70.0, 100.0)

# Twelve settings for each method that has any.
METHODS: dict[str, Method] = {
    "standard": Method(_standard),
    "weight decay": Method(_weight_decay, {"shrinkage": _SHRINKAGES}),
    "Softplus": Method(_softplus, {"beta": _BETAS}),
    "Softplus + Hessian": Method(
        _softplus, {"weight": (1e-3, 3e-3, 1e-2, 3e-2), "beta": (5.0, 10.0, 20.0)}
    ),
    "R2ET": Method(_r2et, {"weight": (1e-3, 1e-2, 1e-1, 1.0), "curvature": (0.1, 1.0, 10.0)}),
    "sensitivity": Method(_sensitivity, {"weight": _TENS, "radius": (0.05, 0.1, 0.2)}),
    "sensitivity + Jacobian": Method(
        _sensitivity, {"weight": _TENS, "jacobian": (1e-3, 1e-2, 1e-1)}
    ),
    "adversarial": Method(_adversarial, {"radius": _RADII}),
    "tanh head": Method(functools.partial(_standard, head=nn.Tanh)),
    "ATEX, recipe": Method(_atex, start="tanh head"),
    "ATEX + cross-entropy": Method(
        _atex, {"weight": (0.1, 1.0, 10.0, 100.0), "radius": (0.16, 0.32, 0.64)}, "tanh head"
    ),
    "Softplus + Hessian, lighter": Method(_softplus, fixed={"weight": 0.03, "beta": 20.0}),
    **{f"Softplus, beta {b:g}": Method(_softplus, fixed={"beta": b}) for b in (1.0, 5.0, 20.0)},
}
"""Those that are compared with come before the methods that start from them."""
