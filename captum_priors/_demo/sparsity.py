"""Tumours, from few patients: fewer measurements carry the prediction."""

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from captum_priors._demo.base import COLOURS, NAMES, Figures, fit
from captum_priors.attr import ExpectedGradients
from captum_priors.metrics import gini
from captum_priors.priors import SparsityPrior

WEIGHT, RATE, N_TRAIN = 0.1, 6e-3, 60
DATA = f"scikit-learn breast cancer; {N_TRAIN} training and 509 test patients"
PRIOR = f"{WEIGHT} * SparsityPrior(model, baselines=x_train)"
EPOCHS, SEEDS = 80, 3
CARRY, AREA = "measurements that carry 90 %", "area under the ROC curve"


def load(_: Path) -> Any:
    """Return measurements, and their names, with the labels."""
    return load_breast_cancer()


def run(data: Any, seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Tensor]:
    """Train on a split of the seed's; measure on all other patients."""
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(data.data).float()[order]
    y = torch.from_numpy(1 - data.target).long()[order]  # 1: malignant
    x = (x - x[:N_TRAIN].mean(0)) / x[:N_TRAIN].std(0)
    train, test, labels = x[:N_TRAIN], x[N_TRAIN:], y[N_TRAIN:]
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
    prior = WEIGHT * SparsityPrior(model, baselines=train)
    penalty = (lambda x, y: prior(x, target=y)) if with_prior else None
    fit(model, (train, y[:N_TRAIN]), epochs, RATE, penalty, batch_size=20)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        maps = ExpectedGradients(model).attribute(test, train, 40, target=1, generator=draws)
        scores = model(test).softmax(1)[:, 1]
    shares = maps.abs().mean(0) / maps.abs().mean(0).sum()
    largest = shares.sort(descending=True).values
    figures = {
        AREA: float(roc_auc_score(labels, scores)),
        "sparsity (Gini)": gini(shares[None]).item(),
        CARRY: int((largest.cumsum(0) < 0.9).sum()) + 1,
    }
    return figures, shares


def draw(data: Any, shown: list[Tensor], means: list[Figures]) -> Figure:
    """Draw what share of the importance each measurement has."""
    order = shown[1].argsort()
    figure, axes = plt.subplots(
        *(1, 2), sharex=True, sharey=True, figsize=(10, 6.6), layout="constrained"
    )
    parts = zip(axes, NAMES, COLOURS, shown, means, strict=True)
    for axis, name, colour, shares, mean in parts:
        axis.barh(data.feature_names[order.numpy()], shares[order].numpy(), color=colour)
        title = f"{name}: {mean[CARRY]:.0f} of 30 carry 90 %\n{AREA} {mean[AREA]:.3f}"
        axis.set(title=title, xlabel="share of importance")
    return figure
