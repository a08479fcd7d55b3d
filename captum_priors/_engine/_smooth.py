"""Run a forward pass with every ReLU replaced by Softplus, wherever the ReLU comes from."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_priors._engine._checkpointing import without_checkpointing

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
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
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
        # Torch sets a mode aside while its handler runs, and a backward pass that replays the model
        # runs in here whole: whoever smooths again must know.
        before = getattr(_thread, "set_aside", False)
        _thread.set_aside = True
        try:
            return func(*args, **kwargs)
        finally:
            _thread.set_aside = before


def _softplus(inputs: Tensor, beta: float, *, in_place: bool) -> Tensor:
    if in_place:
        # Softplus needs its input again in the backward pass, hence the copy.
        return inputs.copy_(F.softplus(inputs.clone(), beta=beta))
    return F.softplus(inputs, beta=beta)


@contextmanager
def relu_as_softplus(beta: float | None) -> Iterator[None]:
    """Replace ReLU by Softplus in this thread for the duration (None: leave ReLU as it is)."""
    before, set_aside = current_beta(), getattr(_thread, "set_aside", False)
    with ExitStack() as stack:
        if before is None and beta is not None:
            stack.enter_context(
                without_checkpointing(
                    "a smoothed forward pass would be run again with ReLU. Call the model without "
                    "checkpointing while it is smoothed, or leave smoothing out."
                )
            )
        if beta is not None and (before is None or set_aside):
            stack.enter_context(_ReluAsSoftplus())
            _thread.set_aside = False
        _thread.beta = beta
        try:
            yield
        finally:
            _thread.beta, _thread.set_aside = before, set_aside


class SmoothedModule:
    """Smooth one module's forward passes between ``enter`` and ``leave``, in every thread."""

    def __init__(self, module: nn.Module, beta: float) -> None:
        self._module, self._beta = module, beta
        self._handles: list[Any] = []
        self._running = threading.local()

    def enter(self) -> None:
        """Start smoothing."""
        self._handles = [
            # The last to enter begins last and ends first; always_call: also if the model raises.
            self._module.register_forward_pre_hook(self._begin),
            self._module.register_forward_hook(self._end, prepend=True, always_call=True),
        ]
        _entered.append(self)

    def leave(self) -> None:
        """Stop smoothing."""
        _entered.remove(self)
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        only = getattr(_thread, "only", None)
        applies = only is None or self in only
        block = relu_as_softplus(self._beta if applies else current_beta())
        block.__enter__()
        self._running.__dict__.setdefault("blocks", []).append(block)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.blocks.pop().__exit__(None, None, None)


_entered: list[SmoothedModule] = []


@dataclass(frozen=True)
class Smoothing:
    """All smoothing in force in this thread, to be put in force again elsewhere or later."""

    beta: float | None
    modules: tuple[SmoothedModule, ...]

    @classmethod
    def now(cls) -> "Smoothing":
        """Record what is in force."""
        only = getattr(_thread, "only", None)
        return cls(current_beta(), tuple(_entered) if only is None else only)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Put exactly this in force for the duration."""
        missing = [module for module in self.modules if module not in _entered]
        before = getattr(_thread, "only", None)
        for module in missing:
            module.enter()
        _thread.only = self.modules
        try:
            with relu_as_softplus(self.beta):
                yield
        finally:
            _thread.only = before
            for module in missing:
                module.leave()


def check_beta(name: str, beta: float) -> float:
    """Refuse a steepness that is not a positive finite number."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < float("inf"):
        raise ValueError(
            f"`{name}`: expected a positive finite number (the steepness of Softplus), "
            f"found {beta!r}. Pass for example {name}=30."
        )
    return float(beta)
