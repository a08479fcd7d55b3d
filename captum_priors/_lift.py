"""Write maths for one tensor ``(batch, ...)``; accept tuples of them and half precision."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from captum_priors._errors import expected_found
from captum_priors._types import TensorOrTuple

P = ParamSpec("P")


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
    # Sums over many features overflow or stall in half precision.
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def lift_penalty(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Sum a penalty over a tuple of attributions; annotations may be tuples of the same length."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given: Any = dict(kwargs)
        attributions: Any = args[0] if args else given.pop("attributions")
        each: tuple[Any, ...] = attributions if isinstance(attributions, tuple) else (attributions,)
        terms = []
        for i, tensor in enumerate(each):
            own = {
                name: value[i]
                if isinstance(attributions, tuple) and isinstance(value, tuple)
                else value
                for name, value in given.items()
            }
            call: Any = function
            terms.append(call(_full(tensor, "attributions"), *args[1:], **own))
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    return wrapper


def lift_distance(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Sum a distance over a pair of tuples of attributions."""

    @functools.wraps(function)
    def wrapper(attributions: TensorOrTuple, other: TensorOrTuple, **options: Any) -> Tensor:
        left = attributions if isinstance(attributions, tuple) else (attributions,)
        right = other if isinstance(other, tuple) else (other,)
        if [getattr(t, "shape", None) for t in left] != [getattr(t, "shape", None) for t in right]:
            raise ValueError(
                expected_found(
                    "`other`",
                    f"shapes {[tuple(t.shape) for t in left]} as in `attributions`",
                    str([tuple(t.shape) for t in right]),
                    "Compare attributions of the same inputs.",
                )
            )
        terms = [
            function(_full(a, "attributions"), _full(b, "other"), **options)
            for a, b in zip(left, right, strict=True)
        ]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    return wrapper


def flat(tensor: Tensor) -> Tensor:
    """Flatten to ``(batch, features)``."""
    return tensor.flatten(1)


def safe_norm(rows: Tensor) -> Tensor:
    """Euclidean norm of each row whose gradient at zero is zero rather than NaN."""
    squares = rows.square().sum(1)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, squares + 1).sqrt(), squares)
