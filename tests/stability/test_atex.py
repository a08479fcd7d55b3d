"""ATEX: where it looks, what it compares, what it never does."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import DeepLift, IntegratedGradients, NoiseTunnel, Occlusion, Saliency
from torch import Tensor, nn

from captum_priors import ExpectedGradients, NotDifferentiableError
from captum_priors.stability import ATEX
from tests import oracles
from tests.asserts import leaves_no_trace, relative_error
from tests.cases import Recorder, TwoInputs

RADIUS = 0.3


class Fixed:
    """An explainer that says what it was told."""

    def __init__(self, maps: Any) -> None:
        self.maps = maps

    def attribute(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        return self.maps


def colour_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 3, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 3, 3)


@pytest.mark.parametrize("positions", [(-1, 0, 1), (-1, 0)])  # the second as published
def test_noise_across_the_explanation_at_points_along_it(x: Tensor, positions: Any) -> None:
    """Point by point, value and gradient."""
    maps, student, teacher = torch.randn_like(x), Recorder(colour_net()), colour_net()
    options = {"radius": RADIUS, "temperature": 3, "n_samples": 5, "positions": positions}
    value = ATEX(student, Fixed(maps), teacher=teacher, **options)(x, target=0)
    points = student.seen[-1][0].reshape(-1, 5, *x.shape)
    assert len(points) == len(positions)
    divergences, teaching = [], list[Tensor]()
    for points_at, t in zip(points, positions, strict=True):
        centre = x + t * RADIUS * maps / maps.abs().amax((1, 2, 3), keepdim=True)
        noise = points_at - centre
        assert float((noise * maps).flatten(2).sum(2).abs().max()) < 1e-12
        # Within a channel it is not: all features count together.
        assert float((noise * maps).flatten(3).sum(3).abs().min()) > 1e-4
        assert float(noise.std()) == pytest.approx(RADIUS / 3**0.5, rel=0.15)
        soft = teacher(centre).detach()
        teaching += 5 * [(soft / 3).softmax(1)]
        divergences += [
            oracles.kl(oracles.softened(taught, 3), oracles.softened(said, 1))
            for p in points_at
            for taught, said in zip(soft.numpy(), student.model(p).detach().numpy(), strict=True)
        ]
    assert value.item() == pytest.approx(np.mean(divergences), rel=1e-10)
    parameters = list(student.model.parameters())
    log_q = student.model(points.flatten(0, 2)).log_softmax(1)
    loss = F.kl_div(log_q, torch.cat(teaching), reduction="batchmean")
    found, expected = (torch.autograd.grad(v, parameters) for v in (value, loss))
    assert relative_error(found, expected) < 1e-12


def test_zero_maps_leave_isotropic_noise(x: Tensor) -> None:
    student = Recorder(colour_net())
    value = ATEX(student, Fixed(torch.zeros_like(x)), radius=RADIUS, teacher=colour_net())(x)
    noise = student.seen[-1][0].reshape(-1, *x.shape) - x
    assert value.isfinite()
    assert float(noise.abs().max()) <= RADIUS
    assert float(noise.std()) == pytest.approx(RADIUS / 3**0.5, rel=0.1)


def test_tuple_inputs_have_one_hyperplane_together() -> None:
    model, args = TwoInputs(), (torch.rand(4) + 0.5, 2.0)
    inputs = (torch.randn(4, 2, 2), torch.randn(4, 3))
    maps = tuple(torch.randn_like(x) for x in inputs)
    call: dict[str, Any] = {"target": 1, "additional_forward_args": args}
    student = Recorder(model)
    atex = ATEX(student, Fixed(maps), radius=RADIUS, n_samples=5, teacher=model, positions=(0,))
    assert atex(inputs, **call) > 0
    noise = [p.reshape(5, *x.shape) - x for p, x in zip(student.seen[-1], inputs, strict=False)]
    along = sum((n * m).flatten(2).sum(2) for n, m in zip(noise, maps, strict=True))
    assert float(along.abs().max()) < 1e-12
    assert float((noise[1] * maps[1]).sum(2).abs().min()) > 1e-4
    # The default explainer takes them, too.
    assert ATEX(model)(inputs, **call) > 0


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Saliency, {"abs": False}),
        (lambda m: NoiseTunnel(Saliency(m)), {"nt_samples": 2, "stdevs": 0.1, "abs": False}),
        (IntegratedGradients, {"n_steps": 4}),
        (Occlusion, {"sliding_window_shapes": (1, 1, 1)}),
        (DeepLift, {}),
        (ExpectedGradients, {"n_samples": 2}),
    ],
)
def test_any_explainer_gives_the_direction(x: Tensor, make: Any, options: Any) -> None:
    """Those that cannot be differentiated as well; baselines in the call or in the options."""
    model = colour_net()
    atex = ATEX(model, make(model), **options)
    baselines = {"baselines": torch.zeros(1, 2, 3, 3)} if atex.takes("baselines") else {}
    with leaves_no_trace(model, tensors=[x]):
        assert atex(x, target=torch.tensor([0, 1, 2, 0]), **baselines) > 0
    assert bool(baselines) == (
        make in (IntegratedGradients, Occlusion, DeepLift, ExpectedGradients)
    )


def test_default_direction_is_smoothgrad_of_the_student() -> None:
    student = Recorder(nn.Linear(6, 3))
    atex = ATEX(student, radius=0.4, positions=(0,), n_samples=3)
    assert not atex.takes("baselines")
    atex(torch.zeros(500, 6), target=1)
    (noisy,) = (seen[0] for seen in student.seen if len(seen[0]) == 10 * 500)
    points = student.seen[-1][0]
    # 30,000 draws: four standard errors are 1.6 %.
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.02)
    assert float(noisy.mean()) == pytest.approx(0, abs=4 * 0.1 / 30_000**0.5)
    # The gradient of a linear model is its weights, whatever the noise.
    assert float((points @ student.model.weight[1].detach()).abs().max()) < 1e-12
    # It is drawn in the student's precision.
    half = nn.Linear(6, 3).to(torch.bfloat16)
    assert ATEX(half)(torch.randn(4, 6).to(torch.bfloat16), target=1).isfinite()


def test_explainer_of_a_layer_and_teacher_of_other_classes_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="of the inputs rather than of a layer"):
        ATEX(colour_net(), Fixed(torch.randn(4, 5)))(x, target=0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    with pytest.raises(RuntimeError, match="must match the existing size"):
        ATEX(colour_net(), teacher=teacher)(x, target=0)


def test_teacher_is_a_frozen_copy_of_the_student_at_first(x: Tensor) -> None:
    model = nn.Sequential(colour_net(), nn.BatchNorm1d(3), nn.Dropout(0.5))
    start = copy.deepcopy(model)
    mine = {id(p) for p in model.parameters()}
    atex = ATEX(model)
    assert {id(p) for p in model.parameters()} == mine
    assert not {id(p) for p in atex.parameters()} & mine
    assert not any(p.requires_grad for p in atex.parameters())
    optimizer = torch.optim.SGD([*model.parameters(), *atex.parameters()], 1.0, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        atex(x, target=0).backward()
        optimizer.step()
    for name, value in start.state_dict().items():
        assert torch.equal(value, atex.teacher.state_dict()[name])
        assert value.dtype != torch.float64 or not torch.equal(value, model.state_dict()[name])


def test_resumed_training_has_the_same_teacher(x: Tensor) -> None:
    model = colour_net()
    atex = ATEX(model)
    with torch.no_grad():
        model[1].weight.mul_(2)
    saved = copy.deepcopy(atex.state_dict())
    resumed = ATEX(model)  # would copy the trained student
    assert not torch.equal(resumed(x, target=0), atex.eval()(x, target=0))
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.eval()(x, target=0), atex(x, target=0))


def test_given_teacher_stays_the_caller_s(x: Tensor) -> None:
    model, teacher = colour_net(), nn.Sequential(colour_net(), nn.Dropout(0.5))
    atex = ATEX(model, teacher=teacher)
    assert list(atex.parameters()) == []
    assert not any("teacher" in name for name in atex.state_dict())
    with leaves_no_trace(teacher):  # in train mode, with dropout
        assert torch.equal(atex.eval()(x, target=0), atex(x, target=0))
        atex(x, target=0).backward()
    assert all(p.requires_grad for p in teacher.parameters())


def test_teacher_follows_the_student(x: Tensor) -> None:
    model = colour_net()
    atex = ATEX(model)
    model.to(torch.float32)
    assert atex(x.float(), target=0).dtype == torch.float32
    assert atex.teacher[1].weight.dtype == torch.float32


def test_student_that_couples_examples_is_refused_beside_a_teacher_that_does_not(x: Tensor) -> None:
    teacher, inner = colour_net(), colour_net()

    def centred(x: Tensor) -> Tensor:
        return inner(x - x.mean(0))

    atex = ATEX(centred, Saliency(teacher), teacher=teacher)
    with pytest.raises(NotDifferentiableError, match="do not influence each other"):
        atex(x, target=0)


def test_formula() -> None:
    model = colour_net()
    assert repr(0.5 * ATEX(model, radius=0.5, smooth=9)) == "0.5 * ATEX(radius=0.5, smooth=9.0)"
    atex = ATEX(model, Saliency(model), positions=(-1, 0), teacher=model, abs=False)
    assert repr(atex) == "ATEX(Saliency, abs=False, positions=(-1.0, 0.0))"
