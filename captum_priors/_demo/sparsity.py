"""Tumours, from few patients: fewer measurements carry the prediction."""

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from captum_priors._demo.base import GREEN, NAMES, RED, Demo, Figures, bare, fit
from captum_priors.attr import ExpectedGradients
from captum_priors.metrics import gini
from captum_priors.priors import SparsityPrior

WEIGHT, RATE, N_TRAIN = 0.1, 6e-3, 60


def run(seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Any]:
    """Train on a split of the seed's; measure on all other patients."""
    columns, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(columns).float()[order]
    y = torch.from_numpy(1 - labels).long()[order]  # 1: malignant
    x = (x - x[:N_TRAIN].mean(0)) / x[:N_TRAIN].std(0)
    train, test = (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
    prior = WEIGHT * SparsityPrior(model, baselines=train[0])

    def penalty(x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = prior(x, target=y)
        return value

    fit(model, train, epochs, RATE, penalty if with_prior else None, batch_size=20)
    with torch.no_grad():
        maps = ExpectedGradients(model).attribute(
            test[0],
            train[0],
            n_samples=40,
            target=1,
            generator=torch.Generator().manual_seed(seed),
        )
        scores = model(test[0]).softmax(1)[:, 1]
    importance = maps.abs().mean(0)
    shares = importance / importance.sum()
    largest = shares.sort(descending=True).values
    figures = {
        "area under the ROC curve": float(roc_auc_score(test[1], scores)),
        "sparsity (Gini)": gini(importance[None]).item(),
        "measurements that carry 90 %": int((largest.cumsum(0) < 0.9).sum()) + 1,
    }
    return figures, shares


def draw(shown: dict[str, Any], means: dict[str, Figures]) -> Figure:
    """Draw what share of the importance each measurement has."""
    names = load_breast_cancer().feature_names
    order = shown[NAMES[1]].argsort()
    figure, axes = plt.subplots(1, 2, sharex=True, figsize=(10, 6.6), layout="constrained")
    for axis, name, colour in zip(axes, NAMES, (RED, GREEN), strict=True):
        axis.barh(range(30), shown[name][order].numpy(), color=colour)
        n, auc = (
            means[name]["measurements that carry 90 %"],
            means[name]["area under the ROC curve"],
        )
        axis.set_title(f"{name}: {n:.0f} of 30 carry 90 %\narea under the ROC curve {auc:.3f}")
        axis.set(yticks=[], xlabel="share of importance")
        bare(axis)
    axes[0].set_yticks(range(30), [names[i] for i in order], fontsize=9)
    return figure


def demo(_: Path) -> Demo:
    """Return the demo."""
    return Demo(
        data=f"scikit-learn breast cancer; {N_TRAIN} training and 509 test patients",
        prior=f"{WEIGHT} * SparsityPrior(model, baselines=x_train)",
        epochs=80,
        run=run,
        draw=draw,
    )
