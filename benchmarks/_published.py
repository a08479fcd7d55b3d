"""The published training loop of Erion et al. 2021, written from its description.

A new iterator of a shuffled loader at every step fetches ``batch * k`` references, a Python loop
goes over the k samples, and each is differentiated with ``create_graph``. It takes full batches,
one tensor, and a model with several outputs or one of shape ``(batch, 1)``.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class PublishedLoop:
    """Expected gradients as the authors' package computes them, on the CPU."""

    def __init__(self, background: Tensor, batch: int, k: int) -> None:
        self.batch, self.k = batch, k
        self.loader = DataLoader(
            TensorDataset(background), batch_size=batch * k, shuffle=True, drop_last=True
        )

    def attribute(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Return attributions with their graph."""
        (references,) = next(iter(self.loader))
        references = references.reshape(self.batch, self.k, *x.shape[1:])
        alpha = torch.rand(self.batch, self.k).reshape(self.batch, self.k, *[1] * (x.dim() - 1))
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
