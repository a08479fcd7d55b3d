"""One training run, for two processes that share its batches and for one that has them whole."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Lazy,
    StabilityPrior,
    differentiable,
)
from captum_priors.distances import mse
from captum_priors.integrations import AcrossProcesses, check_synchronised
from captum_priors.penalties import l2, total_variation
from captum_priors.stability import InputGradientRegularization, JacobianRegularization
from tests.integrations.launch import restarted

WAYS = ("double_backprop", "recompute", "finite_difference")
STEPS, EXAMPLES, FEATURES = 3, 8, 6


@dataclass(frozen=True)
class Case:
    """One row: what runs, and a part of the message where it is refused.

    Others return ``{"error": ..., "apart": ...}`` after a training, or facts that hold.
    """

    run: Callable[[], Any]
    refused: str | None = None


CASES: dict[str, Case] = {}


def case(
    *arguments: Any, name: str = "", refused: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the table, under its name and what it is called with."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        label = " ".join([function.__name__, *([name] if name else [])])
        CASES[label] = Case(lambda: function(*arguments), refused)
        return function

    return add


class Net(nn.Module):
    """Blocks that can be sharded, with a bias that no attribution reaches at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 16), nn.Softplus())
        self.second = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x)))
        return out


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, EXAMPLES, FEATURES, generator=generator)
    return x, torch.randint(3, (STEPS, EXAMPLES), generator=generator)


def part(*, uneven: bool = False) -> slice:
    """Examples of this process."""
    middle = EXAMPLES // 2 + (2 if uneven else 0)
    return slice(0, middle) if dist.get_rank() == 0 else slice(middle, EXAMPLES)


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)


def values_of(model: nn.Module) -> Tensor:
    each = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in each])


def alike(values: Tensor) -> float:
    """Largest difference between the processes."""
    both = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(both, values)
    return float((both[0] - both[1]).abs().max())


def prior_of(model: Any, way: str = "double_backprop", penalty: Any = l2, **options: Any) -> Any:
    explainer = differentiable(IntegratedGradients(model), differentiation=way)
    return AttributionPrior(explainer, penalty, n_steps=4, **options)


def drawing(model: Any, way: str = "double_backprop") -> Any:
    explainer = ExpectedGradients(model, differentiation=way)
    prior = AttributionPrior(explainer, l2, baselines=data()[0][0], n_samples=2)
    return restarted(prior)


def drawn(prior: Any, x: Tensor) -> Tensor:
    return torch.stack([prior(x, target=0).detach() for _ in range(4)])


# How a term is made from the model that is explained.
PRIORS: dict[str, Callable[[nn.Module], Any]] = {
    **{way: lambda m, way=way: prior_of(m, way) for way in WAYS},
    "sum with Lazy": lambda m: (
        0.5 * AttributionPrior(differentiable(Saliency(m)), total_variation)
        + Lazy(prior_of(m), every=2)
    ),
    "StabilityPrior": lambda m: StabilityPrior(Saliency(m), mse, lambda x: 1.1 * x),
    "JacobianRegularization": lambda m: JacobianRegularization(m, n_samples=None),
    "InputGradientRegularization": lambda m: InputGradientRegularization(m),
    "finite_difference regularizer": lambda m: InputGradientRegularization(
        m, differentiation="finite_difference"
    ),
}


def backward(loss: Tensor, model: nn.Module, *, last: bool = True) -> None:
    loss.backward()


def train(
    model: nn.Module,
    wrapped: nn.Module,
    prior: Any,
    examples: slice,
    *,
    share: Callable[[Tensor], float] = lambda x: 1.0,
    micro: int = 1,
    annotated: bool = False,
    clip: bool = True,
    no_sync: Callable[[], Any] = nullcontext,
    backward: Callable[..., None] = backward,
    prior_first: bool = False,
) -> Tensor:
    """Train and return all parameters."""
    x, y = data()
    optimizer = optimiser(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = zip(x[step][examples].chunk(micro), y[step][examples].chunk(micro), strict=True)
        for i, (xs, ys) in enumerate(parts):
            extra = {"weight": xs[:, 0].detach()} if annotated else {}
            last = i == micro - 1
            with nullcontext() if last else no_sync():
                value = prior(xs, target=ys, **extra) if prior_first else 0
                loss = share(xs) * F.cross_entropy(wrapped(xs), ys) + value
                if not prior_first:
                    loss = loss + prior(xs, target=ys, **extra)
                backward(loss / micro, model, last=last)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
    check_synchronised(model)
    return values_of(model)


def compared(
    found: Tensor, make_prior: Callable[[nn.Module], Any], **options: Any
) -> dict[str, float]:
    """How far the processes are apart, and from one process with the whole batch."""
    model = net()
    start = values_of(model)
    groups = [dist.new_group([rank]) for rank in range(2)]
    prior = AcrossProcesses(make_prior(model), groups[dist.get_rank()])
    expected = train(model, model, prior, slice(None), **options)
    assert float((expected - start).abs().max()) > 0.02  # it trained
    return {"error": float((found - expected).abs().max()), "apart": alike(found)}
