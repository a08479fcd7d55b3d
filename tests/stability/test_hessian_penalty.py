"""The Hessian penalty through the layers of deep networks: certified, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_priors import NotDifferentiableError
from captum_priors.stability import HessianPenalty
from captum_priors.testing import GradientReport, check_gradient
from tests.asserts import gradients_of, relative_error
from tests.cases import Recurrent


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, x, x, need_weights=False)[0].flatten(1))


def dense(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 5), layer, nn.Tanh(), nn.Linear(5, 2))


def channels(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), layer, nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))


CERTIFIED: dict[str, Callable[[], nn.Module]] = {
    **{
        cls.__name__: (lambda cls=cls: dense(cls()))
        for cls in (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.Sigmoid, nn.Softplus)
    },
    "Softmax": lambda: dense(nn.Softmax(1)),
    "BatchNorm": lambda: channels(nn.BatchNorm1d(8)),
    "GroupNorm": lambda: channels(nn.GroupNorm(2, 8)),
    "InstanceNorm by stored statistics": lambda: channels(
        nn.InstanceNorm1d(8, track_running_stats=True)
    ),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "Attention": Attention,
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: dense(nn.LayerNorm(5)),
    "InstanceNorm": lambda: channels(nn.InstanceNorm1d(8, affine=True)),
}
every_layer = pytest.mark.parametrize("name", [*CERTIFIED, *REFUSED])


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The exact penalty in plain torch, for one vector of ones."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x)[:, 1].sum(), x, create_graph=True)
    (product,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    return product.square().sum()


def certificate(name: str, curvature: Any = None, **options: Any) -> GradientReport:
    model, x = {**CERTIFIED, **REFUSED}[name]().eval(), torch.randn(3, 8, 4)
    if curvature is None:
        return check_gradient(lambda: plain(model, x), model, **options)
    penalty = HessianPenalty(model, curvature=curvature).eval()  # the same probes at each call
    return check_gradient(lambda: penalty(x, target=1), model, **options)


@every_layer
def test_certificate_by_differences(name: str) -> None:
    assert certificate(name, "difference").passed


@every_layer
def test_exact_is_certified_or_refused(name: str) -> None:
    if name in CERTIFIED:
        assert certificate(name, "exact").passed
    else:
        with pytest.raises(NotDifferentiableError, match="HessianPenalty curvature='difference'"):
            certificate(name, "exact")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_wrong_in_torch(name: str) -> None:
    """Should this fail, torch has been mended, and the refusal may go."""
    assert certificate("GELU").passed
    assert certificate(name, raise_exception=False).faults


def test_first_derivatives_alone_on_a_stock_encoder() -> None:
    """In single precision, beside twice differentiated attention in plain matrix products."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(64, 2)).float()
    x = torch.randn(8, 4, 16, dtype=torch.float32)
    found, expected = (
        gradients_of(HessianPenalty(model, curvature=c).eval()(x, target=1), [*model.parameters()])
        for c in ("difference_twice", "difference")
    )
    # Differences of differences in single precision.
    assert relative_error(found, expected) < 2e-2
