"""Find the modules behind a callable: a prior must hold them still whatever hides them."""

import dis
import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

# Deeper nesting, or longer containers, are data rather than a way of holding a model.
_MAX_DEPTH = 6
_MAX_ITEMS = 64
# Their functions are followed into closures and defaults only: they have no user's model as global.
_LIBRARIES = frozenset({"captum", "captum_priors", "inspect", "numpy", "torch", "typing"})


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Global names that the code loads, and attributes that it looks up on anything."""
    loaded, looked_up = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            loaded.add(str(step.argval))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            looked_up.add(str(step.argval))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            loaded |= inner[0]
            looked_up |= inner[1]
    return frozenset(loaded), frozenset(looked_up)


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name of the enclosing function that is not bound yet
            continue
    yield from function.__defaults__ or ()
    yield getattr(function, "__wrapped__", None)
    if str(function.__module__).partition(".")[0] in _LIBRARIES:
        return
    loaded, looked_up = _names(function.__code__)
    for name in loaded & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):  # package.model: only what the code looks up
            found = (value.__dict__.get(attribute) for attribute in looked_up)
            yield from (v for v in found if isinstance(v, nn.Module))
        else:
            yield value


def _children(holder: Any) -> Iterator[Any]:
    if isinstance(holder, functools.partial):
        yield from (holder.func, holder.args, holder.keywords)
    elif isinstance(holder, types.MethodType):
        yield from (holder.__self__, holder.__func__)
    elif isinstance(holder, types.FunctionType):
        yield from _of_function(holder)
    elif isinstance(holder, (dict, list, tuple, set)):
        values = holder.values() if isinstance(holder, dict) else holder
        # Long ones are data, but a zoo of models is long, too.
        yield from (v for v in values if len(holder) <= _MAX_ITEMS or isinstance(v, nn.Module))
    elif not isinstance(holder, (type, types.ModuleType, Tensor)):
        attributes = getattr(holder, "__dict__", None)
        if isinstance(attributes, dict):  # some objects of C extensions answer anything
            yield from attributes.values()
        kind: Any = type(holder)
        for name in _slots(kind):
            yield getattr(holder, name, None)


_known_slots: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def _slots(cls: type) -> tuple[str, ...]:
    known = _known_slots.get(cls)
    if known is not None:
        return known
    found: list[str] = []
    for each in cls.__mro__:
        slots = each.__dict__.get("__slots__", ())
        found.extend((slots,) if isinstance(slots, str) else slots)
    _known_slots[cls] = tuple(found)
    return _known_slots[cls]


def modules_of(*holders: Any) -> tuple[nn.Module, ...]:
    """Root modules that the holders (explainers, functions, closures, partials) refer to."""
    roots: dict[int, nn.Module] = {}
    seen: set[int] = set()
    queue = deque((holder, 0) for holder in holders)
    while queue:  # breadth first: what is near is found whatever else refers to it from afar
        holder, depth = queue.popleft()
        if holder is None or isinstance(holder, (str, bytes, int, float)) or id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, nn.Module):
            roots[id(holder)] = holder
        elif depth < _MAX_DEPTH:
            queue.extend((child, depth + 1) for child in _children(holder))
    return tuple(roots.values())


def submodules_of(*holders: Any) -> tuple[nn.Module, ...]:
    """Every module below the roots, each once."""
    found: dict[int, nn.Module] = {}
    stack = list(reversed(modules_of(*holders)))
    while stack:  # as root.modules() goes, without the names that it puts together on the way
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            stack.extend(m for m in reversed(module._modules.values()) if m is not None)
    return tuple(found.values())
