"""Without a graph through zero derivatives: the same numbers, hooks respected, less kept."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_priors import ExpectedGradients
from captum_priors._engine import _piecewise_linear
from captum_priors._engine._first_order import with_second_derivative
from captum_priors._engine._graph import nodes
from captum_priors._engine._piecewise_linear import _SECOND

X = torch.randn(5, 2, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(*, inplace: bool = False) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(inplace), nn.MaxPool2d(3, stride=2, padding=1)),
        *(nn.Conv2d(3, 3, 2), nn.Tanh(), nn.MaxPool2d(2, dilation=2, ceil_mode=True)),
        *(nn.Flatten(), nn.LazyLinear(4), nn.ReLU(inplace), nn.Linear(4, 1)),
    )


def penalised(model: nn.Module, grad: Callable[..., tuple[Tensor, ...]]) -> list[Tensor | None]:
    points = X.clone().requires_grad_()
    (gradient,) = grad(model(points).sum(), (points,))
    return [
        *torch.autograd.grad(
            gradient.square().sum(), [*model.parameters(), points], allow_unused=True
        )
    ]


without_zeros = functools.partial(with_second_derivative, no_zeros_since=0)


def by_torch(output: Tensor, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, points, create_graph=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_same_numbers(inplace: bool) -> None:
    model = network(inplace=inplace)
    model(X)  # makes the lazy layer
    expected = penalised(model, by_torch)
    found = penalised(model, without_zeros)
    assert expected[0] is not None
    assert expected[0].any()
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None:
            assert theirs is None or not theirs.any()
        else:
            assert torch.equal(ours, theirs)


def behind(function: Callable[[Tensor], Tensor]) -> set[str]:
    points = X.clone().requires_grad_()
    (gradient,) = without_zeros(function(points * 1).sum(), (points,))
    return {node.name() for node in nodes([gradient])}


OPERATORS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, stride=2, padding=1, dilation=1, ceil_mode=True),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 4),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_forward_pass_is_not_behind_the_slopes(name: str) -> None:
    """And the value and its derivative by what arrives are torch's to the last bit."""
    found = []
    for grad in (without_zeros, by_torch):
        points = X.clone().requires_grad_()
        output = OPERATORS[name](points)
        scale = torch.linspace(1, 2, output[0].numel()).reshape(output[0].shape).requires_grad_()
        (gradient,) = grad((scale * output).sum(), (points,))
        (second,) = (n for n in nodes([gradient]) if n.name() in _SECOND.values())
        (by_scale,) = torch.autograd.grad(gradient.square().sum(), scale)
        found.append((gradient, by_scale, second.next_functions[1][0]))
    (ours, ours_by_scale, nothing), (theirs, theirs_by_scale, forward_pass) = found
    assert torch.equal(ours, theirs)
    assert torch.equal(ours_by_scale, theirs_by_scale)
    assert by_scale.any()
    assert forward_pass is not None
    assert nothing is None


def test_hooks_of_the_user_are_obeyed() -> None:
    for on_node in (True, False):
        points = X.clone().requires_grad_()
        output = F.relu(points)
        if on_node:
            node = output.grad_fn
            assert node is not None
            node.register_hook(lambda gradients, _: (3 * gradients[0],))
        else:
            output.register_hook(lambda gradient: 3 * gradient)
        (gradient,) = without_zeros(output.sum(), (points,))
        assert torch.equal(gradient, 3.0 * (X > 0))


def test_no_hook_of_ours_stays() -> None:
    points = X.clone().requires_grad_()
    output = F.relu(points).sum()
    without_zeros(output, (points,))
    (gradient,) = torch.autograd.grad(output, points, create_graph=True)
    assert "ReluBackward0" in {node.name() for node in nodes([gradient])}


def doubled_in_place(gradients: Any, _: Any) -> None:
    gradients[0].data.mul_(2)


def clamped_in_place(gradients: Any, _: Any) -> None:
    gradients[0].detach().clamp_(max=0.5)


def of_twice_as_much(_: Any, arriving: Any) -> tuple[Tensor]:
    return (torch.ops.aten.threshold_backward(2 * arriving[0], torch.ones_like(X), 0.0),)


def at_another_point(_: Any, arriving: Any) -> tuple[Tensor]:
    return (torch.ops.aten.threshold_backward(arriving[0], X - 0.5, 0.0),)


def straight_through(_: Any, arriving: Any) -> tuple[Tensor]:
    return (1.5 * arriving[0],)


@pytest.mark.parametrize(
    "hook",
    [straight_through, doubled_in_place, clamped_in_place, of_twice_as_much, at_another_point],
)
def test_what_another_hook_makes_of_a_gradient_stays(hook: Callable[..., Any]) -> None:
    found = []
    for grad, hooks in ((without_zeros, [hook]), (by_torch, [hook]), (by_torch, [])):
        points, scale = X.clone().requires_grad_(), X.square().requires_grad_()
        output = F.relu(points)
        node = output.grad_fn
        assert node is not None
        for each in hooks:
            node.register_hook(each)
        (gradient,) = grad((scale * output).sum(), (points,))
        found.append((gradient, *torch.autograd.grad(gradient.square().sum(), scale)))
    ours, theirs, without = found
    assert all(map(torch.equal, ours, theirs))
    assert not any(map(torch.equal, ours, without))


def test_graphs_made_before_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may be differentiating them."""
    hooked: list[Any] = []
    before = F.relu(torch.randn(3, requires_grad=True))
    during: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        during.append(F.relu(x * before))
        return during[-1].sum(1)

    x = torch.randn(5, 3)
    with monkeypatch.context() as patched:
        patched.setattr(_piecewise_linear, "_hook", _recording(hooked))
        ExpectedGradients(forward).attribute(x, x)
    assert hooked == [during[-1].grad_fn]


def _recording(hooked: list[Any]) -> Callable[..., Any]:
    make = _piecewise_linear._hook

    def recorded(node: Any, name: str) -> Callable[..., Any]:
        hooked.append(node)
        return make(node, name)

    return recorded


def test_inside_checkpointing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(5, 3)

    def score(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        maps = ExpectedGradients(model).attribute(x, x.detach(), generator=generator)
        return maps.square().sum()

    expected = torch.autograd.grad(score(x), model[0].weight)
    found = torch.autograd.grad(checkpoint(score, x, use_reentrant=False), model[0].weight)
    assert torch.equal(*expected, *found)


def test_who_asks_for_the_gradient_by_the_inputs_gets_it() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(5, 3)
    for asked in (False, True):
        points = inputs.clone().requires_grad_(asked)
        explainer = ExpectedGradients(model, multiply_by_inputs=False)
        total = explainer.attribute(points, inputs).square().sum()
        assert ("AddmmBackward0" in {node.name() for node in nodes([total])}) is asked
    (gradient,) = torch.autograd.grad(total, points)
    assert not gradient.any()
