"""Zeros that torch would carry through a piecewise linear network are zeros, and are left out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_priors import ExpectedGradients
from captum_priors._engine import _graph
from captum_priors._engine._graph import _FLAT, nodes, refuse_dead_ends

OPERATORS: dict[str, nn.Module] = {
    "AdaptiveAvgPool2DBackwardBackward0": nn.AdaptiveAvgPool2d(3),
    "AdaptiveAvgPool3DBackwardBackward0": nn.AdaptiveAvgPool3d(3),
    "AdaptiveMaxPool2DBackwardBackward0": nn.AdaptiveMaxPool2d(3),
    "AdaptiveMaxPool3DBackwardBackward0": nn.AdaptiveMaxPool3d(3),
    "AvgPool2DBackwardBackward0": nn.AvgPool2d(2),
    "AvgPool3DBackwardBackward0": nn.AvgPool3d(2),
    "HardshrinkBackwardBackward0": nn.Hardshrink(0.1),
    "HardtanhBackwardBackward0": nn.Hardtanh(-0.3, 0.3),
    "LeakyReluBackwardBackward0": nn.LeakyReLU(),
    "MaxPool2DWithIndicesBackwardBackward0": nn.MaxPool2d(2),
    "MaxPool3DWithIndicesBackwardBackward0": nn.MaxPool3d(2),
    "SoftshrinkBackwardBackward0": nn.Softshrink(0.1),
    "ThresholdBackwardBackward0": nn.ReLU(),
}


def network(operator: nn.Module) -> tuple[nn.Module, Tensor]:
    """The operator between two convolutions; tanh at the end gives the forward pass a share."""
    deep = type(operator).__name__.endswith("3d")
    convolution: Any = nn.Conv3d if deep else nn.Conv2d
    model = nn.Sequential(
        convolution(1, 2, 3),
        operator,
        convolution(2, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(1),
    )
    x = torch.randn(2, 1, *[8] * (3 if deep else 2))
    model(x)
    return model, x


def gradient_with_graph(model: nn.Module, x: Tensor) -> Tensor:
    points = x.clone().requires_grad_()
    ones = torch.ones(len(x), 1, requires_grad=True)
    return torch.autograd.grad(model(points), points, ones, create_graph=True)[0]


def parameter_gradients(gradient: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(
        gradient.square().sum(), list(model.parameters()), allow_unused=True
    )
    return [torch.zeros(()) if g is None else g for g in found]


def test_every_operator_is_covered() -> None:
    assert OPERATORS.keys() == _FLAT


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_gives_zeros_and_nothing_changes_without_them(name: str) -> None:
    model, x = network(OPERATORS[name])
    gradient, without = gradient_with_graph(model, x), gradient_with_graph(model, x)
    seen: list[Tensor] = []
    for node in nodes([gradient]):
        if node.name() == name:
            node.register_hook(lambda found, given: seen.append(found[1]))
    refuse_dead_ends((without,), skip_zeros=True)
    expected = parameter_gradients(gradient, model)
    assert len(seen) == 1
    assert seen[0].count_nonzero() == 0
    found = parameter_gradients(without, model)
    assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(expected, found, strict=True))
    assert any(g.count_nonzero() for g in found)


def relu_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def test_only_hidden_biases_go_without() -> None:
    model, x = relu_network(), torch.randn(5, 3)
    attributions = ExpectedGradients(model).attribute(x, x, n_samples=1)
    found = torch.autograd.grad(attributions.sum(), list(model.parameters()), allow_unused=True)
    assert [g is None for g in found] == [False, True, False, True]


def test_inputs_that_require_gradients_get_their_zeros() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    explainer = ExpectedGradients(relu_network(), multiply_by_inputs=False)
    (found,) = torch.autograd.grad(explainer.attribute(x, x.detach(), n_samples=1).sum(), x)
    assert found.count_nonzero() == 0


def test_a_second_walk_hooks_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(found: Any, given: Any) -> Any:
        calls.append(1)
        return found

    monkeypatch.setattr(_graph, "_without_zeros", counted)
    gradient = gradient_with_graph(relu_network(), torch.randn(5, 3))
    refuse_dead_ends((gradient,), skip_zeros=True)
    refuse_dead_ends((gradient,), skip_zeros=True)
    gradient.sum().backward()
    assert len(calls) == 1
