"""NHANES I, 10-year survival: data, splits and training, as in Erion et al. 2021."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _reproduction import roc_auc
from torch import Tensor, nn

from captum_priors import ExpectedGradients
from captum_priors.penalties import gini

YEARS, ROWS = 10, 100
Term = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """Standardised rows and labels: 100 to train on, 100 to choose with, the rest to test."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """Features, and who died within ten years; people lost from view before that are left out."""
    x, y = (
        np.genfromtxt(folder / f"NHANESI_subset_{part}.csv", delimiter=",", skip_header=1)[:, 1:]
        for part in "Xy"
    )
    # Time to death, or, negative, to the last time that someone was known to be alive.
    years = y[:, 0]
    died = (years > 0) & (years < YEARS)
    known = died | (np.abs(years) >= YEARS)
    return torch.from_numpy(x[known]).float(), torch.from_numpy(died[known]).float()


def split(data: tuple[Tensor, Tensor], seed: int, noise_columns: int = 0) -> Split:
    """Random split; means and scales from the training rows, which fill gaps, too."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    if noise_columns:
        x = torch.cat((x, torch.randn(len(x), noise_columns, generator=generator)), 1)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    mean = x[:ROWS].nanmean(0)
    x = torch.where(x.isnan(), mean, x) - mean
    x = x / x[:ROWS].std(0).clamp_min(1e-6)
    parts = slice(0, ROWS), slice(ROWS, 2 * ROWS), slice(2 * ROWS, None)
    return Split(*((x[part], y[part]) for part in parts))


def network(n_features: int, widths: tuple[int, ...], *, bias: bool = True) -> nn.Sequential:
    """Fully connected, with ReLU and one logit."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip((n_features, *widths), (*widths, 1), strict=True):
        layers += [nn.Linear(n_in, n_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit(model: nn.Module, term: Term | None, data: Split, epochs: int, rate: float = 1e-3) -> float:
    """Adam on the whole training set; keeps the best epoch on validation, returns its AUC."""
    (x, y), (x_validation, y_validation) = data.train, data.validation
    optimizer = torch.optim.Adam(model.parameters(), rate)
    best, kept = -1.0, {}
    for _ in range(epochs):
        loss = F.binary_cross_entropy_with_logits(model(x)[:, 0], y)
        if term is not None:
            loss = loss + term(x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            score = roc_auc(model(x_validation), y_validation)
        if score > best:
            best, kept = score, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


def evaluate(model: nn.Module, data: Split) -> dict[str, float]:
    """Test AUC, and Gini coefficient of the expected gradients of 200 test rows."""
    x, y = data.test
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        attributions = ExpectedGradients(model).attribute(
            x[:200], data.train[0], n_samples=20, target=0, generator=generator
        )
        return {"ROC-AUC": roc_auc(model(x), y), "Gini": -gini(attributions).item()}
