"""Random streams: what a prior draws must not move the streams that training draws from."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors.engine._torch import default_generator

STREAMS = ("torch", "numpy", "python")
"""Global generators that an explainer may draw from; see ``draws`` of the adapters."""


_READ_AND_PUT_BACK: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch": (torch.get_rng_state, torch.set_rng_state),
    "cuda": (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all),
    "numpy": (np.random.get_state, np.random.set_state),
    "python": (random.getstate, random.setstate),
}


@dataclass(frozen=True)
class GlobalState:
    """The state of global generators, read without moving them."""

    states: dict[str, Any]

    @classmethod
    def now(cls, streams: Sequence[str] = ("torch",)) -> "GlobalState":
        """Read the generators: torch's, and the others that are named."""
        states, of_torch = {}, ("torch", "cuda") if torch.cuda.is_initialized() else ("torch",)
        for name, (read, _) in _READ_AND_PUT_BACK.items():
            if name in of_torch or name in streams:
                states[name] = read()
        return cls(states)

    def restore(self) -> None:
        """Put the generators back."""
        for name, state in self.states.items():
            _READ_AND_PUT_BACK[name][1](state)

    def moved(self) -> bool:
        """Whether torch's generators have been drawn from since."""
        each = (self.states, GlobalState.now().states)
        before, after = ([states["torch"], *states.get("cuda", ())] for states in each)
        return not all(map(torch.equal, before, after))


def seed_global(seed: int, streams: Sequence[str] = ("torch",)) -> None:
    """Seed torch's global generators, and the others that are named."""
    default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if "numpy" in streams:
        np.random.seed(seed & 0xFFFFFFFF)  # NumPy's seeds have 32 bits
    if "python" in streams:
        random.seed(seed)


def derive(seed: int, place: int) -> int:
    """Seed of a child at this place: (seed, place) spread over 63 bits.

    The finaliser of SplitMix64 (Steele et al. 2014), a bijection of each place's seeds.
    """
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) % 2**63


class Counter(nn.Module):
    """A number kept in the ``state_dict``; no buffer, because those are moved and broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def __int__(self) -> int:
        return self.step

    def advance(self) -> None:
        """Count one."""
        self.step += 1

    def get_extra_state(self) -> Tensor:
        """Return the number, for the ``state_dict``."""
        return torch.tensor(self.step, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the number of a ``state_dict``."""
        self.step = int(state)


class Stream(Counter):
    """A stream of seeds, one for each training step, whose place is kept in the ``state_dict``.

    It starts from the state of torch's global generator, which it does not move: seeding torch and
    building again reproduces it. Streams that start from one state are told apart by their order.
    Evaluation has one seed of its own, so that its values can be compared over time.

    Example:
        >>> from captum_priors.engine import Stream
        >>> first, second = Stream(), Stream()
        >>> a, b = first.next_seed(advance=True), first.next_seed(advance=True)
        >>> a == b, a == second.next_seed(advance=True)
        (False, False)
        >>> first.next_seed(advance=False) == first.next_seed(advance=False)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        _forget_others()
        place = next(i for i in itertools.count() if i not in _started)
        _started[place] = self
        self.seed = derive(derive(torch.initial_seed() % 2**63, _origin[0]), place)

    def next_seed(self, *, advance: bool, rank: int = 0) -> int:
        """Seed of this step, another for each process (``rank``) that has examples of its own.

        Without ``advance``, as in evaluation, nothing moves.
        """
        seed = self.peek(advance=advance, rank=rank)
        self.step += advance
        return seed

    def peek(self, *, advance: bool, rank: int = 0) -> int:
        """Seed that the next call will get."""
        _forget_others()
        seed = derive(self.seed, self.step if advance else -1)
        return derive(seed, rank) if rank else seed

    def get_extra_state(self) -> Tensor:
        """Return seed and step, for the ``state_dict``."""
        return torch.tensor([self.seed, self.step], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the seed and step of a ``state_dict``."""
        self.seed, self.step = map(int, state)


# Streams that started from one state of torch's global generator, by their order, and that state.
_started: WeakValueDictionary[int, Stream] = WeakValueDictionary()
_origin = [0]


def _forget_others() -> None:
    """Start counting anew where torch's stream has gone on, or was seeded again."""
    state = crc32(torch.get_rng_state().numpy().tobytes())
    if state != _origin[0]:
        _started.clear()
        _origin[0] = state


class GeneratorState(nn.Module):
    """The state of a user's generator, kept in the ``state_dict`` of what draws from it."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def get_extra_state(self) -> Tensor:
        """Return the generator's state, for the ``state_dict``."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Put the generator into a state, which may have been loaded to another device."""
        self.generator.set_state(state.cpu())
