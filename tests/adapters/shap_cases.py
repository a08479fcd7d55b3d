"""SHAP's explainers of small models, one row for each class, generated from the package's table."""

from collections.abc import Callable
from typing import Any

import numpy as np
import shap
import torch
from torch import Tensor, nn

from captum_priors import differentiable
from captum_priors.adapters.shap import ROWS

FEATURES = 5
NAMES = [f"feature {i}" for i in range(FEATURES)]
TREE = {"first": NAMES[:2], "rest": {"pair": NAMES[2:4], "last": NAMES[4:]}}


def table(n: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((n, FEATURES))


class Additive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale + self.shift).sum(1)


def mlp(outputs: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, outputs)
    )


def model_for(name: str, outputs: int) -> nn.Module:
    if name == "LinearExplainer":
        return nn.Linear(FEATURES, outputs)
    return Additive() if name == "AdditiveExplainer" else mlp(outputs)


def outputs_of(name: str) -> list[int]:
    """SHAP's AdditiveExplainer takes models with one output alone."""
    return [1] if name == "AdditiveExplainer" else [1, 3]


def predictor(model: nn.Module, *, axis: bool = False) -> Callable[[Any], np.ndarray]:
    """The NumPy function that users of SHAP write around their torch model."""
    dtype = getattr(model, "takes", next(model.parameters()).dtype)

    def predict(x: Any) -> np.ndarray:
        with torch.no_grad():
            outputs = model(torch.tensor(np.asarray(x, dtype=float), dtype=dtype)).numpy()
        return outputs[:, 0] if outputs.shape[1:] == (1,) and not axis else outputs

    return predict


def stock(
    name: str, model: nn.Module, background: Any = None, *, axis: bool = False, **options: Any
) -> Any:
    """SHAP's own explainer of a model, whose function may keep an ``axis`` of one output."""
    background = table(7, 0) if background is None else background
    predict, cls = predictor(model, axis=axis), getattr(shap, name)
    if name in ("GradientExplainer", "DeepExplainer"):
        like = next(model.parameters())
        return cls(model, torch.as_tensor(background).to(like))
    if name == "LinearExplainer":
        weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
        pair = (weight[0], bias[0]) if len(bias) == 1 else (weight, bias)
        return cls(pair, background)
    if name in ("PartitionExplainer", "CoalitionExplainer"):
        masker = shap.maskers.Partition(background)
        masker.feature_names = NAMES
        tree = {"partition_tree": TREE} if name == "CoalitionExplainer" else {}
        return cls(predict, masker, **tree, **options)
    if name == "AdditiveExplainer":
        return cls(predict, shap.maskers.Independent(background))
    return cls(predict, background, **options)


def holds_torch(name: str) -> bool:
    return name in ("GradientExplainer", "DeepExplainer")


def adapted(name: str, explainer: Any, model: nn.Module, **options: Any) -> Any:
    return differentiable(explainer, model=None if holds_torch(name) else model, **options)


def data(name: str, x: np.ndarray, model: nn.Module) -> Any:
    """What SHAP's class takes: tensors or arrays."""
    if not holds_torch(name):
        return x
    return torch.as_tensor(x).to(next(model.parameters()))


def fails_in_shap(name: str, outputs: int) -> bool:
    """One output and NumPy from 2.4 on: float() of an array of one element is an error."""
    old = tuple(map(int, np.__version__.split(".")[:2])) < (2, 4)
    return name == "CoalitionExplainer" and outputs == 1 and not old


# Fewer samples than by default, for what evaluates an explainer many times.
QUICK: dict[str, dict[str, Any]] = {
    "GradientExplainer": {"nsamples": 20},
    "SamplingExplainer": {"nsamples": 200, "min_samples_per_feature": 20},
    "PermutationExplainer": {"max_evals": 33},
}

PAIRS = [(name, outputs) for name in ROWS for outputs in outputs_of(name)]
