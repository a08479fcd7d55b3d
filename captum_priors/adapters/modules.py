"""The modules of a network that Captum explains: what it leaves on them, and layers run twice."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from captum_priors.engine._torch import hooks_of


@contextmanager
def put_back(
    modules: Iterable[nn.Module], marked: Iterable[nn.Module] = (), names: tuple[str, ...] = ()
) -> Iterator[None]:
    """Take off what Captum leaves on modules: it holds the graph alive.

    Args:
        modules: From these, hooks of Captum's that are new. A model's own hooks stay.
        marked: From these, the attributes of these names; those that were there are put back, and
            with them the state of LRP's rules, which Captum takes away from the user.
        names: Attributes that the method sets.

    Yields:
        Nothing.
    """
    before = [(hooks, set(hooks)) for module in modules for hooks in hooks_of(module)]
    attributes = [(vars(m), {k: vars(m)[k] for k in names if k in vars(m)}) for m in marked]
    rules = [known["rule"] for _, known in attributes if hasattr(known.get("rule"), "__dict__")]
    states = [(vars(rule), dict(vars(rule))) for rule in rules]
    try:
        yield
    finally:
        for hooks, keys in before:
            for key in [k for k, hook in hooks.items() if k not in keys and _is_captum(hook)]:
                del hooks[key]
        for now, known in attributes:
            for name in names:
                now.pop(name, None)
            now.update(known)
        for now, known in states:
            now.clear()
            now.update(known)


def _is_captum(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("captum.")


@contextmanager
def watched(layers: Iterable[nn.Module], again: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call ``again`` with a layer that runs a second time under one hook of Captum's.

    Captum hooks a layer anew for each forward pass, and the second run overwrites the first.
    """
    last: dict[nn.Module, set[int]] = {}

    def ran(layer: nn.Module, args: Any, output: Any) -> None:
        now = _keys(layer) - before[layer]
        if now and now == last.get(layer):
            again(layer)
        last[layer] = now

    handles = [layer.register_forward_hook(ran) for layer in layers]
    before = {layer: _keys(layer) for layer in layers}
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keys(module: nn.Module) -> set[int]:
    return {key for hooks in hooks_of(module) for key in hooks}


_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def warn_once(model: Any, message: str) -> None:
    """Warn of what is incomplete about a model, the first time only."""
    said = _said.setdefault(model, set()) if isinstance(model, nn.Module) else set[str]()
    if message not in said:
        said.add(message)
        warnings.warn(message, UserWarning, stacklevel=2)


def path_of(module: nn.Module, model: Any) -> str:
    """Name a module of a model: its path, and its type."""
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    path = next((path for path, each in named if each is module), "")
    kind = type(module).__name__
    return f"{path} ({kind})" if path else kind
