"""ATEX: where it looks, what it compares, what it never does."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import DeepLift, IntegratedGradients, Occlusion, Saliency
from torch import Tensor, nn

from captum_priors import ExpectedGradients
from captum_priors.stability import ATEX
from tests import oracles
from tests.asserts import assert_same_numbers, leaves_no_trace, relative_error
from tests.cases import TwoInputs

RADIUS = 0.3


class Recorder(nn.Module):
    """Remembers the points at which a model was evaluated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, *inputs: Any) -> Tensor:
        self.seen.append(tuple(x.detach().clone() for x in inputs if isinstance(x, Tensor)))
        return self.model(*inputs)


class Fixed:
    """An explainer that says what it was told."""

    def __init__(self, maps: Any) -> None:
        self.maps = maps
        self.calls: list[dict[str, Any]] = []

    def attribute(self, inputs: Any, target: Any = None, baselines: Any = None) -> Any:
        self.calls.append({"inputs": inputs, "target": target, "baselines": baselines})
        return self.maps


def colour_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 3, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 3, 3)


def looked_at(
    x: Tensor, maps: Tensor, **options: Any
) -> tuple[Tensor, Tensor, nn.Module, nn.Module]:
    """Value of a call, and the points of the student: (positions, samples, batch, ...)."""
    student, teacher = Recorder(colour_net()), colour_net()
    atex = ATEX(
        student, Fixed(maps), radius=RADIUS, temperature=3, n_samples=5, teacher=teacher, **options
    )
    value = atex(x, target=0)
    (points,) = student.seen[-1]
    return value, points.reshape(-1, 5, *x.shape), student.model, teacher


def test_noise_lies_across_the_explanation_at_points_along_it(x: Tensor) -> None:
    maps = torch.randn_like(x)
    _, points, _, _ = looked_at(x, maps)
    assert points.shape[0] == 3
    step = RADIUS * maps / maps.abs().amax((1, 2, 3), keepdim=True)
    for points_at, t in zip(points, (-1, 0, 1), strict=True):
        noise = points_at - (x + t * step)
        along = (noise * maps).flatten(2).sum(2)
        assert float(along.abs().max()) < 1e-12
        # Within a channel it is not: all dimensions count together.
        assert float((noise * maps).flatten(3).sum(3).abs().min()) > 1e-4
        assert float(noise.std()) == pytest.approx(RADIUS / 3**0.5, rel=0.15)


def test_published_noise_lies_across_each_channel_and_never_up(x: Tensor) -> None:
    maps = torch.randn_like(x)
    _, points, _, _ = looked_at(x, maps, paper_compat=True)
    assert points.shape[0] == 2
    step = RADIUS * maps / (maps.abs().amax((1, 2, 3), keepdim=True) + 1e-6)
    for points_at, t in zip(points, (-1, 0), strict=True):
        noise = points_at - (x + t * step)
        assert float((noise * maps).flatten(3).sum(3).abs().max()) < 1e-12


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("student_temperature", [1.0, 3.0])
def test_value_point_by_point(x: Tensor, published: bool, student_temperature: float) -> None:
    maps = torch.randn_like(x)
    value, points, student, teacher = looked_at(
        x, maps, paper_compat=published, student_temperature=student_temperature
    )
    top = maps.abs().amax((1, 2, 3), keepdim=True) + (1e-6 if published else 0)
    divergences = []
    with torch.no_grad():
        for p, t in enumerate((-1, 0) if published else (-1, 0, 1)):
            soft = teacher(x + t * RADIUS * maps / top).numpy()
            for s in range(5):
                here = student(points[p, s]).numpy()
                for i in range(len(x)):
                    q = oracles.softened(soft[i], 3)
                    divergences.append(
                        oracles.kl(q, oracles.softened(here[i], student_temperature))
                    )
    # The published mean is over the three classes, too.
    expected = np.mean(divergences) / (3 if published else 1)
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_value_is_torch_s_published_criterion(x: Tensor) -> None:
    maps = torch.randn_like(x)
    value, points, student, teacher = looked_at(x, maps, paper_compat=True, positions=(0.0,))
    target = (teacher(x) / 3).softmax(1).repeat(5, 1)
    with pytest.warns(UserWarning, match="reduction: 'mean'"):
        published = nn.KLDivLoss()(student(points.flatten(0, 2)).log_softmax(1), target)
    assert value.item() == pytest.approx(published.item(), rel=1e-10)


def test_gradient_is_that_of_the_predictions_alone(x: Tensor) -> None:
    maps = torch.randn_like(x)
    value, points, student, teacher = looked_at(x, maps)
    parameters = list(student.parameters())
    found = torch.autograd.grad(value, parameters)
    top = maps.abs().amax((1, 2, 3), keepdim=True)
    centres = torch.stack([x + t * RADIUS * maps / top for t in (-1, 0, 1)])
    soft = (teacher(centres.flatten(0, 1)) / 3).softmax(1).reshape(3, 1, 4, 3).expand(3, 5, 4, 3)
    here = student(points.flatten(0, 2)).log_softmax(1)
    loss = F.kl_div(here, soft.reshape(-1, 3).detach(), reduction="batchmean")
    assert relative_error(found, torch.autograd.grad(loss, parameters)) < 1e-12


def test_zero_maps_leave_isotropic_noise(x: Tensor) -> None:
    for published in (False, True):
        value, points, _, _ = looked_at(x, torch.zeros_like(x), paper_compat=published)
        noise = points - x
        assert value.isfinite()
        assert float(noise.abs().max()) <= RADIUS
        assert float(noise.std()) == pytest.approx(RADIUS / 3**0.5, rel=0.1)


def test_tuple_inputs_have_one_hyperplane_together() -> None:
    model, args = TwoInputs(), (torch.rand(4) + 0.5, 2.0)
    inputs = (torch.randn(4, 2, 2), torch.randn(4, 3))
    maps = tuple(torch.randn_like(x) for x in inputs)
    student = Recorder(model)

    class Explainer:
        def attribute(self, inputs: Any, target: Any, additional_forward_args: Any) -> Any:
            assert additional_forward_args == args
            return maps

    atex = ATEX(student, Explainer(), radius=RADIUS, n_samples=5, teacher=model, positions=(0,))
    assert atex(inputs, target=1, additional_forward_args=args) > 0
    noise = [(p.reshape(5, *x.shape) - x) for p, x in zip(student.seen[-1], inputs, strict=False)]
    along = sum((n * m).flatten(2).sum(2) for n, m in zip(noise, maps, strict=True))
    assert float(along.abs().max()) < 1e-12
    assert float((noise[1] * maps[1]).sum(2).abs().min()) > 1e-4
    # The default explainer takes them, too.
    assert ATEX(model)(inputs, target=1, additional_forward_args=args) > 0


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Saliency, {"abs": False}),
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
    baselines = {"baselines": torch.zeros(1, 2, 3, 3)} if make is not Saliency else {}
    with leaves_no_trace(model, tensors=[x]):
        assert atex(x, target=torch.tensor([0, 1, 2, 0]), **baselines) > 0
    assert atex.takes("baselines") == bool(baselines)


def test_default_direction_is_smoothgrad_of_the_student() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 6)
    maps = ATEX(lambda x: x @ weight.T, teacher=lambda x: x)._explanation  # linear: no noise in it
    from captum_priors.stability._regularizer import Call

    call = Call(lambda x: x @ weight.T, (torch.randn(4, 6),), torch.tensor([0, 1, 2, 0]), ())
    assert_same_numbers(maps(call)[0], weight[[0, 1, 2, 0]])
    student = Recorder(nn.Linear(6, 3))
    ATEX(student, radius=0.4)(torch.zeros(500, 6), target=0)
    noisy = student.seen[0][0]
    assert noisy.shape == (10 * 500, 6)
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.03)
    # The published code clamps them to the range of bytes.
    ATEX(student, radius=0.4, paper_compat=True)(torch.zeros(500, 6), target=0)
    assert float(student.seen[2][0].min()) == 0


def test_explainer_of_a_layer_is_refused(x: Tensor) -> None:
    atex = ATEX(colour_net(), Fixed(torch.randn(4, 5)))
    with pytest.raises(ValueError, match="of the inputs rather than of a layer"):
        atex(x, target=0)


def test_teacher_for_other_classes_is_refused(x: Tensor) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    with pytest.raises(ValueError, match="3 classes as the student's, found 4"):
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
    assert set(atex.state_dict()) == {"stream.step", "stream.seed"}
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


def test_model_that_cannot_be_copied_needs_a_teacher() -> None:
    model = colour_net()
    model.kept = model[1].weight * 2  # a tensor with a graph
    with pytest.raises(ValueError, match="teacher="):
        ATEX(model)
    with pytest.raises(ValueError, match="only a module can be copied"):
        ATEX(lambda x: x)


@pytest.mark.slow
def test_compiled_model_in_first_derivatives(x: Tensor) -> None:
    """Torch refuses to differentiate the backward pass of a compiled module."""
    model = colour_net()
    compiled = torch.compile(model, backend="aot_eager")  # which needs no compiler of the system's
    for module in (compiled, compile_in_place(model)):
        atex, eager = ATEX(module).eval(), ATEX(colour_net())
        assert isinstance(atex.teacher, nn.Sequential)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        value = atex(x, target=1)
        eager = ATEX(model, teacher=atex.teacher).eval()
        found = torch.autograd.grad(value, list(model.parameters()))
        expected = torch.autograd.grad(eager(x, target=1), list(model.parameters()))
        assert relative_error(found, expected) < 1e-10


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def test_fused_attention_in_first_derivatives() -> None:
    """A stock encoder has no second derivative; single precision selects the fused kernel."""
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).mean(1))

    model, x = Classifier().float(), torch.randn(4, 6, 16, dtype=torch.float32)
    outputs = model.eval()(x.requires_grad_())  # dropout selects another kernel
    (slope,) = torch.autograd.grad(outputs[:, 0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="scaled_dot_product"):
        slope.square().sum().backward()
    model.train().zero_grad()
    teacher, x = Classifier().float(), x.detach()
    with torch.no_grad():
        teacher.head.weight.mul_(10)
    atex = ATEX(model, teacher=teacher, temperature=1).eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        value = atex(x, target=1)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert all(p.grad is not None for p in model.parameters())
    assert values[-1] < 0.7 * values[0]


def test_formula() -> None:
    atex = ATEX(colour_net(), radius=0.5, paper_compat=True, smooth=9)
    expected = "ATEX(radius=0.5, temperature=4.0, n_samples=8, paper_compat=True, smooth=9.0)"
    assert repr(0.5 * atex) == "0.5 * " + expected
