"""Smoothness of feature importance over a graph: the graph prior of Erion et al. 2021."""

import torch
from torch import Tensor, nn

from captum_priors._errors import expected_found
from captum_priors._lift import lift_penalty


class GraphLaplacian(nn.Module):
    r"""Penalise features that a graph joins and whose mean absolute attributions differ.

    .. math:: \Omega = \sum_{i<j} W_{ij} (\bar\phi_i - \bar\phi_j)^2 = \bar\phi^\top L \bar\phi,
        \qquad \bar\phi_i = \tfrac1n \sum_\ell |\phi_i^\ell|, \quad L = D - W

    (Erion et al. 2021, graph attribution prior; the sum runs over unordered pairs.) The adjacency
    is a buffer: it moves with ``.to(device)`` and is kept in the ``state_dict``.

    Args:
        adjacency: Symmetric non-negative weights ``(features, features)``, dense or sparse COO.

    Raises:
        ValueError: If the adjacency is not a square symmetric non-negative matrix.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import GraphLaplacian
        >>> path = torch.tensor([[0., 1., 0.], [1., 0., 1.], [0., 1., 0.]])
        >>> phi = torch.tensor([[1., -3., 4.]])
        >>> GraphLaplacian(path)(phi).item()  # (1 - 3)^2 + (3 - 4)^2
        5.0
    """

    edges: Tensor
    weights: Tensor

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        if (
            not isinstance(adjacency, Tensor)
            or adjacency.dim() != 2
            or adjacency.shape[0] != adjacency.shape[1]
        ):
            raise ValueError(
                expected_found(
                    "`adjacency`",
                    "a square matrix (features, features)",
                    str(tuple(adjacency.shape))
                    if isinstance(adjacency, Tensor)
                    else type(adjacency).__name__,
                    "Pass the weight of the edge between every two features.",
                )
            )
        weights = (
            adjacency.to_sparse_coo().coalesce()
            if not adjacency.is_sparse
            else (adjacency.coalesce())
        )
        mirrored = weights.t().coalesce()
        if not (
            torch.equal(weights.indices(), mirrored.indices())
            and torch.allclose(weights.values(), mirrored.values())
            and bool((weights.values() >= 0).all())
        ):
            raise ValueError(
                expected_found(
                    "`adjacency`",
                    "a symmetric matrix without negative or NaN weights",
                    "one that is not",
                    "Symmetrise it, for example with (W + W.T) / 2.",
                )
            )
        self.n_features = adjacency.shape[0]
        once = weights.indices()[0] < weights.indices()[1]
        self.register_buffer("edges", weights.indices()[:, once])
        self.register_buffer("weights", weights.values()[once])

    def forward(self, attributions: Tensor) -> Tensor:
        """Return the penalty of a batch ``(batch, features)``: shape ``()``."""
        penalty: Tensor = lift_penalty(self._penalty)(attributions)
        return penalty

    def _penalty(self, attributions: Tensor) -> Tensor:
        importance = attributions.flatten(1).abs().mean(0)
        if importance.numel() != self.n_features:
            raise ValueError(
                expected_found(
                    "`attributions`",
                    f"{self.n_features} features as in the adjacency",
                    str(importance.numel()),
                    "Slice the attributions to the features of the graph.",
                )
            )
        here, there = importance[self.edges]
        return torch.sum(self.weights.to(importance.dtype) * (here - there).square())

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        return f"features={self.n_features}, edges={self.weights.numel()}"
