"""Python's global generator, read and put back at the cost of a copy of its memory.

``random.getstate`` and ``setstate`` go through 625 Python numbers, which takes as long as a layer
of a small model. CPython keeps them as one block at the end of the generator's C struct; that it
does is seen before it is relied upon, and elsewhere the two functions are used.
"""

import ctypes
import functools
import random
import struct
import sys
from _random import Random as Base
from dataclasses import dataclass
from typing import Any

# Mersenne Twister: a position and 624 words.
_LAYOUT = "=i624I"
_SIZE = struct.calcsize(_LAYOUT)


@dataclass(frozen=True)
class PythonState:
    """The memory of the Mersenne Twister and the second half of a pair of Gaussians, if kept."""

    memory: bytes
    gauss: float | None
    other: Any = None  # the state as Python gives it, where its memory is not known

    @classmethod
    def now(cls) -> "PythonState":
        """Read the generator."""
        address = _address()
        if address is None:
            return cls(b"", None, random.getstate())
        return cls(ctypes.string_at(address, _SIZE), _generator().gauss_next)

    def restore(self) -> None:
        """Put the generator back."""
        address = _address()
        if address is None:
            random.setstate(self.other)
            return
        ctypes.memmove(address, self.memory, _SIZE)
        _generator().gauss_next = self.gauss


def _generator() -> Any:
    return getattr(random, "_inst", None)


@functools.cache
def _address() -> int | None:
    generator = _generator()
    inside = range(_SIZE, _SIZE + struct.calcsize("P"))  # the block, padded
    if (
        sys.implementation.name != "cpython"
        or not isinstance(generator, Base)
        or Base.__basicsize__ - object.__basicsize__ not in inside
    ):
        return None
    address = id(generator) + object.__basicsize__
    position, *words = struct.unpack(_LAYOUT, ctypes.string_at(address, _SIZE))
    known: Any = generator.getstate()[1]
    return address if (*words, position) == known else None
