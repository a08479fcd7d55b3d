"""Code of the user's that runs beside a prior: hooks, defaults that hold models, early exits."""

import functools
import gc
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients
from captum_priors.penalties import l1


class Hooked(nn.Module):
    """Clips a gradient on its way, as users do against explosions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda g: g.clamp(-1, 1))
        return self.b(F.relu(hidden))


def test_hooks_of_the_user_get_tensors() -> None:
    """Also where the second backward pass has nothing but zeros for them."""
    model = Hooked()
    seen: list[Any] = []
    model.a.register_full_backward_hook(lambda m, before, after: seen.append(after[0]))
    model.a.bias.register_hook(lambda g: g.clamp(-1, 1))
    x = torch.randn(5, 3)
    AttributionPrior(ExpectedGradients(model), l1, baselines=x)(x).backward()
    assert seen
    assert all(isinstance(g, Tensor) for g in seen)
    assert model.a.bias.grad is None  # a piecewise linear model's slope does not depend on it


def test_a_graph_made_before_is_left_as_it_is() -> None:
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    z = torch.randn(5, 3, requires_grad=True)
    (outer,) = torch.autograd.grad(other(z).sum(), z, create_graph=True)

    def forward(x: Tensor, extra: Tensor) -> Tensor:
        return (x * extra).tanh().sum(1)

    prior = AttributionPrior(ExpectedGradients(forward), l1, baselines=torch.zeros(1, 3))
    prior(torch.randn(5, 3), additional_forward_args=outer)
    bias = other[0].bias
    (gradient,) = torch.autograd.grad(outer.square().sum(), bias, allow_unused=True)
    assert gradient is not None
    assert not gradient.any()


def test_a_penalty_may_have_nothing_to_say_about_a_batch() -> None:
    model = nn.Linear(3, 1)

    def penalty(attributions: Tensor, *, annotation: Tensor) -> Tensor:
        if not annotation.any():
            return attributions.new_zeros(len(attributions))
        return (attributions * annotation).abs().sum(1)

    x = torch.randn(5, 3)
    prior = AttributionPrior(ExpectedGradients(model), penalty, baselines=x)
    assert prior(x, annotation=torch.zeros(5, 3)) == 0
    expected = ((x - x.mean(0)) * model.weight).abs().sum(1).mean()
    assert torch.allclose(prior(x, annotation=torch.ones(5, 3)), expected)


class HoldsItsPrior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

        class Inner:  # a class whose methods close over the model
            def attribute(inner, inputs: Tensor, target: Any = None) -> Tensor:
                return inputs * self.net(inputs)

        self.inner = Inner()
        self.prior = AttributionPrior(
            ExpectedGradients(self.net), lambda a, net=self: a.abs().sum(1), baselines=0.0
        )


def test_nothing_keeps_a_model_that_is_let_go() -> None:
    model = HoldsItsPrior()
    model.prior(torch.randn(5, 3)).backward()
    AttributionPrior(model.inner, l1)(torch.randn(5, 3))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_formula_has_no_addresses() -> None:
    penalty = functools.partial(lambda a, f: f(a).sum(1), f=torch.abs)
    prior = AttributionPrior(ExpectedGradients(nn.Linear(3, 1)), penalty)
    assert " at 0x" not in repr(prior)
