"""Show objects as they would be written: priors, penalties, explainers, without their tensors."""

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def shown(thing: Any) -> str:
    """Name of a function, class or object, with the options that are not its defaults."""
    if isinstance(thing, nn.Module):
        return repr(thing)
    if isinstance(thing, functools.partial):
        name, parts = (
            shown(thing.func),
            [f"{k}={shown_value(v)}" for k, v in thing.keywords.items()],
        )
    elif hasattr(thing, "__name__"):
        return str(thing.__name__)
    else:
        name = type(thing).__name__.removeprefix("Differentiable")
        inner = getattr(thing, "attribution_method", None)
        parts = [*([] if inner is None else [shown(inner)]), *shown_options(thing)]
    return f"{name}({', '.join(parts)})" if parts else name


def shown_options(thing: Any, skip: Sequence[str] = ()) -> list[str]:
    """Options of the constructor's signature that are kept and are not the default.

    Of those without a default, the numbers and words: models and data have no short form.
    """
    found = []
    options = _options(type(thing))
    options.setdefault("differentiation", "double_backprop")  # of adapters, whose class has others
    for name, default in options.items():
        value = getattr(thing, name, getattr(thing, f"_{name}", default))
        short = default is not inspect.Parameter.empty or isinstance(value, (int, float, str))
        if short and name not in skip and not same(value, default):
            found.append(f"{name}={shown_value(value)}")
    return found


def shown_value(value: Any) -> str:
    """Value as it would be written, without addresses: another process has others."""
    if isinstance(value, Tensor) or value is ...:
        return "..."
    if isinstance(value, tuple):
        inside = ", ".join(map(shown_value, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {shown_value(v)}' for k, v in value.items())}}}"
    if callable(value) and not isinstance(value, type):
        return shown(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def same(value: Any, default: Any) -> bool:
    """Whether an option has its default value; tensors never have."""
    if isinstance(value, Tensor) or type(value) is not type(default):
        return value is default
    return value is default or bool(value == default)


def _options(cls: type) -> dict[str, Any]:
    """Options with their defaults: of the class's signature, and of those it hands the rest to."""
    found: dict[str, Any] = {}
    for each in cls.__mro__:
        if "__init__" not in vars(each) or each in (nn.Module, object):
            continue
        parameters = [*inspect.signature(vars(each)["__init__"]).parameters.values()][1:]
        open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for parameter in parameters:
            if parameter.kind not in open_ended:
                found.setdefault(parameter.name, parameter.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found
