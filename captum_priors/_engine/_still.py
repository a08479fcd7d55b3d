"""Hold a model still: evaluation mode for one attribution, and back, counted across threads."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
_held: "WeakKeyDictionary[nn.Module, tuple[int, dict[str, Any]]]" = WeakKeyDictionary()


def still_state(module: nn.Module) -> dict[str, Any]:
    """Attributes under which a module is deterministic and treats examples independently.

    cuDNN refuses the backward pass of a recurrent module in evaluation mode, so those keep their
    flag and lose their dropout instead.
    """
    if isinstance(module, nn.RNNBase):
        return {"dropout": 0.0}
    return {"training": False}


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold modules still; the last of several overlapping holders restores what the first found.

    ``training`` is set on each module by itself: ``module.eval()`` may be overridden by users.
    """
    entered: list[nn.Module] = []
    try:
        for module in modules:
            with _lock:
                count, found = _held.get(module, (0, {}))
                if count == 0:
                    state = still_state(module)
                    found = {name: getattr(module, name) for name in state}
                    _set(module, state)
                _held[module] = (count + 1, found)
                entered.append(module)
        yield
    finally:
        for module in entered:
            with _lock:
                count, found = _held.pop(module)
                if count > 1:
                    _held[module] = (count - 1, found)
                else:
                    _set(module, found)


def snapshot(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Record the attributes that decide how a forward pass behaves."""
    return [(module, {n: getattr(module, n) for n in _watched(module)}) for module in modules]


@contextmanager
def as_recorded(record: list[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """Put modules back into a recorded behaviour for the duration, then undo it."""
    changed = [
        (module, {name: getattr(module, name) for name in state})
        for module, state in record
        if any(getattr(module, name) != value for name, value in state.items())
    ]
    states = {id(module): state for module, state in record}
    try:
        for module, _ in changed:
            _set(module, states[id(module)])
        yield
    finally:
        for module, before in changed:
            _set(module, before)


def _watched(module: nn.Module) -> tuple[str, ...]:
    return ("training", "dropout") if isinstance(module, nn.RNNBase) else ("training",)


def _set(module: nn.Module, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(module, name, value)
