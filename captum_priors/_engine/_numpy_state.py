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

    generator: Any
    memory: bytes
    gauss: float | None
    other: Any = None  # the whole state, where the user chose another kind of generator
    seeded: bytes | None = None  # the memory that seeding has left in place of this one

    @classmethod
    def now(cls) -> "NumPyState":
        """Read the generator without moving it."""
        generator, address = _generator()
        if address is None:
            return cls(generator, b"", None, np.random.get_state(legacy=False))
        memory = ctypes.string_at(address, _SIZE)
        state = cls(generator, memory, _take_waiting(address))
        state.restore()
        return state

    @classmethod
    def before_seeding(cls, seed: int) -> "NumPyState":
        """Read the generator and seed it, which drops any Gaussian that waits."""
        generator, address = _generator()
        if address is None:
            state = cls.now()
            np.random.seed(seed)
            return state
        memory = ctypes.string_at(address, _SIZE)
        waiting = _take_waiting(address)
        np.random.seed(seed)
        return cls(generator, memory, waiting, seeded=ctypes.string_at(address, _SIZE))

    def moved(self, later: "NumPyState") -> bool:
        """Whether the generator has been drawn from between the two."""
        mine, theirs = ((s.memory, s.gauss, pickle.dumps(s.other)) for s in (self, later))
        return mine != theirs

    def restore(self) -> None:
        """Put the generator back."""
        now, address = _generator()
        if now is not self.generator:
            random: Any = np.random  # its stubs lack this function
            random.set_bit_generator(self.generator)
            address = _generator()[1]
        if address is None:
            np.random.set_state(self.other)
            return
        nothing_drawn = self.seeded is not None and self.seeded == ctypes.string_at(address, _SIZE)
        if not nothing_drawn and _take_waiting(address) is None:
            np.random.standard_normal()  # the twin of the one that was just made
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


def _generator() -> tuple[Any, int | None]:
    """Return the global generator, and the address of its memory if it is a Mersenne Twister."""
    random: Any = np.random  # its stubs lack this function
    generator = random.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return generator, None
    return generator, int(generator.ctypes.state_address)
