"""Run a forward pass with every ReLU replaced by Softplus, wherever the ReLU comes from."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_thread = threading.local()

_RELU = (F.relu, torch.relu, Tensor.relu)
_RELU_IN_PLACE = (torch.relu_, Tensor.relu_, F.relu_)


def current_beta() -> float | None:
    """Softplus steepness in force in this thread, or None."""
    beta: float | None = getattr(_thread, "beta", None)
    return beta


class _ReluAsSoftplus(TorchFunctionMode):
    """Reads the steepness in force, so that an inner block can change it or switch it off."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        beta = current_beta()
        if beta is not None:
            if func in _RELU:
                inputs = args[0] if args else kwargs["input"]
                in_place = args[1] if len(args) > 1 else kwargs.get("inplace", False)
                return _softplus(inputs, beta, in_place=in_place)
            if func in _RELU_IN_PLACE:
                return _softplus(args[0] if args else kwargs["input"], beta, in_place=True)
        return func(*args, **kwargs)


def _softplus(inputs: Tensor, beta: float, *, in_place: bool) -> Tensor:
    if in_place:
        # Softplus needs its input again in the backward pass, hence the copy.
        return inputs.copy_(F.softplus(inputs.clone(), beta=beta))
    return F.softplus(inputs, beta=beta)


@contextmanager
def relu_as_softplus(beta: float | None) -> Iterator[None]:
    """Replace ReLU by Softplus in this thread for the duration (None: leave ReLU as it is)."""
    before = current_beta()
    with ExitStack() as stack:
        if before is None and beta is not None:
            stack.enter_context(_ReluAsSoftplus())
        _thread.beta = beta
        try:
            yield
        finally:
            _thread.beta = before


def check_beta(name: str, beta: float) -> float:
    """Refuse a steepness that is not a positive finite number."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < float("inf"):
        raise ValueError(
            f"`{name}`: expected a positive finite number (the steepness of Softplus), "
            f"found {beta!r}. Pass for example {name}=30."
        )
    return float(beta)
