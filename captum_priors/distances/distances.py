"""The distances, each a formula and its code."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors._checks import count, positive
from captum_priors._errors import refusal
from captum_priors.penalties.maths import (
    Axes,
    axes_of,
    cosine_distance,
    in_units_of_largest,
    lift_distance,
    safe_norm,
    sum_channels,
)

_SIGMA, _K1, _K2 = 1.5, 0.01, 0.03


@lift_distance
def mse(attributions: Tensor, other: Tensor) -> Tensor:
    r"""Mean squared difference, :math:`\tfrac1p \sum_i (a_i - b_i)^2`: ``(batch,)``.

    Example:
        >>> import torch
        >>> from captum_priors.distances import mse
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    return (attributions - other).square().flatten(1).mean(1)


@lift_distance
def cosine(attributions: Tensor, other: Tensor) -> Tensor:
    r"""Cosine distance, :math:`1 - \langle a, b\rangle / (\lVert a\rVert \lVert b\rVert)`.

    Returns:
        Shape ``(batch,)``, in [0, 2]; 0 for two zero maps, 1 for one.

    Example:
        >>> import torch
        >>> from captum_priors.distances import cosine
        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item()
        1.0
    """
    return cosine_distance(attributions.flatten(1), other.flatten(1))


@lift_distance
def pearson(attributions: Tensor, other: Tensor) -> Tensor:
    r"""One minus the correlation of the entries: cosine distance of the centred maps.

    Returns:
        Shape ``(batch,)``, in [0, 2]; 0 for two constant maps, 1 for one.

    Example:
        >>> import torch
        >>> from captum_priors.distances import pearson
        >>> a = torch.randn(2, 9)
        >>> torch.allclose(pearson(a, 3 * a + 1), torch.zeros(2), atol=1e-5)
        True
    """
    return cosine_distance(_centred(attributions.flatten(1)), _centred(other.flatten(1)))


def _centred(rows: Tensor) -> Tensor:
    """Subtract the mean; what is left of a constant map is rounding, and counts as zero."""
    centred = rows - rows.mean(1, keepdim=True)
    rounding = 4 * torch.finfo(rows.dtype).eps * rows.detach().abs().amax(1, keepdim=True)
    constant = centred.detach().abs().amax(1, keepdim=True) <= rounding
    return torch.where(constant, 0, centred)


@lift_distance
def soft_spearman(attributions: Tensor, other: Tensor, *, strength: float = 10.0) -> Tensor:
    r"""One minus the rank correlation of the entries, with soft ranks, which have a gradient.

    .. math:: 1 - \rho(r(a), r(b)), \qquad
        r_i(a) = \tfrac12 + \sum_j \sigma\left(s\,\frac{a_i - a_j}{\mathrm{std}(a)}\right)

    with the correlation :math:`\rho` of :func:`pearson` and the logistic :math:`\sigma`. As the
    strength :math:`s` grows, :math:`r` tends to the ranks, equal entries sharing the mean of
    theirs, and the distance to one minus Spearman's correlation; as it falls, to :func:`pearson`.
    Each of the :math:`p` entries is compared with each: time and memory grow with :math:`p^2`. The
    soft ranks of Blondel et al. 2020, projections found by isotonic regression, need
    :math:`p \log p`; these are one formula, smooth everywhere.

    Args:
        attributions: Shape ``(batch, ...)``, or a tuple of them.
        other: The same shapes.
        strength: :math:`s`. Entries nearer than about ``1 / strength`` standard deviations are
            ranked softly, and beyond a few of these a pair has no gradient left.

    Returns:
        Shape ``(batch,)``, in [0, 2]; 0 for two constant maps, 1 for one.

    Example:
        >>> import torch
        >>> from captum_priors.distances import soft_spearman
        >>> a = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> soft_spearman(a, a.exp(), strength=1e4).item()  # the same order
        0.0
    """
    positive("strength", strength)
    ranks = (_soft_ranks(side.flatten(1), strength) for side in (attributions, other))
    return cosine_distance(*ranks)


def _soft_ranks(rows: Tensor, strength: float) -> Tensor:
    """Twice the soft ranks, about their mean: the logistic is (1 + tanh(z / 2)) / 2."""
    rows = in_units_of_largest(_centred(rows), 1)
    spread = safe_norm(rows).unsqueeze(1) / rows.shape[1] ** 0.5
    rows = strength / 2 * rows / torch.where(spread > 0, spread, 1)
    return torch.tanh(rows.unsqueeze(2) - rows.unsqueeze(1)).sum(2)


@lift_distance
def ssim(attributions: Tensor, other: Tensor, *, dim: Axes = None, window: int = 7) -> Tensor:
    r"""One minus the structural similarity of two maps, averaged over positions.

    .. math:: \mathrm{SSIM} = \frac{(2\mu_a\mu_b + c_1)(2\sigma_{ab} + c_2)}
        {(\mu_a^2 + \mu_b^2 + c_1)(\sigma_a^2 + \sigma_b^2 + c_2)}

    (Wang et al. 2004, with a Gaussian window, σ = 1.5; theirs is 11 × 11.) Channels are summed
    first, and :math:`c_1, c_2` scale with the joint range of the pair, so that the distance does
    not depend on the scale of the attributions.

    Args:
        attributions: ``(batch, channels, height, width)``, or any other shape with ``dim``; or a
            tuple of them.
        other: The same shapes.
        dim: The two axes of a map; all others but the first are channels. ``(1, 2)`` for maps
            ``(batch, height, width)``.
        window: Side of the window: the largest odd number up to it that fits the map.

    Returns:
        Shape ``(batch,)``, in [0, 2].

    Raises:
        ValueError: If the attributions are not maps.

    Example:
        >>> import torch
        >>> from captum_priors.distances import ssim
        >>> a = torch.randn(2, 1, 9, 9)
        >>> torch.allclose(ssim(a, a), torch.zeros(2), atol=1e-6)
        True
    """
    count("window", window)
    axes = axes_of(attributions, dim)
    if len(axes) != 2:
        raise refusal(
            ValueError,
            "`attributions`",
            "maps with two axes, (batch, channels, height, width), or dim=(...) with both",
            f"shape {tuple(attributions.shape)}" + ("" if dim is None else f", dim={dim}"),
            "Use mse, cosine or pearson for attributions that are not maps.",
        )
    a, b = (sum_channels(t, axes).unsqueeze(1) for t in (attributions, other))
    both = torch.cat([a, b], 1).flatten(1)
    low, high = both.amin(1), both.amax(1)
    # In units of the joint range, or of the size of two equal constants; 1 for two zeros.
    scale = torch.where(high > low, high - low, high.abs())
    scale = torch.where(scale > torch.finfo(a.dtype).tiny ** 0.5, scale, 1).reshape(-1, 1, 1, 1)
    centre = (both.mean(1).reshape(-1, 1, 1, 1) / scale).detach()
    # Moments about the joint mean: about zero they cancel for maps with a large offset.
    a, b = a / scale - centre, b / scale - centre
    moments = F.conv2d(torch.cat([a, b, a * a, b * b, a * b]), _gaussian(a, window))
    mean_a, mean_b, square_a, square_b, product = moments.chunk(5)
    var_a, var_b = square_a - mean_a.square(), square_b - mean_b.square()
    covariance = product - mean_a * mean_b
    mean_a, mean_b = mean_a + centre, mean_b + centre
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return 1 - (luminance * structure).flatten(1).mean(1)


def _gaussian(maps: Tensor, window: int) -> Tensor:
    sides = []
    for length in maps.shape[-2:]:
        size = min(window, length)
        size -= (size + 1) % 2  # odd, so that it has a middle
        at = torch.arange(size, dtype=maps.dtype, device=maps.device) - (size - 1) / 2
        weights = torch.exp(-at.square() / (2 * _SIGMA**2))
        sides.append(weights / weights.sum())
    return torch.outer(*sides).reshape(1, 1, *map(len, sides))


class SoftTopK(nn.Module):
    r"""One minus the overlap of the ``k`` largest absolute attributions of two maps.

    Feature :math:`i` belongs to the top to the degree
    :math:`m_i = \sigma\left((|\phi_i| - t_k) / (T\, s)\right)`, where :math:`t_k` lies half-way
    between the k-th and the next largest and :math:`s` is the mean absolute attribution; the
    distance is :math:`1 - \langle m^a, m^b\rangle / (\lVert m^a\rVert \lVert m^b\rVert)`. For small
    :math:`T` it tends to one minus the top-k intersection of Ghorbani et al. 2019, which is what
    metrics report and has no gradient. Every entry is a feature.

    Args:
        k: Number of top features, fewer than there are.
        temperature: :math:`T`, the softness of membership relative to the mean attribution.

    Example:
        >>> import torch
        >>> from captum_priors.distances import SoftTopK
        >>> a, b = torch.tensor([[9.0, 8.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.0, 8.0, 1.0]])
        >>> round(SoftTopK(2, temperature=0.01)(a, b).item(), 4)
        0.5
    """

    def __init__(self, k: int, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.k, self.temperature = count("k", k), positive("temperature", temperature)

    def forward(self, attributions: Tensor, other: Tensor) -> Tensor:
        """Return the distance of each example: shape ``(batch,)``."""
        return lift_distance(
            lambda a, b: cosine_distance(self._membership(a), self._membership(b))
        )(attributions, other)

    def _membership(self, attributions: Tensor) -> Tensor:
        size = in_units_of_largest(attributions.abs().flatten(1), 1)
        count("k", self.k, most=size.shape[1] - 1)
        top = size.topk(self.k + 1, dim=1).values
        threshold = top[:, -2:].mean(1, keepdim=True)
        scale = size.mean(1, keepdim=True).clamp_min(1 / size.shape[1])
        return torch.sigmoid((size - threshold) / (self.temperature * scale))

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return f"k={self.k}, temperature={self.temperature}"
