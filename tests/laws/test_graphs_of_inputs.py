"""Inputs that something trained has made: the gradient reaches it, by every point that follows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws.leaves import LEAVES, Around, Leaf

# Their values depend on the network around the inputs alone, and not on the inputs' own numbers.
_OF_NETWORK = (
    *("Jacobian", "InputGradient", "CURE", "SSR", "IG-NORM", "IG-SUM-NORM"),
    *("Saliency", "Stability", "R4-random", "R4-pgd", "RRR"),
)


class Shifted(Around):
    """A network whose inputs are shifted first."""

    def __init__(self, inner: nn.Module, shift: Tensor) -> None:
        super().__init__(inner)
        self.shift = shift

    def forward(self, x: Tensor) -> Any:
        return self.inner(x + self.shift)


def by_name(name: str) -> Leaf:
    return next(leaf for leaf in LEAVES if leaf.name == name)


@pytest.mark.parametrize("name", _OF_NETWORK)
def test_a_shift_before_the_call_is_as_one_in_the_model(name: str) -> None:
    leaf = by_name(name)
    model, x, shift = leaf.model(), leaf.batch(), torch.randn(5).requires_grad_()
    outside, inside = leaf.make(model), leaf.make(Shifted(model, shift))
    inside.load_state_dict(outside.state_dict())
    values = outside(x + shift, **leaf.call(x)), inside(x, **leaf.call(x))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, shift)[0] for v in values))


def test_what_replaces_features_follows_the_range_of_the_others() -> None:
    leaf = by_name("SGT")
    prior, x = leaf.make(leaf.model()), leaf.batch()
    start, shift = prior.state_dict(), torch.randn(5).requires_grad_()

    def value(shift: Tensor) -> Tensor:
        prior.load_state_dict(start)
        found: Tensor = prior(x + shift, **leaf.call(x))
        return found

    assert torch.autograd.gradcheck(value, shift)
