"""The modules behind what is explained: those that are plainly there, and those that run."""

import functools
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

# Attributes in which explainers, and objects around a model, keep what they run.
_HOLDERS = ("forward_func", "model", "attribution_method", "attr_method", "explainer", "layer")


def modules_of(*holders: Any) -> tuple[nn.Module, ...]:
    """Return the root modules that are plainly there.

    A module, a bound method's, a partial's, and those that an object has as attributes, or in its
    ``forward_func``, ``model`` and the like. What another function hides shows when it runs: see
    :func:`run_modules`.
    """
    return plainly_in(holders)[0]


def submodules_of(*holders: Any) -> tuple[nn.Module, ...]:
    """Return every module below the roots that are plainly there, each once."""
    return tuple(dict.fromkeys(m for root in modules_of(*holders) for m in root.modules()))


def plainly_in(holders: Sequence[Any]) -> tuple[tuple[nn.Module, ...], bool]:
    """Root modules, and whether there are functions that may hide more."""
    roots: dict[nn.Module, None] = {}
    hidden, stack, seen = False, list(reversed(holders)), set[int]()
    while stack:
        holder = stack.pop()
        if holder is None or id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, nn.Module):
            roots[holder] = None
        elif isinstance(holder, functools.partial):
            stack.extend([holder.func, *holder.args, *holder.keywords.values()])
        elif isinstance(holder, types.MethodType):
            stack.append(holder.__self__)
        else:
            before = len(stack)
            for name, inside in reversed(getattr(holder, "__dict__", {}).items()):
                if inside is not None and (name in _HOLDERS or isinstance(inside, nn.Module)):
                    stack.append(inside)
            if len(stack) == before:
                hidden = hidden or callable(holder) or hasattr(holder, "attribute")
    return tuple(roots), hidden


@contextmanager
def run_modules() -> Iterator[list[nn.Module]]:
    """Collect the root modules that run in this thread in the block."""
    roots: list[nn.Module] = []
    known: set[nn.Module] = set()
    owner = threading.get_ident()

    def on_call(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == owner and module not in known:
            roots.append(module)
            known.update(module.modules())

    handle = register_module_forward_pre_hook(on_call)
    try:
        yield roots
    finally:
        handle.remove()
