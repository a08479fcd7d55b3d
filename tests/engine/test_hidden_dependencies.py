"""Ways for a gradient to go missing or to be counted twice without anybody noticing."""

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    NotDifferentiableError,
    differentiable,
)
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.asserts import parameter_gradients, relative_error, state_of
from tests.cases import DIFFERENTIATIONS, EXACT, mlp

REPLAYING = ["recompute", "finite_difference"]
# Rounding; truncation of a 0.2 % step.
TOLERANCE = {"double_backprop": 1e-12, "recompute": 1e-12, "finite_difference": 1e-3}


def attribute(model: Any, x: Tensor, way: str, n_samples: int = 3, **call: Any) -> Tensor:
    explainer = ExpectedGradients(model, differentiation=way)
    generator = torch.Generator().manual_seed(0)
    value: Tensor = explainer.attribute(x, x.detach(), n_samples, generator=generator, **call)
    return value


class Conditioned(nn.Module):
    """A model whose additional argument has an entry for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x * condition)))


@pytest.mark.parametrize("way", EXACT)
def test_additional_arguments_get_their_gradient(way: str) -> None:
    model, x = Conditioned(), torch.randn(3, 4)
    condition = torch.randn(3, 4, requires_grad=True)
    named = [*model.named_parameters(), ("condition", condition)]
    explainers: list[tuple[Any, dict[str, Any]]] = [
        (ExpectedGradients(model, differentiation=way), {"baselines": x}),
        (
            ExpectedGradients(model, differentiation=way),
            {"baselines": x, "internal_batch_size": 2},
        ),
        (
            LayerExpectedGradients(model, model.mix, differentiation=way),
            {"baselines": x},
        ),
        (differentiable(IntegratedGradients(model), differentiation=way), {"n_steps": 5}),
        (
            differentiable(IntegratedGradients(model), differentiation=way),
            {"n_steps": 5, "internal_batch_size": 6},
        ),
    ]
    for explainer, options in explainers:
        found = check_differentiable(
            explainer, x, parameters=named, additional_forward_args=condition, **options
        )
        assert found.passed
        free = check_differentiable(
            explainer,
            x,
            parameters=[("condition", condition)],
            additional_forward_args=condition,
            **options,
        )
        assert free.passed


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_input_that_is_also_an_argument(way: str) -> None:
    model, x = Conditioned(), torch.randn(3, 4, requires_grad=True)
    gradients = []
    for each in ("double_backprop", way):
        value = attribute(model, x, each, additional_forward_args=x)
        gradients.append(torch.autograd.grad(value.square().sum(), x))
    assert relative_error(gradients[1], gradients[0]) < TOLERANCE[way]


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_parameter_hooks_run_once(way: str) -> None:
    case = mlp()
    weight = case.model[0].weight
    exact = parameter_gradients(
        attribute(case.model, case.inputs, "double_backprop", target=1), [weight]
    )
    calls: list[Tensor] = []
    weight.register_hook(lambda g: (calls.append(g), -0.5 * g)[1])
    value = attribute(case.model, case.inputs, way, target=1)
    found = parameter_gradients(value, [weight])
    assert len(calls) == 1
    assert relative_error(found, [-0.5 * g for g in exact]) < TOLERANCE[way]
    parameter_gradients(attribute(case.model, case.inputs, way, target=1), [weight])
    assert len(calls) == 2  # the hook is still there


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_prior_before_the_training_forward_pass(way: str, batch_norm: Any) -> None:
    """BatchNorm moves its statistics in place; the prior's own copies stay as they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    parameters = list(model.parameters())
    explainer = ExpectedGradients(model, differentiation=way)
    gradients = []
    for train_first in (True, False):
        options = {"batch_norm": batch_norm, "baselines": x, "generator": seeded()}
        prior = AttributionPrior(explainer, l2, **options)
        before = [b.clone() for b in model.buffers()]
        value = prior(x, target=y)
        if not train_first:
            F.cross_entropy(model(x), y)
            assert not torch.equal(before[0], model[1].running_mean)
        gradients.append(parameter_gradients(value, parameters))
        for buffer, old in zip(model.buffers(), before, strict=True):
            buffer.copy_(old)
    assert relative_error(gradients[1], gradients[0]) < 1e-12  # the same network


class InPlaceFirst(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.start, self.rest = nn.ReLU(inplace=in_place), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.rest(self.start(x)))


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("leaf", [True, False])
def test_models_that_begin_in_place(way: str, leaf: bool) -> None:
    in_place, plain = InPlaceFirst(in_place=True), InPlaceFirst(in_place=False)
    in_place.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4, requires_grad=leaf)
    before = x.detach().clone()
    found = parameter_gradients(attribute(in_place, x, way), [in_place.rest.weight])
    exact = parameter_gradients(attribute(plain, x, way), [plain.rest.weight])
    assert relative_error(found, exact) < 1e-12  # the same function
    assert torch.equal(x.detach(), before)
    layered = nn.Sequential(nn.Linear(4, 4), in_place)
    twin = nn.Sequential(layered[0], plain)
    values = [
        LayerExpectedGradients(m, m[0], differentiation=way).attribute(
            x, before, 2, generator=torch.Generator().manual_seed(0)
        )
        for m in (layered, twin)
    ]
    gradients = [parameter_gradients(v, list(layered[0].parameters())) for v in values]
    assert relative_error(gradients[0], gradients[1]) < 1e-12  # the same function


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, z: m(z + (z.round() - z).detach()), id="straight-through"),
        pytest.param(lambda m, z: m(z).square() * m(z).detach(), id="detached factor"),
        pytest.param(lambda m, z: m(z - z.mean(0)), id="coupled examples"),
        pytest.param(
            lambda m, z: m(F.batch_norm(z, None, None, training=True)), id="functional norm"
        ),
    ],
)
def test_finite_difference_of_another_function_is_refused(function: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 4)
    value = attribute(lambda z: function(model, z), x, "finite_difference", 1)
    with pytest.raises(NotDifferentiableError, match="agree with the input gradient"):
        parameter_gradients(value, list(model.parameters()))


def test_finite_difference_of_a_private_generator_is_refused() -> None:
    model, x, draws = nn.Linear(4, 1), torch.randn(6, 4), torch.Generator()

    def noisy(z: Tensor) -> Tensor:
        return torch.tanh(model(z + torch.randn(z.shape, generator=draws)))

    value = attribute(noisy, x, "finite_difference")
    with pytest.raises(NotDifferentiableError, match="agree with the input gradient"):
        parameter_gradients(value, list(model.parameters()))


def test_recompute_refuses_batch_norm_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with pytest.raises(NotDifferentiableError, match="BatchNorm1d in train mode"):
        attribute(model, torch.randn(6, 4), "recompute")


class Slots:
    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Any:
        return self.model(x)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_modules_are_held_wherever_they_hide(way: str) -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)
    )
    package = types.ModuleType("package")
    package.model = model
    zoo = {i: (lambda x, i=i: i) for i in range(100)} | {-1: lambda x: model(x)}
    x = torch.randn(6, 4)
    exact = None
    for hidden in (model, Slots(model), lambda z: package.model(z), lambda z: zoo[-1](z)):
        explainer = ExpectedGradients(hidden, differentiation=way)
        before = state_of(model)
        value = AttributionPrior(explainer, l2, baselines=x, generator=seeded())(x)
        found = parameter_gradients(value, list(model.parameters()))
        after = state_of(model)
        assert all(
            map(torch.equal, before["state_dict"][0].values(), after["state_dict"][0].values())
        )
        assert before["training"] == after["training"]
        exact = exact or found
        assert relative_error(found, exact) < 1e-12  # the same network, held still
