"""Take off the modules what a method leaves on them: it holds the graph alive."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Attributes that the DeepLift family and LRP set on modules; some of their classes forget them
# there, and LRP deletes the rules that the user chose.
_SET = ("input", "input_ref", "output", "activations", "rule")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def modules_put_back(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    """Put hooks, attributes and LRP's rules back as they were before the block."""
    hooks = {(module, name): set(getattr(module, name)) for module in modules for name in _HOOKS}
    attributes = {module: _known(module) for module in modules}
    rules = [known.get("rule") for known in attributes.values()]
    inside = [(rule, dict(vars(rule))) for rule in rules if hasattr(rule, "__dict__")]
    try:
        yield
    finally:
        for (module, name), keys in hooks.items():
            now = getattr(module, name)
            for key in [key for key in now if key not in keys]:
                del now[key]
        for module, known in attributes.items():
            for name in _SET:
                vars(module).pop(name, None)
            vars(module).update(known)
        for rule, before in inside:
            vars(rule).clear()
            vars(rule).update(before)


def _known(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _SET if name in vars(module)}
