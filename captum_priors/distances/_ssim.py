"""Structural similarity of attribution maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors._errors import expected_found
from captum_priors._lift import lift_distance

_WINDOW, _SIGMA = 7, 1.5
_K1, _K2 = 0.01, 0.03


@lift_distance
def ssim(attributions: Tensor, other: Tensor) -> Tensor:
    r"""One minus the structural similarity of two maps, averaged over positions.

    .. math:: \mathrm{SSIM} = \frac{(2\mu_a\mu_b + c_1)(2\sigma_{ab} + c_2)}
        {(\mu_a^2 + \mu_b^2 + c_1)(\sigma_a^2 + \sigma_b^2 + c_2)}

    (Wang et al. 2004, with a 7 × 7 Gaussian window, σ = 1.5, shrunk to smaller maps.) Channels are
    summed first, and :math:`c_1, c_2` scale with the joint range of the pair, so that
    the distance does not depend on the scale of the attributions.

    Args:
        attributions: ``(batch, channels, height, width)`` or ``(batch, height, width)``, or a tuple
            of them.
        other: The same shapes.

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
    if attributions.dim() not in (3, 4):
        raise ValueError(
            expected_found(
                "`attributions`",
                "(batch, channels, height, width) or (batch, height, width)",
                f"shape {tuple(attributions.shape)}",
                "Use mse, cosine or pearson for attributions that are not maps.",
            )
        )
    a, b = (
        t.sum(1, keepdim=True) if t.dim() == 4 else t.unsqueeze(1) for t in (attributions, other)
    )
    both = torch.cat([a, b], 1).flatten(1)
    low, high = both.amin(1), both.amax(1)
    # In units of the joint range, or of the size of two equal constants; 1 for two zeros.
    scale = torch.where(high > low, high - low, high.abs())
    counts = scale > torch.finfo(a.dtype).tiny ** 0.5
    scale = torch.where(counts, scale, 1).reshape(-1, 1, 1, 1)
    centre = (both.mean(1).reshape(-1, 1, 1, 1) / scale).detach()
    a, b = a / scale, b / scale
    window = _window(a)
    mean_a, mean_b = F.conv2d(a, window), F.conv2d(b, window)
    # Second moments about the joint mean: about zero they cancel for maps with a large offset.
    off_a, off_b = a - centre, b - centre
    mean_off_a, mean_off_b = mean_a - centre, mean_b - centre
    var_a = F.conv2d(off_a.square(), window) - mean_off_a.square()
    var_b = F.conv2d(off_b.square(), window) - mean_off_b.square()
    covariance = F.conv2d(off_a * off_b, window) - mean_off_a * mean_off_b
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return 1 - (luminance * structure).flatten(1).mean(1)


def _window(maps: Tensor) -> Tensor:
    sides = []
    for length in maps.shape[-2:]:
        size = min(_WINDOW, length - (length + 1) % 2)
        at = torch.arange(size, dtype=maps.dtype, device=maps.device) - (size - 1) / 2
        weights = torch.exp(-at.square() / (2 * _SIGMA**2))
        sides.append(weights / weights.sum())
    return torch.outer(*sides).reshape(1, 1, *map(len, sides))
