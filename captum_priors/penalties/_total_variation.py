"""Total variation of attribution maps: the pixel prior of Erion et al. 2021."""

import torch
from torch import Tensor

from captum_priors._checks import check_count
from captum_priors._errors import expected_found
from captum_priors._lift import in_units_of_largest, lift_penalty


@lift_penalty
def total_variation(
    attributions: Tensor, *, standardize: bool = True, spatial_dims: int | None = None
) -> Tensor:
    r"""Sum of absolute differences between neighbouring attributions.

    .. math:: \Omega(\phi) = \sum_{i,j} |\phi_{i+1,j} - \phi_{i,j}| + |\phi_{i,j+1} - \phi_{i,j}|

    (Erion et al. 2021, pixel attribution prior; the anisotropic form.) Channels are summed first.
    Each map is divided by its standard deviation, without which the penalty can be made small by
    shrinking the attributions.

    Args:
        attributions: ``(batch, length)``, ``(batch, channels, length)``, ``(batch, channels,
            height, width)`` or ``(batch, channels, depth, height, width)``, or a tuple of them.
        standardize: Divide each map by its standard deviation.
        spatial_dims: How many of the last dimensions are spatial, where the shape leaves it open:
            2 for maps ``(batch, height, width)``. All others but the first are channels.

    Returns:
        Shape ``(batch,)``.

    Raises:
        ValueError: If the shape has no such spatial dimensions.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import total_variation
        >>> ramp = torch.arange(5.0).repeat(2, 1)
        >>> torch.equal(total_variation(ramp, standardize=False), torch.full((2,), 4.0))
        True
        >>> phi = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(total_variation(phi), total_variation(100 * phi), rtol=1e-4)
        True
    """
    check_count("spatial_dims", spatial_dims, optional=True)
    n = spatial_dims if spatial_dims is not None else max(1, attributions.dim() - 2)
    if not 1 <= n <= min(3, attributions.dim() - 1):
        raise ValueError(
            expected_found(
                "`attributions`",
                "one to three spatial dimensions after the batch",
                f"shape {tuple(attributions.shape)} with spatial_dims={spatial_dims}",
                "Pass spatial_dims, or reshape the attributions.",
            )
        )
    maps = attributions.flatten(1, -n - 1).sum(1) if attributions.dim() > n + 1 else attributions
    spatial = tuple(range(1, n + 1))
    if standardize:
        maps = in_units_of_largest(maps, spatial)
        variance = maps.var(dim=spatial, keepdim=True, unbiased=False)
        # Maps that vary by rounding alone are constant, not to be blown up to unit scale.
        maps = maps / (variance + (4 * torch.finfo(maps.dtype).eps) ** 2).sqrt()
    differences = [maps.diff(dim=dim).abs().flatten(1).sum(1) for dim in spatial]
    total = differences[0]
    for difference in differences[1:]:
        total = total + difference
    return total
