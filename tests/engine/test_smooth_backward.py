"""A backward pass within a smoothed block replays the model smoothed."""

from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor

from captum_priors import differentiable
from captum_priors._engine._smooth import current_beta, relu_as_softplus
from tests.asserts import relative_error
from tests.cases import relu_mlp


def _gradient(model: Any, x: Tensor, way: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    explainer = differentiable(Saliency(model), differentiation=way)
    with relu_as_softplus(10.0):
        value = explainer.attribute(leaf, target=1, abs=False).square().sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        assert current_beta() == 10.0
        torch.testing.assert_close(torch.zeros(1).relu(), torch.full((1,), 2.0).log() / 10)
    return gradient


# Central differences over 1 % of the point.
@pytest.mark.parametrize(("way", "tolerance"), [("recompute", 1e-12), ("finite_difference", 1e-2)])
def test_replay_within_the_block(way: Any, tolerance: float) -> None:
    case = relu_mlp()
    expected = _gradient(case.model, case.inputs, "double_backprop")
    found = _gradient(case.model, case.inputs, way)
    assert relative_error([found], [expected]) < tolerance
    assert torch.relu(-torch.ones(1)).item() == 0
