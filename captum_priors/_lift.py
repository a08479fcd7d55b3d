"""Write maths for one tensor ``(batch, ...)``; accept tuples of them and half precision."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from captum_priors._errors import expected_found
from captum_priors._types import TensorOrTuple

P = ParamSpec("P")


def lift_penalty(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Sum a penalty over a tuple of attributions; annotations may be tuples of the same length."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given: Any = dict(kwargs)
        if len(args) != (0 if "attributions" in given else 1):
            raise TypeError(
                expected_found(
                    f"{function.__name__}()",
                    "the attributions as its only positional argument",
                    f"{len(args)} of them",
                    "Pass what explainer.attribute(...) returns, and all else by name; a distance "
                    "takes two attributions.",
                )
            )
        attributions: Any = args[0] if args else given.pop("attributions")
        each = _each(attributions, "attributions")
        terms = []
        for i, tensor in enumerate(each):
            own = given
            if isinstance(attributions, tuple):
                own = {name: _entry(name, v, i, len(each)) for name, v in given.items()}
            call: Any = function
            terms.append(call(tensor, **own))
        return _sum(terms)

    return wrapper


def lift_distance(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Sum a distance over a pair of tuples of attributions."""

    @functools.wraps(function)
    def wrapper(attributions: TensorOrTuple, other: TensorOrTuple, **options: Any) -> Tensor:
        left, right = _each(attributions, "attributions"), _each(other, "other")
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
        return _sum([function(a, b, **options) for a, b in zip(left, right, strict=True)])

    return wrapper


def _each(attributions: Any, name: str) -> tuple[Tensor, ...]:
    """Check the tensors of a tuple, or the only one, and raise their precision."""
    each = attributions if isinstance(attributions, tuple) else (attributions,)
    if not each:
        raise ValueError(
            expected_found(f"`{name}`", "at least one tensor", "an empty tuple", "Pass a batch.")
        )
    return tuple(_full(tensor, name) for tensor in each)


def _full(tensor: Any, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            expected_found(
                f"`{name}`",
                "a tensor or a tuple of tensors",
                type(tensor).__name__,
                "Pass what explainer.attribute(...) returns.",
            )
        )
    if tensor.dim() < 2:
        raise ValueError(
            expected_found(
                f"`{name}`",
                "shape (batch, ...) with at least one feature dimension",
                f"shape {tuple(tensor.shape)}",
                "Unsqueeze a single example.",
            )
        )
    if 0 in tensor.shape[1:]:
        raise ValueError(
            expected_found(
                f"`{name}`", "at least one feature", f"shape {tuple(tensor.shape)}", "Pass some."
            )
        )
    if not tensor.is_floating_point():
        raise TypeError(
            expected_found(
                f"`{name}`", "floating-point numbers", str(tensor.dtype), "Convert with .float()."
            )
        )
    # Sums over many features overflow or stall in half precision.
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


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


def flat(tensor: Tensor) -> Tensor:
    """Flatten to ``(batch, features)``."""
    return tensor.flatten(1)


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
