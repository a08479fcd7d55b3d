"""A stock transformer encoder: fused attention, LayerNorm, dropout, in train mode."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_priors import AttributionPrior, ExpectedGradients
from captum_priors.penalties import total_variation
from tests.asserts import draw_alike, relative_error


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 4, dim_feedforward=32, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def prior_of(model: nn.Module, way: str, x: Tensor) -> AttributionPrior:
    explainer = ExpectedGradients(model, differentiation=way)
    smooth_in_time = partial(total_variation, dim=1)
    return AttributionPrior(explainer, smooth_in_time, baselines=x, n_samples=1)


WAYS = ("finite_difference", "double_backprop")


def batch() -> tuple[Tensor, Tensor]:
    """Which half of the sequence has the larger first feature."""
    x = torch.randn(64, 8, 16, dtype=torch.float32)
    y = (x[:, :4, 0].mean(1) > x[:, 4:, 0].mean(1)).long()
    return x, y


def test_finite_difference_agrees_with_the_math_kernel_in_float32() -> None:
    model, (x, y) = Classifier().float(), batch()
    parameters = list(model.parameters())
    prior, exact_prior = (prior_of(model, way, x) for way in WAYS)
    draw_alike(prior, exact_prior)
    found = torch.autograd.grad(prior(x, target=y), parameters, allow_unused=True)
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.autograd.grad(exact_prior(x, target=y), parameters, allow_unused=True)
    pairs = [(f, e) for f, e in zip(found, exact, strict=True) if e is not None]
    assert len(pairs) == len(parameters) - 2  # the last two biases only shift the output
    assert relative_error([f for f, _ in pairs], [e for _, e in pairs]) < 1e-2


def test_trains() -> None:
    """Beside training without the prior: fits as well, with smoother attributions."""
    x, y = batch()
    losses, penalties = [], []
    for weight in (0.0, 0.04):
        torch.manual_seed(0)
        model = Classifier().float()
        prior = prior_of(model, "finite_difference", x)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(60):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            (loss + weight * prior(x, target=y)).backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model.eval()(x), y)))
            penalties.append(float(prior(x, target=y)))
    assert max(losses) < 0.35  # 0.69 before training
    assert penalties[1] < 0.9 * penalties[0]
