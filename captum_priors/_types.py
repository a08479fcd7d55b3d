"""Vocabulary: the shapes of the things that the package passes around."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

TensorOrTuple: TypeAlias = Tensor | tuple[Tensor, ...]
"""One tensor, or a tuple of tensors that share their batch dimension."""


class OutputTarget(ABC):
    """A target that is more than an index of one output; see :mod:`captum_priors.outputs`."""

    several: ClassVar[bool] = False  # whether there is more than one number for each row

    @abstractmethod
    def check(self, n_examples: int) -> None:
        """Require what goes with so many examples."""

    @abstractmethod
    def mapped(self, function: Callable[[Any], Any]) -> "OutputTarget":
        """Apply a function to what has an entry for each example."""

    @abstractmethod
    def select(self, outputs: Tensor) -> Any:
        """Turn outputs ``(rows, ...)`` into one number for each row, or several such."""


Target: TypeAlias = (
    int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | OutputTarget | None
)
"""Which output is explained: Captum's spellings, and what is no index."""

Differentiation: TypeAlias = Literal["double_backprop", "recompute", "finite_difference"]
"""How the parameter gradient of an input gradient is taken."""

DIFFERENTIATIONS: Sequence[str] = ("double_backprop", "recompute", "finite_difference")

Penalty: TypeAlias = Callable[..., Tensor]
"""``penalty(attributions, **annotations)`` of shape ``(batch,)``, or ``()`` for the batch."""

Distance: TypeAlias = Callable[..., Tensor]
"""``distance(attributions, other)`` of shape ``(batch,)``."""
