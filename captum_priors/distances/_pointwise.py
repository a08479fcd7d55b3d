"""Distances between attributions compared entry by entry."""

import torch
from torch import Tensor

from captum_priors._lift import flat, lift_distance, safe_norm


@lift_distance
def mse(attributions: Tensor, other: Tensor) -> Tensor:
    r"""Mean squared difference, :math:`\tfrac1p \sum_i (a_i - b_i)^2`.

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.
        other: The same shapes.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> import torch
        >>> from captum_priors.distances import mse
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    return flat(attributions - other).square().mean(1)


@lift_distance
def cosine(attributions: Tensor, other: Tensor) -> Tensor:
    r"""Cosine distance, :math:`1 - \langle a, b\rangle / (\lVert a\rVert \lVert b\rVert)`.

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.
        other: The same shapes.

    Returns:
        Shape ``(batch,)``, in [0, 2]; 0 for two zero maps, 1 for one.

    Example:
        >>> import torch
        >>> from captum_priors.distances import cosine
        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item()
        1.0
    """
    return _angle(flat(attributions), flat(other))


@lift_distance
def pearson(attributions: Tensor, other: Tensor) -> Tensor:
    r"""One minus the correlation of the entries: cosine distance of the centred maps.

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.
        other: The same shapes.

    Returns:
        Shape ``(batch,)``, in [0, 2].

    Example:
        >>> import torch
        >>> from captum_priors.distances import pearson
        >>> a = torch.randn(2, 9)
        >>> torch.allclose(pearson(a, 3 * a + 1), torch.zeros(2), atol=1e-5)
        True
    """
    left, right = flat(attributions), flat(other)
    return _angle(left - left.mean(1, keepdim=True), right - right.mean(1, keepdim=True))


def _angle(left: Tensor, right: Tensor) -> Tensor:
    """``|u - v|^2 / 2`` for unit vectors: no cancellation for nearly equal maps, unlike 1 - cos."""
    return (_unit(left) - _unit(right)).square().sum(1) / 2 + _one_is_zero(left, right)


def _unit(rows: Tensor) -> Tensor:
    tiny = torch.finfo(rows.dtype).tiny ** 0.5
    return rows / safe_norm(rows).clamp_min(tiny).unsqueeze(1)


def _one_is_zero(left: Tensor, right: Tensor) -> Tensor:
    """Add the half that a missing unit vector leaves out."""
    return ((left == 0).all(1) != (right == 0).all(1)).to(left.dtype) / 2
