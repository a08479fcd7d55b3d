"""Take some examples of what travels beside the inputs: targets, extra arguments, annotations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def take(value: Any, rows: slice | Tensor, n_examples: int) -> Any:
    """Select examples of a value that has one entry for each, return anything else unchanged."""
    if isinstance(rows, slice) and rows == slice(0, n_examples):
        return value
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 0 and value.shape[0] == n_examples else value
    if isinstance(value, list) and len(value) == n_examples:
        if isinstance(rows, slice):
            return value[rows]
        return [value[i] for i in rows.tolist()]
    return value


def take_each(values: Any, rows: slice | Tensor, n_examples: int) -> Any:
    """Select examples of a value, or of each entry of a tuple of them."""
    if isinstance(values, tuple):
        return tuple(take(value, rows, n_examples) for value in values)
    return take(values, rows, n_examples)


def for_each(function: Callable[[Tensor], Tensor], values: Any, n_examples: int) -> Any:
    """Apply a function to the tensors that have one entry for each example, among them or alone."""
    if isinstance(values, tuple):
        return tuple(for_each(function, value, n_examples) for value in values)
    if isinstance(values, Tensor) and values.dim() > 0 and values.shape[0] == n_examples:
        return function(values)
    return values


def tile(value: Any, times: int, n_examples: int) -> Any:
    """Repeat a value that has one entry for each example, as a whole, ``times`` times."""
    if times == 1:
        return value
    if isinstance(value, Tensor):
        if value.dim() > 0 and value.shape[0] == n_examples:
            return torch.cat([value] * times)
        return value
    return value * times if isinstance(value, list) and len(value) == n_examples else value


def length_of(rows: slice, n_examples: int) -> int:
    """Count the examples that a slice selects."""
    return len(range(*rows.indices(n_examples)))
