"""Robust right reasons: its value against an oracle, its gradient against differences."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_priors.priors import RightForTheRightReasons, RobustRightReasons
from captum_priors.stability import InputGradientRegularization
from tests import oracles
from tests.cases import curved, tuple_inputs

every_attack = pytest.mark.parametrize("attack", ["random", "pgd"])
RADIUS = 0.3


@pytest.fixture
def model() -> nn.Module:
    return curved()


def batch(n: int = 6) -> tuple[Tensor, dict[str, Any]]:
    mask = torch.tensor([[1, 0, 0.25, 0], [0, 0, 1, 1]]).repeat(n // 2, 1)
    return torch.randn(n, 4), {"target": torch.arange(n) % 3, "annotation": mask}


@every_attack
def test_value_is_that_of_the_formula_at_the_points_it_found(model: nn.Module, attack: Any) -> None:
    """By a network whose derivatives are written out, one example at a time."""
    net = oracles.TanhNet.of(model)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    x, call = batch()
    value = RobustRightReasons(model, radius=RADIUS, attack=attack)(x, **call)
    points, allowed = seen[-1], call["annotation"]
    each = zip(points.numpy(), call["target"].tolist(), 1 - allowed.numpy(), strict=True)
    expected = np.mean([np.abs(m * net.loss_gradient(z, y)).sum() for z, y, m in each])
    assert value.item() == pytest.approx(expected, rel=1e-11)  # float64, another order
    moved = points - x
    assert torch.equal(moved != 0, allowed == 0)
    assert float(moved.abs().max()) <= RADIUS + 1e-12
    loss = [
        [net.cross_entropy(z, y) for z, y in zip(at.numpy(), call["target"].tolist(), strict=True)]
        for at in (seen[0], points)
    ]
    gain = np.subtract(loss[1], loss[0])
    assert len(seen) == (1 if attack == "random" else 11)
    # From a random start: ten steps of half the radius end in the highest of the corners seen.
    assert (gain.min() > 0) == (attack == "pgd"), gain


def test_limit_is_the_gradient_of_the_loss(model: nn.Module) -> None:
    """One forbidden feature of one, hardly moved: the square root of Ross et al.'s other form."""
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(5, 1), torch.tensor([0, 1, 2, 0, 1])
    for i in range(5):
        at = {"target": y[i : i + 1], "annotation": torch.zeros(1, 1)}
        found = RobustRightReasons(model, radius=1e-9)(x[i : i + 1], **at)
        square = InputGradientRegularization(model)(x[i : i + 1], target=y[i : i + 1])
        torch.testing.assert_close(found, square.sqrt())


def test_pgd_finds_worse_than_random(model: nn.Module) -> None:
    """The gradient of the cross entropy grows with it, so that climbing the one finds the other."""
    x, call = batch(40)
    values = [
        RobustRightReasons(model, radius=RADIUS, attack=attack).eval()(x, **call)
        for attack in ("random", "pgd")
    ]
    assert values[1] > values[0] > 0


@every_attack
def test_bounds_tuples_and_arguments(attack: Any) -> None:
    case = tuple_inputs()
    masks = (torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(4, 2, 2), torch.zeros(4, 3))
    seen: list[tuple[Tensor, ...]] = []

    def recorded(a: Tensor, b: Tensor, *args: Any) -> Tensor:
        seen.append((a.detach().clone(), b.detach().clone()))
        return case.model(a, b, *args)

    low = tuple(x.amin() for x in case.inputs)
    prior = RobustRightReasons(
        recorded, radius=(0.1, 0.5), attack=attack, lower_bound=low, step_size=(0.05, 0.3)
    )
    y = torch.tensor([0, 1, 1, 0])
    given = {"target": y, "additional_forward_args": (case.args[0], 1.0)}
    value = prior(case.inputs, **given, annotation=masks)
    points = seen[-1]
    leaves = tuple(p.clone().requires_grad_() for p in points)
    logits = case.model(*leaves, case.args[0], 1.0)
    loss = nn.functional.cross_entropy(logits, y, reduction="sum")
    gradients = torch.autograd.grad(loss, leaves)
    pairs = zip(gradients, masks, strict=True)
    torch.testing.assert_close(
        value, torch.stack([((1 - m) * g).abs().sum() for g, m in pairs]).sum() / 4
    )
    for clean, radius, least, at in zip(case.inputs, (0.1, 0.5), low, points, strict=True):
        assert float((at - clean).abs().max()) <= radius + 1e-12
        assert at.min() >= least


def test_a_mask_that_allows_everything_costs_nothing(model: nn.Module) -> None:
    x, call = batch()
    everywhere = {**call, "annotation": torch.ones(6, 4)}
    assert RobustRightReasons(model, radius=1.0, attack="pgd")(x, **everywhere) == 0
    assert RightForTheRightReasons(model)(x, **everywhere) == 0
