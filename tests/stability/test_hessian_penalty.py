"""The Hessian penalty through the layers of deep networks: certified, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_priors import NotDifferentiableError
from captum_priors.stability import HessianPenalty
from captum_priors.stability._hessian_penalty import _refuse_wrong_third_derivatives
from captum_priors.testing import check_differentiable
from tests.asserts import relative_error


class AsExplainer:
    """Lets the certificate of explainers check the penalty."""

    def __init__(self, prior: HessianPenalty) -> None:
        self.prior = prior.eval()  # the same probes at each call

    def attribute(self, inputs: Tensor, target: Any) -> Tensor:
        return self.prior(inputs, target=target)


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


def certificate(name: str, method: Any, *, raise_exception: bool = True) -> Any:
    model, x = {**CERTIFIED, **REFUSED}[name](), torch.randn(3, 4, 8)
    with sdpa_kernel(SDPBackend.MATH):
        return check_differentiable(
            AsExplainer(HessianPenalty(model, method=method)),
            x,
            parameters=model.named_parameters(),
            target=1,
            raise_exception=raise_exception,
        )


@every_layer
def test_certificate_by_differences(name: str) -> None:
    assert certificate(name, "finite_difference").passed


@every_layer
def test_exact_is_certified_or_refused(name: str) -> None:
    if name in CERTIFIED:
        assert certificate(name, "exact").passed
    else:
        with pytest.raises(NotDifferentiableError, match="third derivatives are right"):
            certificate(name, "exact")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_wrong_in_torch(name: str, monkeypatch: Any) -> None:
    """Should this fail, torch has been mended, and the refusal may go."""
    refuse = _refuse_wrong_third_derivatives
    monkeypatch.setattr(f"{refuse.__module__}.{refuse.__name__}", lambda gradients: None)
    assert certificate(name, "exact", raise_exception=False).error > 0.1


def test_instance_norm_by_stored_statistics_is_certified() -> None:
    model = channels(nn.InstanceNorm1d(4, track_running_stats=True))
    found = check_differentiable(
        AsExplainer(HessianPenalty(model)),
        torch.randn(3, 4, 8),
        parameters=model.named_parameters(),
        target=1,
    )
    assert found.passed


def test_first_derivatives_alone_on_fused_attention() -> None:
    """A stock encoder in single precision, beside twice differentiated math attention."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(64, 2)).float()
    x = torch.randn(8, 4, 16, dtype=torch.float32)
    with pytest.raises(NotDifferentiableError, match="scaled_dot_product"):
        HessianPenalty(model, method="finite_difference")(x, target=1)

    def gradients(way: Any) -> list[Tensor]:
        prior = HessianPenalty(model, method="finite_difference", differentiation=way).eval()
        parameters = list(model.parameters())
        found = torch.autograd.grad(prior(x, target=1), parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
        ]

    fused = gradients("finite_difference")
    with sdpa_kernel(SDPBackend.MATH):
        twice = gradients("double_backprop")
    # Differences of differences in single precision.
    assert relative_error(fused, twice) < 2e-2
