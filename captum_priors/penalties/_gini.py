"""Gini coefficient of feature importance: the sparsity prior of Erion et al. 2021."""

import torch
from torch import Tensor

from captum_priors._lift import flat, in_units_of_largest, lift_penalty


@lift_penalty
def gini(attributions: Tensor) -> Tensor:
    r"""Minus the Gini coefficient of the mean absolute attributions of a batch.

    .. math:: -G(\bar\phi) = -\frac{\sum_i (2i - p - 1)\, \bar\phi_{(i)}}{p \sum_i \bar\phi_i},
        \qquad \bar\phi_i = \tfrac1n \sum_\ell |\phi_i^\ell|

    with :math:`\bar\phi_{(1)} \le \dots \le \bar\phi_{(p)}`: between :math:`-(1 - 1/p)` (one
    feature matters) and 0 (all matter equally). A statement about the batch, in
    :math:`O(p \log p)`. Source: Erion et al. 2021, sparse attribution prior, whose printed formula
    is twice this; their code uses :math:`-G`.

    Args:
        attributions: ``(batch, ...)``, every entry a feature, or a tuple of them.

    Returns:
        Shape ``()``.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import gini
        >>> one_matters = torch.eye(4)[:1].repeat(6, 1)
        >>> gini(one_matters).item(), abs(gini(torch.ones(6, 4)).item())
        (-0.75, 0.0)
    """
    importance = in_units_of_largest(flat(attributions).abs().mean(0), 0).sort().values
    p = importance.numel()
    rank = torch.arange(1 - p, p, 2, dtype=importance.dtype, device=importance.device)
    return -(rank * importance).sum() / (p * importance.sum()).clamp_min(1)
