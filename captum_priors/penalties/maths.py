"""Maths that penalties, distances and metrics share: tuples, half precision, axes, safe norms."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from captum_priors._errors import expected_found
from captum_priors._types import TensorOrTuple

P = ParamSpec("P")
Axes = int | Sequence[int] | None


def lift_penalty(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Sum a penalty of one tensor over a tuple of attributions.

    Keywords without a default are annotations: a tuple of them has one for each tensor. Keywords
    with a default are options, the same for all.
    """
    annotations = {
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    }

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        attributions, given = _split(function.__name__, args, kwargs)
        each = tensors_of(attributions)
        terms = []
        for i, tensor in enumerate(each):
            own = given
            if isinstance(attributions, tuple):
                own = {
                    name: _entry(name, value, i, len(each)) if name in annotations else value
                    for name, value in given.items()
                }
            call: Any = function
            terms.append(call(tensor, **own))
        return _sum(terms)

    return wrapper


def join_penalty(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Put the features of a tuple of attributions into one row: ``(batch, features)``."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        attributions, given = _split(function.__name__, args, kwargs)
        call: Any = function
        penalty: Tensor = call(joined(tensors_of(attributions)), **given)
        return penalty

    return wrapper


def lift_distance(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Sum a distance of two tensors over a pair of tuples of attributions."""

    @functools.wraps(function)
    def wrapper(attributions: TensorOrTuple, other: TensorOrTuple, **options: Any) -> Tensor:
        left, right = pair_of(attributions, other)
        return _sum([function(a, b, **options) for a, b in zip(left, right, strict=True)])

    return wrapper


def _split(name: str, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Tell the attributions from what is passed by name."""
    given = dict(kwargs)
    if len(args) != (0 if "attributions" in given else 1):
        raise TypeError(
            expected_found(
                f"{name}()",
                "the attributions as its only positional argument",
                f"{len(args)} of them",
                "Pass what explainer.attribute(...) returns, and all else by name; a distance "
                "takes two attributions.",
            )
        )
    return (args[0] if args else given.pop("attributions")), given


def _entry(name: str, value: Any, i: int, n: int) -> Any:
    """Annotation of the i-th of n tensors."""
    if not isinstance(value, tuple):
        return value
    if len(value) != n:
        raise ValueError(
            expected_found(
                f"`{name}`",
                f"one value, or a tuple of {n} as for the attributions",
                f"a tuple of {len(value)}",
                "Give one to each input.",
            )
        )
    return value[i]


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def tensors_of(attributions: Any, name: str = "attributions") -> tuple[Tensor, ...]:
    """Check one tensor ``(batch, ...)`` or a tuple of them, and raise half precision."""
    each = attributions if isinstance(attributions, tuple) else (attributions,)
    found = []
    for tensor in each:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(
                expected_found(
                    f"`{name}`",
                    "a tensor of floating-point numbers or a tuple of them",
                    str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__,
                    "Pass what explainer.attribute(...) returns.",
                )
            )
        if tensor.dim() < 2 or 0 in tensor.shape[1:] or len(tensor) != len(each[0]):
            raise ValueError(
                expected_found(
                    f"`{name}`",
                    "shape (batch, ...) with features, and one batch size",
                    f"shapes {[tuple(t.shape) for t in each]}",
                    "Unsqueeze a single example, and select at least one feature.",
                )
            )
        # Sums over many features overflow or stall in half precision.
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        found.append(tensor.float() if half else tensor)
    if not found:
        raise ValueError(
            expected_found(f"`{name}`", "at least one tensor", "an empty tuple", "Pass a batch.")
        )
    return tuple(found)


def pair_of(attributions: Any, other: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Check two attributions of the same inputs."""
    left, right = tensors_of(attributions), tensors_of(other, "other")
    wanted, found = ([f"{tuple(t.shape)} on {t.device}" for t in side] for side in (left, right))
    if wanted != found:
        raise ValueError(
            expected_found(
                "`other`",
                f"{', '.join(wanted)} as in `attributions`",
                ", ".join(found),
                "Compare attributions of the same inputs, on one device.",
            )
        )
    return left, right


def joined(tensors: tuple[Tensor, ...]) -> Tensor:
    """Put all features of an example into one row: ``(batch, features)``."""
    return torch.cat([t.flatten(1) for t in tensors], 1) if len(tensors) > 1 else flat(tensors[0])


def flat(tensor: Tensor) -> Tensor:
    """Flatten to ``(batch, features)``."""
    return tensor.flatten(1)


def axes_of(attributions: Tensor, dim: Axes) -> tuple[int, ...]:
    """Find the axes that are places; those between them and the batch are channels.

    Without ``dim`` these are all of ``(batch, length)`` and those after the channels of ``(batch,
    channels, height, width)`` and ``(batch, channels, depth, height, width)``. Three dimensions may
    be a map, or a sequence with its channels first or last: that is asked for, not guessed.
    """
    n, shape = attributions.dim(), tuple(attributions.shape)
    if dim is None:
        if n == 3 or n > 5:
            raise ValueError(
                expected_found(
                    "`dim`",
                    f"which of the {n - 1} axes after the batch are places, not channels",
                    f"None for attributions of shape {shape}",
                    "Pass dim=(1, 2) for maps (batch, height, width), dim=2 for (batch, channels, "
                    "length), dim=1 for (batch, length, channels); in a prior, "
                    "functools.partial(function, dim=...).",
                )
            )
        return (1,) if n == 2 else tuple(range(2, n))
    given = (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, (tuple, list)) else ()
    integers = all(isinstance(d, int) and not isinstance(d, bool) for d in given)
    axes = tuple(d % n for d in given) if integers and all(-n <= d < n for d in given) else ()
    if not axes or 0 in axes or len(set(axes)) < len(axes):
        raise ValueError(
            expected_found(
                "`dim`",
                f"different axes among 1 to {n - 1} of attributions of shape {shape}",
                repr(dim),
                "Axis 0 counts examples; pass for example dim=(2, 3) for images.",
            )
        )
    return axes


def sum_channels(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """Sum over all axes but the batch and the given ones: ``(batch, *places)``."""
    channels = [d for d in range(1, tensor.dim()) if d not in axes]
    return tensor.sum(channels) if channels else tensor


def importance(attributions: Tensor, dim: Axes = None) -> Tensor:
    """Sum absolute attributions over channels: how much each place matters."""
    return sum_channels(attributions.abs(), axes_of(attributions, dim))


def importance_rows(attributions: tuple[Tensor, ...], dim: Axes = None) -> Tensor:
    """Put the places of all tensors of an example into one row: ``(batch, places)``."""
    return joined(tuple(importance(a, dim) for a in attributions))


def safe_norm(rows: Tensor) -> Tensor:
    """Euclidean norm of each row whose gradient at zero is zero rather than NaN."""
    squares = rows.square().sum(1)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, squares + 1).sqrt(), squares)


def in_units_of_largest(tensor: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Divide by the largest absolute value, so that squares and sums stay in the range of floats.

    For formulas that ignore scale only: the divisor counts as a constant. What is so small that its
    squares would vanish is zero, and has a zero gradient.
    """
    largest = tensor.detach().abs().amax(dims, keepdim=True)
    # Negated so that NaN counts: what is not a number must not come out as zero.
    counts = ~(largest <= torch.finfo(tensor.dtype).tiny ** 0.5)
    return torch.where(counts, tensor, 0) / torch.where(counts, largest, 1)


def cosine_distance(left: Tensor, right: Tensor) -> Tensor:
    """``|u - v|^2 / 2`` for unit vectors: no cancellation for nearly equal rows, unlike 1 - cos.

    Zero for two rows of zeros, one for a row of zeros and another.
    """
    left, right = in_units_of_largest(left, 1), in_units_of_largest(right, 1)
    one_is_zero = ((left == 0).all(1) != (right == 0).all(1)).to(left.dtype)
    return (_unit(left) - _unit(right)).square().sum(1) / 2 + one_is_zero / 2


def _unit(rows: Tensor) -> Tensor:
    norm = safe_norm(rows).unsqueeze(1)
    return rows / torch.where(norm > 0, norm, 1)


def gini_coefficient(sizes: Tensor) -> Tensor:
    """Gini coefficient of each row of non-negative numbers; 0 for a row of zeros."""
    ordered = in_units_of_largest(sizes, 1).sort(1).values
    p = sizes.shape[1]
    rank = torch.arange(1 - p, p, 2, dtype=sizes.dtype, device=sizes.device)
    return (rank * ordered).sum(1) / (p * ordered.sum(1)).clamp_min(1)
