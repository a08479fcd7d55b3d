"""Where a perturbed input may lie: within a radius of the clean one, and in the valid range."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from captum_priors._errors import expected_found, one_of

Norm = Literal["Linf", "L2"]
NORMS = ("Linf", "L2")


@dataclass(frozen=True)
class Ball:
    """One tensor's clean values with what is allowed around them."""

    centre: Tensor
    radius: float
    norm: str
    low: Tensor
    high: Tensor

    def project(self, points: Tensor) -> Tensor:
        """Return the nearest allowed point, or one on the way to it.

        Clamping to a range that holds the centre moves each entry towards it, so the second step
        does not leave the ball of the first.
        """
        offset = points - self.centre
        if self.norm == "Linf":
            offset = offset.clamp(-self.radius, self.radius)
        else:
            offset = offset * (self.radius / rows_norm(offset).clamp_min(self.radius))
        return torch.minimum(torch.maximum(self.centre + offset, self.low), self.high)

    def ascend(self, points: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Step by ``step_size`` in the norm's steepest direction, and back into the ball."""
        gradient = torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
        if self.norm == "Linf":
            return self.project(points + step_size * gradient.sign())
        # In units of the largest entry first: squares of small gradients would vanish.
        largest = gradient.abs().flatten(1).amax(1).reshape(_column(gradient))
        direction = gradient / torch.where(largest > 0, largest, 1)
        norm = rows_norm(direction)
        return self.project(points + step_size * direction / torch.where(norm > 0, norm, 1))

    def draw(self, distribution: str) -> Tensor:
        """Draw a point of the ball (``"uniform"``) or of its surface, from the global generator."""
        centre = self.centre
        if self.norm == "Linf":
            noise = 2 * torch.rand_like(centre) - 1
            noise = noise if distribution == "uniform" else noise.sign()
        else:
            noise = torch.randn_like(centre)
            noise = noise / rows_norm(noise)
            if distribution == "uniform":
                share = torch.rand(_column(centre), dtype=centre.dtype, device=centre.device)
                noise = noise * share ** (1 / max(1, centre[0].numel()))
        return self.project(centre + self.radius * noise)


def _column(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.shape[0], *([1] * (tensor.dim() - 1)))


def rows_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of each example, shaped to broadcast."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return norms.reshape(_column(tensor))


def check_ball(radius: Any, norm: Any) -> None:
    """Require a positive radius, or a tuple of them, and a known norm."""
    one_of("norm", norm, NORMS)
    for each in radius if isinstance(radius, tuple) else (radius,):
        if isinstance(each, bool) or not isinstance(each, (int, float)) or not 0 < each < torch.inf:
            raise ValueError(
                expected_found(
                    "`radius`",
                    "a positive number in units of the inputs, or a tuple with one for each input",
                    repr(radius),
                    "Pass for example radius=0.1.",
                )
            )


def balls(
    inputs: Sequence[Tensor], radius: Any, norm: str, lower_bound: Any, upper_bound: Any
) -> tuple[Ball, ...]:
    """Make one ball for each input."""
    n = len(inputs)
    each = zip(
        inputs,
        _for_each("radius", radius, n),
        _for_each("lower_bound", lower_bound, n),
        _for_each("upper_bound", upper_bound, n),
        strict=True,
    )
    return tuple(
        _ball(f"`inputs[{i}]`" if n > 1 else "`inputs`", *one, norm) for i, one in enumerate(each)
    )


def _for_each(name: str, value: Any, n: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        return (value,) * n
    if len(value) != n:
        raise ValueError(
            expected_found(
                f"`{name}`", f"one value, or {n}: one for each input", f"{len(value)}", "Match."
            )
        )
    return value


def _ball(name: str, inputs: Tensor, radius: float, lower: Any, upper: Any, norm: str) -> Ball:
    centre = inputs.detach()
    low, high = (_bound(bound, centre) for bound in (lower, upper))
    # Bounds are often the normalised 0 and 1, rounded otherwise than the inputs were.
    scale = torch.where(low.isfinite(), low.abs(), 0).maximum(
        torch.where(high.isfinite(), high.abs(), 0)
    )
    slack = 8 * torch.finfo(centre.dtype).eps * scale
    if bool(((centre < low - slack) | (centre > high + slack)).any()):
        raise ValueError(
            expected_found(
                name,
                "values between `lower_bound` and `upper_bound`",
                f"values from {centre.min().item():.4g} to {centre.max().item():.4g}",
                "Give the bounds in the units that the model sees, after any normalisation.",
            )
        )
    return Ball(centre, float(radius), norm, torch.minimum(low, centre), high.maximum(centre))


def _bound(bound: Any, like: Tensor) -> Tensor:
    value = torch.as_tensor(bound, dtype=like.dtype, device=like.device)
    try:
        return value.expand_as(like)
    except RuntimeError as error:
        raise ValueError(
            expected_found(
                "bounds",
                f"numbers, or tensors that broadcast to {tuple(like.shape)}",
                f"shape {tuple(value.shape)}",
                "Per-channel bounds have shape (channels, 1, 1).",
            )
        ) from error
