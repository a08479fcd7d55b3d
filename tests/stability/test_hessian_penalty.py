"""The Hessian penalty through the layers of deep networks: certified, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_priors import NotDifferentiableError
from captum_priors.stability import HessianPenalty
from captum_priors.testing import check_differentiable
from tests.asserts import relative_error


class AsExplainer:
    """Lets the certificate of explainers check the penalty."""

    def __init__(self, prior: HessianPenalty) -> None:
        self.prior = prior.eval()  # the same probes at each call

    def attribute(self, inputs: Tensor, target: Any) -> Tensor:
        return self.prior(inputs, target=target)


class Plain:
    """The exact penalty in plain torch, for one vector of ones."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def attribute(self, inputs: Tensor, target: Any) -> Tensor:
        x = inputs.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.model(x)[:, target].sum(), x, create_graph=True)
        (product,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        return product.square().sum()


class Recurrent(nn.Module):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.body, self.head = cls(8, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, x, x, need_weights=False)[0].flatten(1))


def dense(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 5), layer, nn.Tanh(), nn.Linear(5, 2))


def channels(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), layer, nn.Tanh(), nn.Flatten(), nn.Linear(24, 2))


CERTIFIED: dict[str, Callable[[], nn.Module]] = {
    **{
        cls.__name__: (lambda cls=cls: dense(cls()))
        for cls in (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.Sigmoid, nn.Softplus)
    },
    "Softmax": lambda: dense(nn.Softmax(1)),
    "BatchNorm": lambda: channels(nn.BatchNorm1d(4)),
    "GroupNorm": lambda: channels(nn.GroupNorm(2, 4)),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "Attention": Attention,
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: dense(nn.LayerNorm(5)),
    "InstanceNorm": lambda: channels(nn.InstanceNorm1d(4, affine=True)),
}
every_layer = pytest.mark.parametrize("name", [*CERTIFIED, *REFUSED])


def certificate(name: str, make: Callable[[nn.Module], Any], **options: Any) -> Any:
    model, x = {**CERTIFIED, **REFUSED}[name]().eval(), torch.randn(3, 4, 8)
    parameters = model.named_parameters()
    return check_differentiable(make(model), x, parameters=parameters, target=1, **options)


def exact(model: nn.Module) -> AsExplainer:
    return AsExplainer(HessianPenalty(model))


@every_layer
def test_certificate_by_differences(name: str) -> None:
    assert certificate(
        name, lambda model: AsExplainer(HessianPenalty(model, curvature="difference"))
    ).passed


@every_layer
def test_exact_is_certified_or_refused(name: str) -> None:
    if name in CERTIFIED:
        assert certificate(name, exact).passed
    else:
        with pytest.raises(NotDifferentiableError, match="takes curvature='difference'"):
            certificate(name, exact)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_wrong_in_torch(name: str) -> None:
    """Should this fail, torch has been mended, and the refusal may go."""
    assert certificate("GELU", Plain).passed
    assert certificate(name, Plain, raise_exception=False).error > 0.1


def test_instance_norm_by_stored_statistics_is_certified() -> None:
    model = channels(nn.InstanceNorm1d(4, track_running_stats=True)).eval()
    found = check_differentiable(
        AsExplainer(HessianPenalty(model)),
        torch.randn(3, 4, 8),
        parameters=model.named_parameters(),
        target=1,
    )
    assert found.passed


def test_first_derivatives_alone_on_a_stock_encoder() -> None:
    """In single precision, beside twice differentiated attention in plain matrix products."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(64, 2)).float()
    x = torch.randn(8, 4, 16, dtype=torch.float32)

    def gradients(curvature: Any) -> list[Tensor]:
        prior = HessianPenalty(model, curvature=curvature).eval()
        parameters = list(model.parameters())
        found = torch.autograd.grad(prior(x, target=1), parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
        ]

    # Differences of differences in single precision.
    assert relative_error(gradients("difference_twice"), gradients("difference")) < 2e-2
