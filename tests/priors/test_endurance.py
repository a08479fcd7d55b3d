"""Two thousand steps leave nothing behind: no memory, hook, tensor or node of a graph."""

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Guarded,
    Lazy,
    StabilityPrior,
    Subsample,
)
from captum_priors.distances import mse
from captum_priors.integrations import StepGuard
from captum_priors.integrations._terms import Means, evaluate
from captum_priors.penalties import l1, l2
from captum_priors.priors import Prior
from captum_priors.stability import JacobianRegularization
from tests.asserts import new_objects, resident

STEPS = 2_000


def priors(model: nn.Module, x: Tensor) -> list[Prior]:
    """Each way of differentiating, each combination, and one that fails at times."""
    factors = itertools.cycle([1, 1, 1, 1, float("nan")])

    def at_times(attributions: Tensor) -> Tensor:
        return l1(attributions) * next(factors)

    ways: Any = ("double_backprop", "recompute", "finite_difference")
    eg: dict[str, Any] = {"baselines": x, "n_samples": 2, "smooth": 20}
    return [
        *(AttributionPrior(ExpectedGradients(model, differentiation=w), l2, **eg) for w in ways),
        StabilityPrior(Saliency(model), mse, lambda x: x + 0.1 * torch.randn_like(x)),
        Lazy(Subsample(AttributionPrior(Saliency(model), l1), 0.5), every=2),
        Guarded(AttributionPrior(Saliency(model), at_times), "skip"),
        JacobianRegularization(model),
    ]


def left_behind(objects: list[Any], *modules: nn.Module) -> dict[str, int]:
    """Count what could grow."""
    kinds = [type(o) for o in objects]
    inside = [m for module in modules for m in module.modules()]
    own = [v for m in inside for n, v in vars(m).items() if n.endswith("_hooks")]
    everywhere = [v for n, v in vars(torch_module).items() if n.startswith("_global_")]
    return {
        "tensors": sum(issubclass(kind, Tensor) for kind in kinds),
        "nodes": sum(issubclass(kind, torch.autograd.function.FunctionCtx) for kind in kinds),
        "hooks": sum(len(v) for v in [*own, *everywhere] if hasattr(v, "__len__")),
        "objects": len(kinds),
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_thousand_steps_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "captum_priors")  # what is logged would be kept
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    terms = priors(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard, means = StepGuard(optimizer, "skip", model=model), Means(torch.device("cpu"))

    def train(steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            prior = terms[step % len(terms)]
            value, values = evaluate(0.1 * prior, {"inputs": x, "target": y})
            bad = float("nan") if step % 50 == 0 else 1
            (bad * F.cross_entropy(model(x), y) + value).backward()
            optimizer.step()
            means.add(values)
            if step % 100 == 0:
                means.take(prior, lambda table: table)

    train(STEPS // 5)  # what is set up once is there
    with new_objects() as objects:
        train(STEPS // 5)
        gc.collect()
        before, memory = left_behind(objects(), model, *terms), resident()
        train(3 * STEPS // 5)
        gc.collect()
        after, grown = left_behind(objects(), model, *terms), resident() - memory
    assert guard.skipped == STEPS / 50
    assert after["hooks"] == before["hooks"] == 0
    assert after["nodes"] <= before["nodes"]
    assert after["tensors"] <= before["tensors"]
    # The test's own logs and caches move by a few; one object at each step would be thousands.
    assert after["objects"] - before["objects"] < 500
    # The allocator moves by a few megabytes; one graph kept at each step would be tens of them.
    assert grown < 8e6
