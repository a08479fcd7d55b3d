"""Maths that penalties, distances and metrics share: tuples, half precision, axes, safe norms."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from captum_priors._errors import refusal
from captum_priors._types import TensorOrTuple

P = ParamSpec("P")
Axes = int | Sequence[int] | None


def lift_penalty(function: Callable[P, Tensor], *, joins: bool = False) -> Callable[P, Tensor]:
    """Sum a penalty of one tensor over a tuple of attributions, or join their features first.

    Keywords without a default are annotations: a tuple of them has one for each tensor, or None
    where nothing is said about it. Keywords with a default are options, the same for all.
    """
    parameters = inspect.signature(function).parameters.values()
    annotations = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given: dict[str, Any] = dict(kwargs)
        if len(args) != (0 if "attributions" in given else 1):
            raise refusal(
                TypeError,
                f"{function.__name__}()",
                "the attributions as its only positional argument",
                f"{len(args)} of them",
                "Pass what explainer.attribute(...) returns, and all else by name; a distance "
                "takes two attributions.",
            )
        attributions: Any = args[0] if args else given.pop("attributions")
        each = tensors_of(attributions)
        each = (joined(each),) if joins else each
        terms = []
        for i, tensor in enumerate(each):
            own, silent = dict(given), False
            for name in annotations & own.keys() if isinstance(attributions, tuple) else ():
                own[name] = _entry(name, own[name], i, len(each))
                silent = silent or (own[name] is None and given[name] is not None)
            call: Any = function
            terms.append(tensor.new_zeros(len(tensor)) if silent else call(tensor, **own))
        return _sum(terms)

    return wrapper


def join_penalty(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Put the features of a tuple of attributions into one row: ``(batch, features)``."""
    return lift_penalty(function, joins=True)


def lift_distance(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Sum a distance of two tensors over a pair of tuples of attributions."""

    @functools.wraps(function)
    def wrapper(attributions: TensorOrTuple, other: TensorOrTuple, **options: Any) -> Tensor:
        left, right = pair_of(attributions, other)
        return _sum([function(a, b, **options) for a, b in zip(left, right, strict=True)])

    return wrapper


def _entry(name: str, value: Any, i: int, n: int) -> Any:
    """Annotation of the i-th of n tensors."""
    if not isinstance(value, tuple):
        return value
    if len(value) != n:
        raise refusal(
            ValueError,
            f"`{name}`",
            f"one value, or a tuple of {n} as for the attributions",
            f"a tuple of {len(value)}",
            "Give one to each input.",
        )
    return value[i]


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def tensors_of(attributions: Any, name: str = "attributions") -> tuple[Tensor, ...]:
    """Check one tensor ``(batch, ...)`` or a tuple of them, and raise half precision."""
    each = attributions if isinstance(attributions, tuple) else (attributions,)
    raised, odd = [], not each
    for tensor in each:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise refusal(
                TypeError,
                f"`{name}`",
                "a tensor of floating-point numbers or a tuple of them",
                str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__,
                "Pass what explainer.attribute(...) returns.",
            )
        odd = odd or tensor.dim() < 2 or 0 in tensor.shape[1:] or len(tensor) != len(each[0])
        # Sums over many features overflow or stall in half precision.
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        raised.append(tensor.float() if half else tensor)
    if odd:
        raise refusal(
            ValueError,
            f"`{name}`",
            "shape (batch, ...) with features, and one batch size",
            f"shapes {[tuple(t.shape) for t in each]}",
            "Unsqueeze a single example, and select at least one feature.",
        )
    return tuple(raised)


def pair_of(attributions: Any, other: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Check two attributions of the same inputs."""
    left, right = tensors_of(attributions), tensors_of(other, "other")
    wanted, found = ([f"{tuple(t.shape)} on {t.device}" for t in side] for side in (left, right))
    if wanted != found:
        raise refusal(
            ValueError,
            "`other`",
            f"{', '.join(wanted)} as in `attributions`",
            ", ".join(found),
            "Compare attributions of the same inputs, on one device.",
        )
    return left, right


def joined(tensors: tuple[Tensor, ...]) -> Tensor:
    """Put all features of an example into one row: ``(batch, features)``."""
    return torch.cat([t.flatten(1) for t in tensors], 1)


def axes_of(attributions: Tensor, dim: Axes) -> tuple[int, ...]:
    """Find the axes that are places; those between them and the batch are channels.

    Without ``dim`` these are all of ``(batch, length)`` and those after the channels of ``(batch,
    channels, height, width)`` and ``(batch, channels, depth, height, width)``. Three dimensions may
    be a map, or a sequence with its channels first or last: that is asked for, not guessed.
    """
    n, shape = attributions.dim(), tuple(attributions.shape)
    if dim is None:
        if n in (2, 4, 5):
            return (1,) if n == 2 else tuple(range(2, n))
        raise refusal(
            ValueError,
            "`dim`",
            f"which of the {n - 1} axes after the batch are places, not channels",
            f"None for attributions of shape {shape}",
            "Pass dim=(1, 2) for maps (batch, height, width), dim=2 for (batch, channels, "
            "length), dim=1 for (batch, length, channels); in a prior, "
            "functools.partial(function, dim=...).",
        )
    given = tuple(dim) if isinstance(dim, Sequence) else (dim,)
    # By type, because True is an integer, too.
    axes = {d % n for d in given if type(d) is int and -n <= d < n} - {0}
    if len(axes) != len(given) or not given:
        raise refusal(
            ValueError,
            "`dim`",
            f"different axes among 1 to {n - 1} of attributions of shape {shape}",
            repr(dim),
            "Axis 0 counts examples; pass for example dim=(2, 3) for images.",
        )
    return tuple(axes)


def sum_channels(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """Sum over all axes but the batch and the given ones: ``(batch, *places)``."""
    channels = sorted({*range(1, tensor.dim())} - {*axes})
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
    rows = [in_units_of_largest(side, 1) for side in (left, right)]
    norms = [safe_norm(row).unsqueeze(1) for row in rows]
    u, v = (row / torch.where(norm > 0, norm, 1) for row, norm in zip(rows, norms, strict=True))
    one_is_zero = (norms[0] == 0) != (norms[1] == 0)
    return (u - v).square().sum(1) / 2 + one_is_zero.squeeze(1).to(u.dtype) / 2


def gini_coefficient(sizes: Tensor) -> Tensor:
    """Gini coefficient of each row of non-negative numbers; 0 for a row of zeros."""
    ordered = in_units_of_largest(sizes, 1).sort(1).values
    p = sizes.shape[1]
    rank = torch.arange(1 - p, p, 2, dtype=sizes.dtype, device=sizes.device)
    return (rank * ordered).sum(1) / (p * ordered.sum(1)).clamp_min(1)
