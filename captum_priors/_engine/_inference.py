"""Step out of ``torch.inference_mode``, where no gradient exists, for the length of a call."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def _normal(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
        return type(value)(map(_normal, value))
    return value


def leaves_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that needs gradients inside work where the caller records none.

    Lightning validates under inference mode; attributions there come back detached.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            normal_args: Any = tuple(map(_normal, args))
            normal_kwargs: Any = {name: _normal(value) for name, value in kwargs.items()}
            return function(*normal_args, **normal_kwargs)

    return wrapper
