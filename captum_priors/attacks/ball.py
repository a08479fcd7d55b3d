"""Where a perturbed input may lie: within a radius of the clean one, and in the valid range."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_priors._checks import positive
from captum_priors._errors import refusal
from captum_priors.engine.gradients import differentiate
from captum_priors.penalties.annotation import fitted

Norm = Literal["Linf", "L2"]
Distribution = Literal["surface", "uniform"]
Sizes = float | tuple[float, ...]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Ball:
    r"""One tensor's clean values :math:`x` with what is allowed around them.

    .. math:: \{z : \lVert z - x \rVert \le r,\; l \le z \le u\}

    In the maximum norm ``low`` and ``high`` are the whole of it.

    Example:
        >>> import torch
        >>> from captum_priors.attacks.ball import balls
        >>> (ball,) = balls((torch.zeros(1, 2),), radius=1.0, norm="L2", upper_bound=0.5)
        >>> ball.project(torch.tensor([[3.0, 4.0]])).tolist()  # to (0.6, 0.8), and into the range
        [[0.5, 0.5]]
    """

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
        if self.norm == "L2":
            offset = points - self.centre
            share = self.radius / offset.flatten(1).norm(dim=1).clamp_min(self.radius)
            points = self.centre + offset * per_example(share, offset)
        return torch.clamp(points, self.low, self.high)

    def step(self, points: Tensor, gradient: Tensor, size: float) -> Tensor:
        """Go ``size`` in the norm's steepest direction, and back into the ball."""
        gradient = torch.nan_to_num(gradient, 0.0, 0.0, 0.0) * self._free
        direction = gradient.sign() if self.norm == "Linf" else unit(gradient)
        return self.project(points + size * direction)

    def draw(self, distribution: Distribution, generator: torch.Generator) -> Tensor:
        """Draw a point of the ball (``"uniform"``) or of its surface."""
        x = self.centre
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}
        if self.norm == "Linf":
            noise = 2 * torch.rand(x.shape, **options) - 1
            noise = noise if distribution == "uniform" else noise.sign()
        else:
            noise = unit(torch.randn(x.shape, **options) * self._free)
            if distribution == "uniform":
                dimensions = self._free.flatten(1).sum(1).clamp_min(1)
                share = torch.rand(len(x), **options) ** (1 / dimensions)
                noise = noise * per_example(share, noise)
        return self.project(x + self.radius * noise)

    @property
    def _free(self) -> Tensor:
        return self.low < self.high


def balls(
    inputs: Sequence[Tensor],
    radius: Sizes,
    norm: Norm = "Linf",
    lower_bound: Any = float("-inf"),
    upper_bound: Any = float("inf"),
    annotation: Any = None,
) -> tuple[Ball, ...]:
    """Make one ball around each input, of which it keeps a copy.

    Options are those of :class:`captum_priors.attacks.AttributionAttack`, a tuple having one value
    for each input. Where ``annotation``, of the form that
    :mod:`captum_priors.penalties` describes, is not zero, nothing may move; None says nothing.

    Raises:
        ValueError: If the inputs leave the bounds, or something does not fit them.
    """
    given = {
        "radius": radius,
        "lower_bound": lower_bound,
        "upper_bound": upper_bound,
        "annotation": annotation,
    }
    each = [for_each(name, value, len(inputs)) for name, value in given.items()]
    return tuple(
        _ball(x.detach().clone(), norm, *own) for x, *own in zip(inputs, *each, strict=True)
    )


def _ball(
    centre: Tensor, norm: Norm, radius: float, lower: Any, upper: Any, annotation: Any
) -> Ball:
    low, high = (broadcast("bounds", bound, centre) for bound in (lower, upper))
    # Bounds are often the normalised 0 and 1, rounded otherwise than the inputs were.
    rounding = 8 * torch.finfo(centre.dtype).eps
    scale = torch.stack([torch.where(b.isfinite(), b.abs(), 0) for b in (low, high)]).amax(0)
    nearest = centre.clamp(low, high)
    if bool(((centre - nearest).abs() > rounding * scale).any()):
        raise refusal(
            ValueError,
            "`inputs`",
            "values between `lower_bound` and `upper_bound`",
            f"values from {centre.min().item():.4g} to {centre.max().item():.4g}",
            "Give the bounds in the units that the model sees, after any normalisation.",
        )
    low, high = torch.minimum(low, centre), torch.maximum(high, centre)
    if norm == "Linf":
        low, high = torch.maximum(low, centre - radius), torch.minimum(high, centre + radius)
    if annotation is not None:
        stays = fitted(centre, annotation, "finite") != 0
        low, high = (torch.where(stays, centre, bound) for bound in (low, high))
    return Ball(centre, float(radius), norm, low, high)


def draw(region: Sequence[Ball], distribution: Distribution, generator: torch.Generator) -> Tensors:
    """Draw a point of each ball, one after the other."""
    return tuple(ball.draw(distribution, generator) for ball in region)


def ascend(
    region: Sequence[Ball], points: Tensors, gradients: Tensors, sizes: Sequence[float]
) -> Tensors:
    """Take one step in each ball."""
    each = zip(region, points, gradients, sizes, strict=True)
    return tuple(ball.step(p.detach(), g, size) for ball, p, g, size in each)


def unit(tensor: Tensor) -> Tensor:
    """Divide each example by its Euclidean norm; zeros stay."""
    # In units of the largest entry first: squares of small numbers would vanish.
    rows = F.normalize(tensor.flatten(1), torch.inf, eps=torch.finfo(tensor.dtype).tiny)
    return F.normalize(rows).reshape_as(tensor)


def climb(
    region: Sequence[Ball],
    points: Tensors,
    score: Callable[[Tensors], Tensor],
    step_size: Sizes | None,
    step_num: int,
) -> Tensors:
    """Raise the scores, one for each example, from the given points on."""
    sizes = step_sizes(region, step_size, step_num)
    for _ in range(step_num):
        points = tuple(p.detach().requires_grad_() for p in points)
        gradients = differentiate(score(points), points, create_graph=False)
        points = ascend(region, points, gradients, sizes)
    return points


def step_sizes(region: Sequence[Ball], step_size: Sizes | None, step_num: int) -> tuple[float, ...]:
    """Return the length of a step in each ball: by default all of them go five times its radius."""
    if step_size is None:
        return tuple(5 / step_num * ball.radius for ball in region)
    return for_each("step_size", step_size, len(region))


# ---- One value for each ------------------------------------------------------------------------


def check_sizes(name: str, value: Any) -> Any:
    """Require a positive finite number, or a tuple with one for each input, and return it."""
    for each in value if isinstance(value, tuple) else (value,):
        positive(name, each)
    return value


def for_each(name: str, value: Any, n: int) -> tuple[Any, ...]:
    """Return one value for each of n tensors, from a tuple or from one for all."""
    if not isinstance(value, tuple):
        return (value,) * n
    if len(value) != n:
        raise refusal(
            ValueError,
            f"`{name}`",
            f"one value, or {n}: one for each input",
            f"{len(value)}",
            "A tuple has one entry for each tensor of `inputs`.",
        )
    return value


def broadcast(name: str, value: Any, like: Tensor) -> Tensor:
    """Return a number or a tensor in the shape, dtype and place of another."""
    try:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device).expand_as(like)
    except (RuntimeError, TypeError, ValueError) as error:
        raise refusal(
            ValueError,
            name,
            f"numbers, or tensors that broadcast to {tuple(like.shape)}",
            f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value),
            "Values for each channel have shape (channels, 1, 1).",
        ) from error


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Give one number for each example as many dimensions as the tensor has."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
