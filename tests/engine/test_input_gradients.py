"""The seam: what reaches the parameters, once, and the errors where nothing correct can."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    NotDifferentiableError,
    differentiable,
)
from captum_priors.engine import input_gradients
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.asserts import parameter_gradients, relative_error, state_of
from tests.cases import DIFFERENTIATIONS, EXACT, attribute, mlp

# Rounding; truncation of a 0.2 % step.
TOLERANCE = {"double_backprop": 1e-12, "recompute": 1e-12, "finite_difference": 1e-3}
every_way = pytest.mark.parametrize("way", DIFFERENTIATIONS)
REPLAYING = DIFFERENTIATIONS[1:]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


OBSTACLES: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid_backward": F.hardsigmoid,
    "CdistBackward": lambda h: torch.cdist(h, torch.ones(1, 1), p=1.0),
    "once_differentiable": Once.apply,
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_missing_second_derivative_is_named(name: str) -> None:
    head, x = nn.Linear(4, 1), torch.randn(3, 4)
    with pytest.raises(NotDifferentiableError, match=name) as raised:
        attribute(lambda z: OBSTACLES[name](head(z)), x)
    assert "differentiation='finite_difference' needs first derivatives only" in str(raised.value)
    # Recompute tries it on its first chunk, before there is anything to differentiate.
    with pytest.raises(NotDifferentiableError, match=name):
        attribute(lambda z: OBSTACLES[name](head(z)), x, "recompute")
    with torch.no_grad():
        attribute(lambda z: OBSTACLES[name](head(z)), x)  # values need first derivatives only


@every_way
def test_reentrant_checkpointing_is_refused_and_the_other_works(way: str) -> None:
    case = mlp()

    def found(model: Any, way: str) -> list[Tensor]:
        value = attribute(model, case.inputs, way, target=1)
        return parameter_gradients(value, [*case.model.parameters()])

    with pytest.raises(NotDifferentiableError, match="use_reentrant=False"):
        found(lambda x: checkpoint(case.model, x, use_reentrant=True), way)
    held = found(lambda x: checkpoint(case.model, x, use_reentrant=False), way)
    assert relative_error(held, found(case.model, "double_backprop")) < TOLERANCE[way]


@pytest.mark.parametrize("way", REPLAYING)
def test_tensors_with_an_earlier_graph_are_refused(way: str) -> None:
    """Fast weights, encoded conditions: their own gradient would miss this part of the loss."""
    seed, x = torch.randn(4, requires_grad=True), torch.randn(3, 4)
    made = seed.exp()
    with pytest.raises(NotDifferentiableError, match="computed before the call"):
        attribute(lambda z: torch.tanh(z @ made), x, way)
    with pytest.raises(NotDifferentiableError, match="computed before the call"):
        attribute(
            lambda z, h: torch.tanh(z * h).sum(1), x, way, additional_forward_args=made.expand(3, 4)
        )
    # Inside the function, as a constant, or with double backpropagation it works.
    inside = attribute(lambda z: torch.tanh(z @ seed.exp()), x, way)
    exact = attribute(lambda z: torch.tanh(z @ made), x)
    gradients = [torch.autograd.grad(v.square().sum(), seed) for v in (inside, exact)]
    assert relative_error(*gradients) < TOLERANCE[way]
    assert not attribute(lambda z: torch.tanh(z @ made.detach()), x, way).requires_grad


@every_way
def test_detached_and_unused_inputs_are_refused(way: str) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(NotDifferentiableError, match=r"detach\(\)"):
        attribute(lambda z: z.detach().sum(1), x, way)
    with pytest.raises(NotDifferentiableError, match=r"inputs\[1\].*additional_forward_args"):
        ExpectedGradients(lambda a, b: a.sum(1), differentiation=way).attribute((x, x), (x, x))
    with pytest.raises(ValueError, match=r"outputs of shape \(\d, 4\)"):
        attribute(lambda z: z, x, way)


@every_way
def test_only_the_argument_counts(way: str) -> None:
    """A function that also closes over the input: the partial derivative by its argument."""
    x = torch.randn(3, 4, requires_grad=True)
    explainer = ExpectedGradients(
        lambda z: (z * x.repeat(len(z) // 3, 1)).sum(1), differentiation=way
    )
    assert torch.allclose(explainer.attribute(x, torch.zeros(1, 4), 2), x.square())


def test_only_the_argument_counts_at_the_seam() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = input_gradients(lambda points: (points[0] * x).sum(1), (x,))
    assert torch.equal(gradient, x)


@every_way
def test_no_leaf_left_means_no_graph(way: str) -> None:
    case = mlp()
    case.model.requires_grad_(False)
    value = attribute(case.model, case.inputs, way, target=1)
    # Double backpropagation keeps a graph to its own copy of the points, and to nothing else.
    assert way == "double_backprop" or not value.requires_grad
    x = case.inputs.requires_grad_()
    value = attribute(case.model, x, way, target=1)
    assert float(torch.autograd.grad(l2(value).sum(), x)[0].abs().max()) > 0


class Conditioned(nn.Module):
    """A model whose additional argument has an entry for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x * condition)))


@pytest.mark.parametrize("way", EXACT)
def test_additional_arguments_get_their_gradient(way: Any) -> None:
    model, x = Conditioned(), torch.randn(3, 4)
    condition = torch.randn(3, 4, requires_grad=True)
    given: dict[str, Any] = {
        "parameters": [*model.named_parameters(), ("condition", condition)],
        "additional_forward_args": condition,
    }
    eg = ExpectedGradients(model, differentiation=way)
    layer_eg = LayerExpectedGradients(model, model.mix, differentiation=way)
    ig = differentiable(IntegratedGradients(model), differentiation=way)
    assert check_differentiable(eg, x, baselines=x, internal_batch_size=2, **given).passed
    assert check_differentiable(layer_eg, x, baselines=x, **given).passed
    assert check_differentiable(ig, x, n_steps=5, internal_batch_size=6, **given).passed


@every_way
def test_input_that_is_also_an_argument(way: str) -> None:
    model, x = Conditioned(), torch.randn(3, 4, requires_grad=True)
    found, exact = (
        torch.autograd.grad(attribute(model, x, each, additional_forward_args=x).square().sum(), x)
        for each in (way, "double_backprop")
    )
    assert relative_error(found, exact) < TOLERANCE[way]


@every_way
def test_parameter_hooks_run_once(way: str) -> None:
    case, calls = mlp(), list[Tensor]()
    weight = case.model[0].weight

    def gradients(way: str) -> list[Tensor]:
        return parameter_gradients(attribute(case.model, case.inputs, way, target=1), [weight])

    exact = gradients("double_backprop")
    weight.register_hook(lambda g: (calls.append(g), -0.5 * g)[1])
    assert relative_error(gradients(way), [-0.5 * g for g in exact]) < TOLERANCE[way]
    assert len(calls) == 1
    gradients(way)
    assert len(calls) == 2  # the hook is still there


class Slots:
    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Any:
        return self.model(x)


@every_way
def test_modules_are_held_wherever_they_hide(way: Any) -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)
    )
    package = types.ModuleType("package")
    package.model = model
    zoo = {i: (lambda x, i=i: i) for i in range(100)} | {-1: lambda x: model(x)}
    x, gradients = torch.randn(6, 4), []
    for hidden in (model, Slots(model), lambda z: package.model(z), lambda z: zoo[-1](z)):
        before = state_of(model)
        generator = torch.Generator().manual_seed(0)
        explainer = ExpectedGradients(hidden, differentiation=way)
        value = AttributionPrior(explainer, l2, baselines=x, generator=generator)(x)
        gradients.append(parameter_gradients(value, list(model.parameters())))
        after = state_of(model)
        states = (each["state_dict"][0].values() for each in (before, after))
        assert all(map(torch.equal, *states))
        assert before["training"] == after["training"]
        assert relative_error(gradients[-1], gradients[0]) < 1e-12  # the same network, held still
