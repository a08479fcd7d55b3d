"""Random streams: what a prior draws must not move the streams that training draws from."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._engine._numpy_state import NumPyState
from captum_priors._engine._python_state import PythonState

# NumPy's seeds have 32 bits.
_WORD = 0xFFFFFFFF
# The default generators belong to the process, so two priors in two threads take turns.
_turn = threading.RLock()


@dataclass(frozen=True)
class GlobalRandomState:
    """The state of every global generator that an attribution may draw from."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: NumPyState
    python: PythonState

    @classmethod
    def now(cls) -> "GlobalRandomState":
        """Read the generators without moving them."""
        return cls(*_of_torch(), NumPyState.now(), PythonState.now())

    @classmethod
    def before_seeding(cls, seed: int) -> "GlobalRandomState":
        """Read the generators and seed them."""
        state = cls(*_of_torch(), NumPyState.before_seeding(seed & _WORD), PythonState.now())
        _seed_torch(seed)
        random.seed(seed)
        return state

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        self.numpy.restore()
        self.python.restore()

    def moved(self) -> bool:
        """Whether any generator has been drawn from since."""
        now = GlobalRandomState.now()
        ours = (self.cpu, *self.cuda)
        theirs = (now.cpu, *now.cuda)
        return (
            any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
            or self.numpy.moved(now.numpy)
            or self.python != now.python
        )


def _cuda_is_in_use() -> bool:
    in_use: Callable[[], bool] = torch.cuda.is_initialized
    return in_use()


def _of_torch() -> tuple[Tensor, tuple[Tensor, ...]]:
    cuda = torch.cuda.get_rng_state_all() if _cuda_is_in_use() else []
    return torch.get_rng_state(), tuple(cuda)


def _seed_torch(seed: int) -> None:
    """Seed torch's generators; its own ``manual_seed`` also queues work for idle GPUs."""
    torch.default_generator.manual_seed(seed)
    if _cuda_is_in_use():
        torch.cuda.manual_seed_all(seed)


def seed_global(seed: int) -> None:
    """Seed every global generator."""
    _seed_torch(seed)
    np.random.seed(seed & _WORD)
    random.seed(seed)


def in_turn() -> AbstractContextManager[Any]:
    """Lock the global generators against all other code of this package that swaps them."""
    return _turn


@contextmanager
def swapped_in(seed: int) -> Iterator[None]:
    """Draw from the given seed for the duration; the global streams are left in place."""
    with _turn:
        before = GlobalRandomState.before_seeding(seed)
        try:
            yield
        finally:
            before.restore()


def mixed(seed: int, step: int) -> int:
    """Spread (seed, step) over 63 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & ((1 << 63) - 1)


class Counter(nn.Module):
    """A step counter kept in the ``state_dict``; the host reads it every step, so on the CPU.

    It is no buffer: those are moved with the model, and broadcast by ``DistributedDataParallel``,
    which NCCL does not do on the CPU.
    """

    step: Tensor
    _kept: tuple[str, ...] = ("step",)

    def __init__(self) -> None:
        super().__init__()
        self.step = torch.tensor(0, device="cpu")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: getattr(self, name) for name in self._kept})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        for name in self._kept:
            if prefix + name in state_dict:
                getattr(self, name).copy_(state_dict[prefix + name])
            elif strict:
                missing.append(prefix + name)

    def __int__(self) -> int:
        return int(self.step)

    def advance(self) -> None:
        """Count one step."""
        self.step.add_(1)  # `+=` would also go through nn.Module's search for parameters


class RandomStream(Counter):
    """A stream of seeds, one for each training step, kept in the ``state_dict``.

    Evaluation (``advance=False``) uses one seed of its own, so that validating in between does not
    change what training draws.
    """

    seed: Tensor
    _kept = ("step", "seed")

    def __init__(self, name: str) -> None:
        super().__init__()
        # The name keeps nested priors (a subsample of an attribution prior) from sharing draws.
        seed = (torch.initial_seed() ^ crc32(name.encode())) & ((1 << 63) - 1)
        self.seed = torch.tensor(seed, device="cpu")

    def next_seed(self, *, advance: bool, rank: int = 0) -> int:
        """Seed of the current step, another for each process that has examples of its own."""
        seed = self.peek(advance=advance, rank=rank)
        if advance:
            self.advance()
        return seed

    def peek(self, *, advance: bool, rank: int = 0) -> int:
        """Seed that the next call will get."""
        seed = mixed(int(self.seed), int(self) if advance else -1)
        return mixed(seed, rank) if rank else seed


class GeneratorState(nn.Module):
    """The state of a user's generator, kept in the ``state_dict`` of what draws from it."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def get_extra_state(self) -> Tensor:
        """Return the state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Put the generator into the state, which may have been loaded to another device."""
        self.generator.set_state(state.cpu())
