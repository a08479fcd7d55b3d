"""How much each place of an input matters: absolute attributions, channels summed."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._errors import expected_found


def check_spatial_dims(spatial_dims: Any) -> None:
    """Require None, or the number of spatial dimensions."""
    if spatial_dims is None:
        return
    if isinstance(spatial_dims, bool) or not isinstance(spatial_dims, int) or spatial_dims < 1:
        raise ValueError(
            expected_found(
                "`spatial_dims`",
                "None or a positive integer",
                repr(spatial_dims),
                "Pass 2 for images.",
            )
        )


def importance(attributions: Tensor, spatial_dims: int | None = None) -> Tensor:
    """Sum absolute attributions over channels: ``(batch, *spatial)``.

    Without ``spatial_dims``, dimension 1 counts as channels from four dimensions on: in ``(batch,
    channels, height, width)``, but neither in ``(batch, height, width)`` nor in ``(batch, p)``.
    """
    if attributions.dim() < 2:
        raise ValueError(
            expected_found(
                "attributions",
                "shape (batch, ...) with at least one feature dimension",
                f"shape {tuple(attributions.shape)}",
                "Unsqueeze a single example.",
            )
        )
    n = attributions.dim() - (2 if attributions.dim() >= 4 else 1)
    if spatial_dims is not None:
        if spatial_dims > attributions.dim() - 1:
            raise ValueError(
                expected_found(
                    "`spatial_dims`",
                    f"at most {attributions.dim() - 1} for shape {tuple(attributions.shape)}",
                    str(spatial_dims),
                    "The first dimension counts examples.",
                )
            )
        n = spatial_dims
    size = attributions.abs()
    return size.flatten(1, -n - 1).sum(1) if size.dim() > n + 1 else size


def importance_rows(attributions: tuple[Tensor, ...], spatial_dims: int | None = None) -> Tensor:
    """Put the places of all tensors of an example into one row: ``(batch, places)``."""
    rows = [importance(a, spatial_dims).flatten(1) for a in attributions]
    return torch.cat(rows, 1) if len(rows) > 1 else rows[0]
