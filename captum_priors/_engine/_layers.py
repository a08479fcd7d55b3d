"""Read a layer's activation, and run a model with it replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from captum_priors._errors import expected_found


@contextmanager
def _hooked(layer: nn.Module, hook: Any, *, to_input: bool) -> Iterator[None]:
    if to_input:
        handle = layer.register_forward_pre_hook(lambda module, args: hook(args))
    else:
        handle = layer.register_forward_hook(lambda module, args, output: hook(output))
    try:
        yield
    finally:
        handle.remove()


def _copied(found: Any) -> Any:
    """Copy tensors, because the operator that follows may work in place."""
    if isinstance(found, tuple):
        return tuple(map(_copied, found))
    return found.clone() if isinstance(found, Tensor) else found


@contextmanager
def recorded(layer: nn.Module, *, to_input: bool = False) -> Iterator[list[Any]]:
    """Record what the layer returns (or receives) each time it runs in this block."""
    seen: list[Any] = []
    with _hooked(layer, lambda found: seen.append(_copied(found)), to_input=to_input):
        yield seen


@contextmanager
def replaced(layer: nn.Module, values: tuple[Tensor, ...], *, to_input: bool) -> Iterator[None]:
    """Let the layer return (or receive) the given values."""

    def hook(found: Any) -> Any:
        return _copied(values) if to_input or isinstance(found, tuple) else values[0].clone()

    with _hooked(layer, hook, to_input=to_input):
        yield


def only_activation(seen: list[Any]) -> tuple[Tensor, ...]:
    """Require that the layer ran once and dealt in floating-point tensors."""
    if len(seen) != 1:
        raise ValueError(
            expected_found(
                "`layer`",
                "a layer that runs once in each forward pass",
                f"{len(seen)} runs",
                "Pass a layer of the model behind forward_func that is not shared.",
            )
        )
    values = seen[0] if isinstance(seen[0], tuple) else (seen[0],)
    if not all(isinstance(v, Tensor) and v.is_floating_point() for v in values) or not values:
        raise TypeError(
            expected_found(
                "`layer`",
                "a layer that deals in a floating-point tensor or a tuple of them",
                ", ".join(type(v).__name__ for v in values) or "nothing",
                "Choose another layer, or attribute_to_layer_input.",
            )
        )
    return values
