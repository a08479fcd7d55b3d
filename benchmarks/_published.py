"""The published training loop of Erion et al. 2021, written from its description, or its authors'.

A new iterator of a shuffled loader at every step fetches ``batch * k`` references, a Python loop
goes over the k samples, and each is differentiated with ``create_graph``. It takes full batches,
one tensor, and a model with several outputs or one of shape ``(batch, 1)``.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Loop(Protocol):
    """Either of them."""

    def attribute(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Return attributions with their graph."""
        ...


MakeLoop = Callable[[Tensor, int, int], Loop]
"""From background, rows of a batch and samples for each."""


class PublishedLoop:
    """Expected gradients as the authors' package computes them."""

    def __init__(self, background: Tensor, batch: int, k: int) -> None:
        self.batch, self.k = batch, k
        self.loader = DataLoader(
            TensorDataset(background), batch_size=batch * k, shuffle=True, drop_last=True
        )

    def attribute(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Return attributions with their graph."""
        (references,) = next(iter(self.loader))
        references = references.reshape(self.batch, self.k, *x.shape[1:]).to(x.device)
        alpha = torch.rand(self.batch, self.k).to(x.device)
        alpha = alpha.reshape(self.batch, self.k, *[1] * (x.dim() - 1))
        points = alpha * x.unsqueeze(1) + (1 - alpha) * references
        displacement = x.unsqueeze(1) - references
        points.requires_grad_()
        gradients = torch.zeros_like(points)
        for i in range(self.k):
            points_i = points[:, i]
            output = model(points_i)
            if output.shape[1] > 1:
                output = output.gather(1, target.unsqueeze(1))
            (gradient,) = torch.autograd.grad(
                output, points_i, torch.ones_like(output), create_graph=True
            )
            gradients[:, i] = gradient
        return (displacement * gradients).mean(1)


class AuthorsLoop:
    """The same by the code of suinleelab/attributionpriors, as it is in a folder."""

    def __init__(self, background: Tensor, batch: int, k: int, *, code: Any) -> None:
        self.code = code
        self.explainer = code.AttributionPriorExplainer(TensorDataset(background), batch, k=k)

    def attribute(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Return attributions with their graph."""
        self.code.DEFAULT_DEVICE = x.device  # theirs is a GPU wherever there is one
        attributions: Tensor = self.explainer.shap_values(model, x, target)
        return attributions


def add_option(arguments: argparse.ArgumentParser) -> None:
    """Add ``--authors-code``."""
    arguments.add_argument(
        "--authors-code",
        type=Path,
        help="folder of suinleelab/attributionpriors, whose loop then is the published one",
    )


def loop_from(folder: Path | None) -> MakeLoop:
    """Return the authors' loop, or without a folder the one that is written here."""
    if folder is None:
        return PublishedLoop
    path = folder / "attributionpriors" / "pytorch_ops.py"
    if not path.exists():
        raise SystemExit(f"--authors-code: expected DIR/attributionpriors/{path.name} in {folder}.")
    spec: Any = importlib.util.spec_from_file_location("authors_code", path)
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return functools.partial(AuthorsLoop, code=code)
