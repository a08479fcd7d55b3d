"""Find the modules behind a callable: a prior must hold them still whatever hides them."""

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Deeper nesting, or longer containers, are data rather than a way of holding a model.
_MAX_DEPTH = 6
_MAX_ITEMS = 64


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> frozenset[str]:
    names = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return frozenset(names)


def _children(holder: Any) -> Iterator[Any]:
    if isinstance(holder, functools.partial):
        yield from (holder.func, holder.args, holder.keywords)
    elif isinstance(holder, types.MethodType):
        yield from (holder.__self__, holder.__func__)
    elif isinstance(holder, types.FunctionType):
        for cell in holder.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a name of the enclosing function that is not bound yet
                continue
        yield from holder.__defaults__ or ()
        for name in _global_names(holder.__code__):
            if name in holder.__globals__:
                yield holder.__globals__[name]
        if hasattr(holder, "__wrapped__"):
            yield holder.__wrapped__
    elif isinstance(holder, dict):
        if len(holder) <= _MAX_ITEMS:
            yield from holder.values()
    elif isinstance(holder, (list, tuple, set)):
        if len(holder) <= _MAX_ITEMS:
            yield from holder
    elif not isinstance(holder, (type, types.ModuleType, Tensor)):
        yield from getattr(holder, "__dict__", {}).values()


def modules_of(*holders: Any) -> tuple[nn.Module, ...]:
    """Root modules that the holders (explainers, functions, closures, partials) refer to."""
    roots: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def visit(holder: Any, depth: int) -> None:
        if holder is None or id(holder) in seen or isinstance(holder, (str, bytes, int, float)):
            return
        seen.add(id(holder))
        if isinstance(holder, nn.Module):
            roots[id(holder)] = holder
        elif depth < _MAX_DEPTH:
            for child in _children(holder):
                visit(child, depth + 1)

    for holder in holders:
        visit(holder, 0)
    return tuple(roots.values())


def submodules_of(*holders: Any) -> tuple[nn.Module, ...]:
    """Every module below the roots, each once."""
    modules = {id(module): module for root in modules_of(*holders) for module in root.modules()}
    return tuple(modules.values())
