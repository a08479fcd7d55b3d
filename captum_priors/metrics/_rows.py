"""Attributions as rows to be scored: checked, detached, tuples joined."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._errors import expected_found


def tensors_of(attributions: Any, name: str = "attributions") -> tuple[Tensor, ...]:
    """Check one tensor or a tuple of them; detach, and raise half precision."""
    each = attributions if isinstance(attributions, tuple) else (attributions,)
    if not each:
        raise ValueError(
            expected_found(f"`{name}`", "at least one tensor", "an empty tuple", "Pass a batch.")
        )
    for tensor in each:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                expected_found(
                    f"`{name}`",
                    "a tensor or a tuple of tensors",
                    type(tensor).__name__,
                    "Pass what explainer.attribute(...) returns.",
                )
            )
        if tensor.dim() < 2 or tensor.shape[0] != each[0].shape[0] or tensor.numel() == 0:
            raise ValueError(
                expected_found(
                    f"`{name}`",
                    "shape (batch, ...) with features, and one batch size",
                    str([tuple(t.shape) for t in each]),
                    "Unsqueeze a single example.",
                )
            )
    each = tuple(t.detach() for t in each)
    return tuple(t if t.dtype in (torch.float32, torch.float64) else t.float() for t in each)


def pair_of(attributions: Any, other: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Check two attributions of the same inputs."""
    left, right = tensors_of(attributions), tensors_of(other, "other")
    if [t.shape for t in left] != [t.shape for t in right]:
        raise ValueError(
            expected_found(
                "`other`",
                f"shapes {[tuple(t.shape) for t in left]} as in `attributions`",
                str([tuple(t.shape) for t in right]),
                "Compare attributions of the same inputs.",
            )
        )
    for a, b in zip(left, right, strict=True):
        if a.device != b.device:
            raise ValueError(
                expected_found(
                    "`other`", f"device {a.device}", str(b.device), f"Move it to {a.device}."
                )
            )
    return left, right


def joined(tensors: tuple[Tensor, ...]) -> Tensor:
    """All features of an example in one row: ``(batch, features)``."""
    return torch.cat([t.flatten(1) for t in tensors], 1)


def nan_where(values: Tensor, *rows: Tensor) -> Tensor:
    """Put NaN where a row that was scored holds a number that is not finite."""
    bad = torch.stack([~row.isfinite().flatten(1).all(1) for row in rows]).any(0)
    return values.masked_fill(bad, float("nan"))
