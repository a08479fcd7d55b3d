"""Vocabulary: the shapes of the things that the package passes around."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from torch import Tensor

TensorOrTuple: TypeAlias = Tensor | tuple[Tensor, ...]
"""One tensor, or a tuple of tensors that share their batch dimension."""

Target: TypeAlias = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
"""Captum's spellings of which output is explained."""

Differentiation: TypeAlias = Literal["double_backprop", "recompute", "finite_difference"]
"""How the parameter gradient of an input gradient is taken."""

DIFFERENTIATIONS: Sequence[str] = ("double_backprop", "recompute", "finite_difference")

Penalty: TypeAlias = Callable[..., Tensor]
"""``penalty(attributions, **annotations)`` of shape ``(batch,)``, or ``()`` for the batch."""

Distance: TypeAlias = Callable[..., Tensor]
"""``distance(attributions, other)`` of shape ``(batch,)``."""
