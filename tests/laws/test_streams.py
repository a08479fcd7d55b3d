"""Random numbers: every role has draws of its own, and looking at a value moves no generator."""

import collections
import random
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from torch import Tensor

from captum_priors import AttributionPrior, ExpectedGradients, Lazy, StabilityPrior, Subsample
from captum_priors.attacks import DistanceAttack
from captum_priors.distances import mse
from captum_priors.metrics import local_lipschitz, stability_report
from captum_priors.penalties import l2
from captum_priors.priors import Prior
from captum_priors.stability import ATEX
from tests.laws.leaves import Leaf, background, every_leaf, net, those

S = 0.5


def cubes(x: Tensor) -> Tensor:
    return (x**3).sum(1)


def test_perturbation_and_noise_tunnel_draw_apart() -> None:
    """Closed form: E (3 (z + d)^2 - 3 z^2)^2 = 63 s^4, where z = d would give 243 s^4."""
    prior = StabilityPrior(
        ca.NoiseTunnel(ca.Saliency(cubes)),
        mse,
        lambda x: x + S * torch.randn_like(x),
        nt_type="smoothgrad",
        nt_samples=1,
        stdevs=S,
        abs=False,
    )
    values = torch.stack([prior(torch.zeros(8, 3)) for _ in range(300)]).detach()
    assert float((values.mean() - 63 * S**4).abs()) < 4 * float(values.std()) / 300**0.5


class Recorder:
    """An explainer that keeps what it is asked for and what it draws."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        self.forward_func, self.draw = net(), draw
        self.points: list[Tensor] = []
        self.seen: list[Tensor] = []

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        self.points.append(inputs.detach().clone())
        self.seen.append(self.draw(inputs.detach()))
        return inputs * self.forward_func(inputs).sum() * self.seen[-1]


def correlated(a: Tensor, b: Tensor) -> bool:
    """Whether two sets of draws are the same up to scale and shift, in any order or row by row."""
    rows = torch.cosine_similarity(a, b, 1).abs().min()
    a, b = ((t.flatten() - t.mean()).sort().values for t in (a, b))
    return max(float(rows), float(torch.cosine_similarity(a, b, 0))) > 1 - 1e-9


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": torch.randn_like,
    "uniform": torch.rand_like,
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


@every_draw
def test_perturbation_and_explainer_draw_apart(draw: Callable[[Tensor], Tensor]) -> None:
    explainer, moves, x = Recorder(draw), list[Tensor](), torch.randn(4, 5)

    def perturb(x: Tensor) -> Tensor:
        moves.append(draw(x))
        return x + moves[-1]

    StabilityPrior(explainer, mse, perturb)(x)
    here, there = explainer.seen[-2:]
    assert torch.equal(here, there)  # both sides of a pair see the same draws
    assert not correlated(here, moves[-1])


@every_draw
def test_points_and_explainer_draw_apart_in_metrics(draw: Callable[[Tensor], Tensor]) -> None:
    explainer = Recorder(draw)
    local_lipschitz(explainer, torch.zeros(4, 5), radius=0.1, n_samples=2)
    moved = [p for p in explainer.points if bool(p.any())]
    assert len(moved) == 2
    assert not any(correlated(explainer.seen[0], p) for p in moved)


def test_batches_of_a_report_draw_apart() -> None:
    class Noise:
        def perturb(self, inputs: Tensor, target: Any = None) -> Tensor:
            moves.append(torch.randn_like(inputs))
            return inputs + moves[-1]

    moves, x, explainer = list[Tensor](), torch.zeros(4, 5), ca.Saliency(net())
    stability_report({"it": explainer}, {"it": {"noise": Noise()}}, [x, x], k=2)
    assert not torch.equal(*moves)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@every_draw
def test_start_and_explainer_draw_apart_in_attacks(
    draw: Callable[[Tensor], Tensor], norm: Any
) -> None:
    explainer = Recorder(draw)
    DistanceAttack(explainer, mse, radius=1.0, norm=norm, step_num=1).perturb(torch.zeros(4, 5), 0)
    start = next(p for p in explainer.points if bool(p.any()))
    assert not any(correlated(seen, start) for seen in explainer.seen)


def test_noise_and_explainer_draw_apart_in_atex() -> None:
    class Draws:
        def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
            drawn.append(torch.rand_like(inputs))
            return drawn[-1]

    def model(x: Tensor) -> Tensor:
        points.append(x.detach())
        return x[:, :3]

    drawn, points, x = list[Tensor](), list[Tensor](), torch.zeros(4, 200)
    ATEX(model, Draws(), teacher=model, n_samples=1, positions=(0,))(x)
    # The noise is uniform, but for what lies along the explanation, a two-hundredth.
    assert float(torch.cosine_similarity(drawn[-1] - 0.5, points[-1], 1).abs().max()) < 0.5


@those(draws=True)
def test_two_priors_of_one_class_draw_apart(leaf: Leaf) -> None:
    model, x = leaf.model(), leaf.batch()
    first, second = leaf.make(model), leaf.make(model)
    assert first(x, **leaf.call(x)).item() != second(x, **leaf.call(x)).item()
    both = 1.0 * leaf.make(model) + leaf.make(model)
    values = [term(x, **leaf.call(x)).item() for term in both.terms]
    assert values[0] != values[1]


@those(draws=True)
def test_building_again_after_reseeding_reproduces(leaf: Leaf) -> None:
    model, x = leaf.model(), leaf.batch()

    def run() -> list[float]:
        torch.manual_seed(11)
        priors = [leaf.make(model), Subsample(leaf.make(model), 0.5), Lazy(leaf.make(model), 1)]
        return [p(x, **leaf.call(x)).item() for _ in range(2) for p in priors]

    assert run() == run()


def streams() -> list[Any]:
    numpy = np.random.get_state()  # noqa: NPY002  # the generator that Captum draws from
    return [torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()]


@every_leaf
def test_no_global_stream_moves(leaf: Leaf) -> None:
    model, x = leaf.model(), leaf.batch()
    before = streams()
    prior = Subsample(leaf.make(model), 0.5)
    assert streams() == before
    prior(x, **leaf.call(x))
    assert streams() == before


@every_leaf
@pytest.mark.parametrize("looking", ["eval", "no_grad", "inference_mode"])
def test_looking_at_a_value_moves_nothing(leaf: Leaf, looking: str) -> None:
    prior, x = Subsample(leaf.make(leaf.model()), 0.5), leaf.batch()

    def look() -> float:
        if looking == "eval":
            return prior.eval()(x, **leaf.call(x)).item()
        with torch.no_grad() if looking == "no_grad" else torch.inference_mode():
            return prior(x, **leaf.call(x)).item()

    state = repr(prior.state_dict())
    assert look() == look()
    assert repr(prior.state_dict()) == state


@pytest.mark.parametrize("looking", [torch.no_grad, torch.inference_mode, None])
@pytest.mark.parametrize("stable", [False, True])
def test_looking_leaves_the_users_generator(looking: Any, stable: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    options = {"baselines": background(), "generator": generator, "n_samples": 2}
    explainer = ExpectedGradients(net())
    prior: Prior = (
        StabilityPrior(explainer, mse, lambda x: x + 0.1, **options)
        if stable
        else AttributionPrior(explainer, l2, **options)
    )
    x, state = torch.randn(4, 5), generator.get_state().clone()
    with looking() if looking else torch.enable_grad():
        values = [(prior if looking else prior.eval())(x, target=0).item() for _ in range(2)]
    assert torch.equal(generator.get_state(), state)
    assert values[0] == values[1]
    prior.train()(x, target=0)
    assert not torch.equal(generator.get_state(), state)


NESTED: dict[str, Callable[[Prior], Prior]] = {
    "twice": lambda p: Subsample(Subsample(p, 0.5), 0.5),
    "weighted": lambda p: Subsample(0.5 * Subsample(p, 0.5), 0.5),
    "lazy": lambda p: Subsample(Lazy(Subsample(p, 0.5), 1), 0.5),
    "sum": lambda p: Subsample(Subsample(p, 0.5) + 0 * p, 0.5),
}


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED.keys())
def test_nested_subsamples_are_uniform(nest: Callable[[Prior], Prior]) -> None:
    counts: collections.Counter[int] = collections.Counter()

    def count(a: Tensor) -> Tensor:
        if len(a) == 2:
            counts.update(a.detach()[:, 0].round().long().tolist())
        return a.sum(1)

    x, n = torch.arange(1.0, 9.0).unsqueeze(1), 1500
    prior = nest(AttributionPrior(ca.InputXGradient(lambda z: z.sum(1)), count))
    for _ in range(n):
        prior(x)
    expected, spread = n / 4, (n * 3 / 16) ** 0.5
    assert all(abs(counts[i] - expected) < 4.5 * spread for i in range(1, 9)), counts
