"""Two priors in two threads do not see each other."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Lazy,
    StabilityPrior,
    Subsample,
    differentiable,
)
from captum_priors.distances import mse
from captum_priors.integrations._terms import evaluate
from captum_priors.penalties import l1, l2
from captum_priors.priors import Prior
from tests.asserts import leaves_no_trace

STEPS = 25


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Results of functions that start together, each in a thread of its own."""
    found: list[Any] = [None] * len(functions)
    together = threading.Barrier(len(functions))

    def run(i: int) -> None:
        together.wait()
        try:
            found[i] = functions[i]()
        except Exception as problem:  # its own thread would swallow it
            found[i] = problem

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def make(model: nn.Module, way: Any, smooth: float) -> Prior:
    """Everything that draws, counts, holds the model still or smooths it."""
    torch.manual_seed(5)
    explainer = ExpectedGradients(model, differentiation=way)
    drawn = AttributionPrior(explainer, l1, baselines=torch.randn(9, 4), smooth=smooth)
    saliency = differentiable(Saliency(model), differentiation=way)
    stable = StabilityPrior(saliency, mse, lambda x: x + 0.1 * torch.randn_like(x), smooth=smooth)
    return Lazy(drawn, every=2) + Subsample(stable, 0.5)


def training(model: nn.Module, prior: Prior) -> Callable[[], list[Tensor]]:
    generator = torch.Generator().manual_seed(6)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> list[Tensor]:
        values = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            value = prior(x, target=y)
            (loss + value).backward()
            optimizer.step()
            values.append(value.detach())
        return [*values, *model.state_dict().values()]

    return run


@pytest.mark.parametrize("way", ["double_backprop", "recompute", "finite_difference"])
def test_each_trains_as_if_alone(way: str) -> None:
    """Models, draws, steepness and steps of their own: the same numbers, bit for bit."""
    settings = [(1, 5.0), (2, 50.0)]

    def trainings() -> list[Callable[[], list[Tensor]]]:
        models = [net(seed) for seed, _ in settings]
        return [
            training(model, make(model, way, smooth))
            for model, (_, smooth) in zip(models, settings, strict=True)
        ]

    alone = [run() for run in trainings()]
    runs = trainings()
    before = torch.get_rng_state()
    together = in_threads(*runs)
    for expected, found in zip(alone, together, strict=True):
        assert all(map(torch.equal, expected, found))
    assert torch.equal(torch.get_rng_state(), before)


def test_priors_on_one_model_share_it() -> None:
    """Values as alone, and the model as it was: in train mode, statistics untouched."""
    model = net(1)
    x = torch.randn(8, 4)
    explainer = ExpectedGradients(model)
    one = AttributionPrior(explainer, l1, baselines=x, smooth=5)
    two = AttributionPrior(Saliency(model), l2)

    def values(prior: Prior) -> Callable[[], list[float]]:
        return lambda: [prior(x, target=0).item() for _ in range(STEPS)]

    start = one.stream.step
    expected = [values(one)(), values(two)()]
    one.stream.step = start
    with leaves_no_trace(model):
        assert in_threads(values(one), values(two)) == expected


def test_logged_terms_are_those_of_the_own_thread() -> None:
    """One prior that two threads look at: each is told its own values."""
    prior = AttributionPrior(Saliency(net(1)), l2)
    batches = [torch.randn(8, 4), torch.randn(8, 4)]

    def logs(x: Tensor) -> Callable[[], list[dict[str, float]]]:
        def run() -> list[dict[str, float]]:
            seen = [evaluate(prior, {"inputs": x, "target": 0})[1] for _ in range(STEPS)]
            return [{name: value.item() for name, value in each.items()} for each in seen]

        return run

    alone = [logs(x)() for x in batches]
    assert in_threads(*(logs(x) for x in batches)) == alone
    assert alone[0][0] != alone[1][0]
    assert not prior._forward_hooks
