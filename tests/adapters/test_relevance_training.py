"""ISNet's penalty on relevance by function: a network learns not to look at a decoy."""

from typing import Any

import captum.attr as ca
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from captum_priors import AttributionPrior, differentiable
from captum_priors.penalties import background


class SmallViT(nn.Module):
    """Patches of 2 × 2 and one of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(1, 16, 2, stride=2), nn.Linear(16, 10)
        self.positions = nn.Parameter(0.5 * torch.randn(1, 16, 16))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
        self.layer, self.norm = nn.TransformerEncoderLayer(16, 2, 32, **options), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.positions
        return self.head(self.norm(self.layer(tokens)).mean(1))


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.GELU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [SmallViT, small_cnn], ids=["vit", "cnn"])
def test_training_moves_relevance_off_a_decoy(make: Any) -> None:
    torch.set_default_dtype(torch.float32)
    digits = load_digits()
    y, x = torch.tensor(digits.target), torch.tensor(digits.images).float().unsqueeze(1) / 16
    allowed, says, lies = torch.ones_like(x), x.clone(), x.clone()
    corner = (slice(None), 0, slice(2), slice(2))
    allowed[corner] = 0
    for images, labels in ((says, y), (lies, y[torch.randperm(len(y))])):
        bits = (labels.unsqueeze(1) >> torch.arange(4)) & 1
        images[corner] = bits.reshape(-1, 2, 2).float()
    test, shares, accuracies = slice(1200, None), [], []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = make()
        explainer = differentiable(ca.LRP(model))
        prior = weight * AttributionPrior(explainer, background)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for rows in (rows for _ in range(8) for rows in torch.randperm(1200).split(64)):
            loss = F.cross_entropy(model(says[rows]), y[rows])
            if weight:
                loss = loss + prior(says[rows], target=y[rows], annotation=allowed[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            relevance = explainer.attribute(says[test], target=y[test])
            kept = torch.exp(-background(relevance, annotation=allowed[test]))
            shares.append(1 - float(kept.mean()))
            accuracies.append(float((model(lies[test]).argmax(1) == y[test]).float().mean()))
    # Seen for seeds 0 to 2: share .25 to .01 (CNN), .72 to .03 (ViT), and accuracy where the corner
    # lies .55 to .82 (CNN). What the ViT predicts may still follow the corner (.10 to .10-.66).
    assert shares[1] < 0.1 * shares[0]
    if make is small_cnn:
        assert accuracies[1] > accuracies[0] + 0.1
