"""NumPy's global generator, read and put back at the cost of a copy of its memory.

NumPy's own ``get_state`` and ``set_state`` go through Python numbers, 624 of them, which takes as
long as a small model's forward pass.
"""

import ctypes
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np

# Mersenne Twister: 624 words and a position.
_SIZE = 624 * 4 + 4


@dataclass(frozen=True)
class NumPyState:
    """The memory of the Mersenne Twister and the second half of a pair of Gaussians, if kept."""

    memory: bytes
    gauss: float | None
    other: Any = None  # the whole state, where the user chose another kind of generator
    seeded: bytes | None = None  # the memory that seeding has left in place of this one

    @classmethod
    def now(cls) -> "NumPyState":
        """Read the generator without moving it."""
        address = _address()
        if address is None:
            return cls(b"", None, np.random.get_state(legacy=False))
        memory = ctypes.string_at(address, _SIZE)
        waiting = _drop_waiting(address)
        ctypes.memmove(address, memory, _SIZE)
        if waiting is not None:
            cls(memory, waiting).restore()
        return cls(memory, waiting)

    @classmethod
    def before_seeding(cls, seed: int) -> "NumPyState":
        """Read the generator and seed it, which drops any Gaussian that waits."""
        address = _address()
        if address is None:
            state = cls.now()
            np.random.seed(seed)
            return state
        memory = ctypes.string_at(address, _SIZE)
        waiting = _take_waiting(address)
        np.random.seed(seed)
        return cls(memory, waiting, seeded=ctypes.string_at(address, _SIZE))

    def moved(self, later: "NumPyState") -> bool:
        """Whether the generator has been drawn from between the two."""
        mine, theirs = ((s.memory, s.gauss, pickle.dumps(s.other)) for s in (self, later))
        return mine != theirs

    def restore(self) -> None:
        """Put the generator back."""
        address = _address()
        if address is None or self.other is not None:
            np.random.set_state(self.other)
            return
        if self.seeded is None or ctypes.string_at(address, _SIZE) != self.seeded:
            _drop_waiting(address)  # where nothing was drawn since, nothing waits
        ctypes.memmove(address, self.memory, _SIZE)
        if self.gauss is not None:
            np.random.set_state(
                {**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": self.gauss}
            )


def _take_waiting(address: int) -> float | None:
    """Take out the second half of a pair of Gaussians if it waits; else one is made that does.

    Whether one waits shows when it is asked for: only where none does the generator move.
    """
    position = ctypes.c_int.from_address(address + _SIZE - 4)
    before = position.value
    gauss = np.random.standard_normal()
    return float(gauss) if position.value == before else None


def _drop_waiting(address: int) -> float | None:
    """Take out the second half of a pair of Gaussians, if it waits, and leave none."""
    waiting = _take_waiting(address)
    if waiting is None:
        np.random.standard_normal()  # the twin of the one that was just made
    return waiting


def _address() -> int | None:
    random: Any = np.random  # its stubs lack this function
    generator = random.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return None
    return int(generator.ctypes.state_address)
