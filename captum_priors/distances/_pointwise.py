"""Distances between attributions compared entry by entry."""

import torch
from torch import Tensor

from captum_priors._lift import cosine_distance, flat, lift_distance


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
    return cosine_distance(flat(attributions), flat(other))


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
    return cosine_distance(_centred(flat(attributions)), _centred(flat(other)))


def _centred(rows: Tensor) -> Tensor:
    """Subtract the mean; what is left of a constant map is rounding, and counts as zero."""
    centred = rows - rows.mean(1, keepdim=True)
    rounding = 4 * torch.finfo(rows.dtype).eps * rows.detach().abs().amax(1, keepdim=True)
    constant = centred.detach().abs().amax(1, keepdim=True) <= rounding
    return torch.where(constant, torch.zeros_like(centred), centred)
