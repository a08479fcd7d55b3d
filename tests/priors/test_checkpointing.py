"""Activation checkpointing under a prior: exact, or refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_priors import AttributionPrior, ExpectedGradients, NotDifferentiableError
from captum_priors.penalties import l2
from captum_priors.stability import smooth_activations
from tests.asserts import parameter_gradients, relative_error


class Checkpointed(nn.Module):
    """A dropout block that is run again in the backward pass."""

    def __init__(self, *, active: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 1)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.active else self.block(x)
        return self.head(hidden)


def gradients(
    model: Checkpointed, way: str, x: Tensor, smooth: float | None = None
) -> list[Tensor]:
    explainer = ExpectedGradients(model, differentiation=way)
    prior = AttributionPrior(explainer, l2, smooth=smooth, baselines=x)
    return parameter_gradients(prior(x), list(model.parameters()))


@pytest.mark.parametrize("way", ["recompute", "finite_difference"])
def test_replaying_differentiations_hold_the_model_for_the_second_run_too(way: str) -> None:
    model, x = Checkpointed(active=True), torch.randn(6, 4)
    found = gradients(model, way, x)
    model.active = False
    expected = gradients(model, "double_backprop", x)
    # Sums in another order; truncation of a 0.2 % step.
    assert relative_error(found, expected) < (1e-12 if way == "recompute" else 1e-2)


def test_double_backprop_is_refused() -> None:
    x = torch.randn(6, 4)
    with pytest.raises(NotDifferentiableError, match="without activation checkpointing"):
        gradients(Checkpointed(active=True), "double_backprop", x)
    with torch.no_grad():  # values alone are right
        prior = AttributionPrior(ExpectedGradients(Checkpointed(active=True)), l2, baselines=x)
        assert float(prior(x)) > 0


def test_other_code_may_use_saved_tensor_hooks_afterwards() -> None:
    x = torch.randn(6, 4)
    gradients(Checkpointed(active=False), "double_backprop", x)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda p: p):
        torch.randn(2, requires_grad=True).square()
    assert len(packed) == 1


@pytest.mark.parametrize("way", ["double_backprop", "recompute", "finite_difference"])
def test_smoothing_refuses_it(way: str) -> None:
    """The backward pass runs the block again out of reach of the smoothing."""
    x, model = torch.randn(6, 4), Checkpointed(active=True)
    with pytest.raises(NotDifferentiableError, match=r"run again with ReLU|no longer holds"):
        gradients(model, way, x, smooth=5.0)
    with pytest.raises(NotDifferentiableError, match="run again with ReLU"):
        smooth_activations(model, beta=5.0)(x)
    gradients(Checkpointed(active=False), way, x, smooth=5.0)
