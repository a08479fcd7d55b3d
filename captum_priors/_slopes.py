"""Slopes of a number by difference quotients, each evaluation from one and the same state."""

import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_priors.engine.random import STREAMS, GlobalState

Evaluate = Callable[[], Tensor]


class _Kept:
    """What a run may change of a module: buffers, counters and streams, and ``.grad``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named = module.named_buffers(recurse=False, remove_duplicate=False)
        self.buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in named}
        counts = type(module).get_extra_state is not nn.Module.get_extra_state
        self.extra = copy.deepcopy(module.get_extra_state()) if counts else None
        self.counts = counts

    def put_back(self) -> None:
        for name, (buffer, values) in self.buffers.items():
            if getattr(self.module, name) is not buffer:
                setattr(self.module, name, buffer)
            if not torch.equal(buffer, values):
                write(buffer, values)
        if self.counts:
            self.module.set_extra_state(copy.deepcopy(self.extra))


@contextmanager
def from_one_state(
    run: Evaluate, modules: Iterable[nn.Module], tensors: Iterable[Tensor]
) -> Iterator[Evaluate]:
    """Let a function be evaluated from the present state each time, and leave that state behind.

    The state is that of the global generators, of the modules (those that run are noticed, too:
    their buffers and what they keep in ``get_extra_state``), and every ``.grad``.
    """
    generators, owner = GlobalState.now(STREAMS), threading.get_ident()
    kept: dict[nn.Module, _Kept] = {}
    grads: dict[Tensor, Tensor | None] = {}

    def lend(tensor: Tensor) -> None:
        grad = grads[tensor]
        tensor.grad = None if grad is None else grad.clone()

    def keep(module: nn.Module, args: Any = None) -> None:
        if threading.get_ident() != owner or module in kept:
            return
        kept.update({m: _Kept(m) for m in module.modules() if m not in kept})
        keep_grads(module.parameters())

    def keep_grads(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_leaf and tensor not in grads:
                grads[tensor] = tensor.grad
                lend(tensor)

    def put_back() -> None:
        generators.restore()
        for each in kept.values():
            each.put_back()

    def evaluate() -> Tensor:
        put_back()
        for tensor in grads:
            lend(tensor)
        torch.clear_autocast_cache()  # which would hold what a parameter was
        with torch.enable_grad():  # some explainers of users need it for their values
            return run()

    handle = register_module_forward_pre_hook(keep)
    try:
        for module in modules:
            keep(module)
        keep_grads(tensors)
        yield evaluate
    finally:
        handle.remove()
        put_back()
        for tensor, grad in grads.items():
            tensor.grad = grad
        torch.clear_autocast_cache()


def beside(evaluate: Evaluate, *moves: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Values on both sides: where tensors are larger, and smaller, by a step each."""
    originals = [tensor.detach().clone() for tensor, _ in moves]

    def at(sign: int) -> float:
        for (tensor, step), original in zip(moves, originals, strict=True):
            write(tensor, original + sign * step)
        return float(evaluate().detach())

    try:
        return at(1), at(-1)
    finally:
        for (tensor, _), original in zip(moves, originals, strict=True):
            write(tensor, original)


def rows_of_padding(modules: Iterable[nn.Module]) -> dict[Tensor, int]:
    """Rows of embeddings that torch gives no gradient, by choice: no slope is asked of them."""
    found = {}
    for module in {m for root in modules for m in root.modules()}:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            found[module.weight] = module.padding_idx
    return found


def random_like(
    tensor: Tensor, generator: torch.Generator, still: Mapping[Tensor, int] | None = None
) -> Tensor:
    """Normal numbers in the shape and type of a tensor, and zeros in a row that stands still."""
    random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
    if still and tensor in still:
        random[still[tensor]] = 0
    return random.to(device=tensor.device, dtype=tensor.dtype)


def write(tensor: Tensor, values: Tensor) -> None:
    """Overwrite, unnoticed by graphs that saved the tensor: they meet its own values again."""
    tensor.data.copy_(values)


# Steps along a line: the first decides where all is well, the others where it does not. Shorter
# ones leave out kinks, longer ones rounding.
STEPS = {
    torch.float64: (1e-6, 1e-7, 1e-8, 1e-5, 1e-4),
    torch.float32: (4e-3, 1e-3, 2.5e-4, 1.6e-2, 6.4e-2),
}
# Largest difference relative to the slope.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
# Steps of float32 are long enough to meet kinks: what differs by less is called wrong in float64
# alone. Nowhere may the slope change by more from one step to the next.
CLAIM, UNSTEADY = 0.25, 0.02
_ORDER = ("constant", "right", "undecided", "wrong")


class Line:
    """A value along one direction of a tensor, of the tensor's own length, and its derivative."""

    def __init__(
        self,
        evaluate: Evaluate,
        start: Tensor,
        tensor: Tensor,
        gradient: Tensor | None,
        direction: Tensor,
    ) -> None:
        self.evaluate, self.tensor, self.direction = evaluate, tensor, direction
        self.start = float(start)
        self.derivative = self.typical = 0.0
        if gradient is not None:
            self.derivative = float((gradient * direction).sum())
            length = float(gradient.norm()) * float(direction.norm())
            self.typical = length / math.sqrt(direction.numel())  # of a random direction
        coarser = max(tensor.dtype, start.dtype, key=lambda d: torch.finfo(d).eps)
        self.steps = STEPS.get(coarser, STEPS[torch.float32])
        self.claim = CLAIM if self.steps is STEPS[torch.float32] else 0.0
        self.eps = torch.finfo(coarser).eps
        self.seen: dict[float, tuple[float, float]] = {}

    def at(self, step: float) -> tuple[float, float]:
        """Slope, and how much steeper it is above than below."""
        if step not in self.seen:
            above, below = beside(self.evaluate, (self.tensor, step * self.direction))
            bend = (above - 2 * self.start + below) / step
            self.seen[step] = (above - below) / (2 * step), bend
        return self.seen[step]

    def size(self) -> float:
        """Absolute value of the larger of derivative and first slope, where they are numbers."""
        sizes = (abs(self.derivative), abs(self.at(self.steps[0])[0]))
        return max((s for s in sizes if math.isfinite(s)), default=0.0)

    def rounding(self, step: float) -> float:
        """What rounding of the value makes of a slope."""
        return 8 * self.eps * abs(self.start) / step

    def judge(self, tolerance: float, floor: float, graph: bool) -> tuple[str, float, float]:
        """Verdict on the derivative, the slope, and the difference relative to it.

        What is below the floor counts as zero. Where nothing has a graph, any slope will do.
        """
        first, longest = self.steps[0], max(self.steps)
        zero = abs(self.derivative) <= floor
        still = zero and self._stands_still()
        if self._is_zero(first, floor) and (still or self._is_zero(longest, floor)):
            kink = self._kink(first, longest)  # that of an absolute value has no slope
            if still or kink <= floor + 8 * self.rounding(first):
                return "constant", self.at(first)[0], 0.0
        if not zero:
            for step in self.steps:
                slope = self.at(step)[0]
                if self._error(slope, floor) <= tolerance:
                    return "right", slope, self._error(slope, floor)
        doubt, slope = min(self._doubts())
        gap = abs(self.derivative - slope)
        wrong = gap > 2 * doubt + floor
        if graph:
            # Many kinks look like a slope that is not quite steady, and one that a gradient does
            # not have; a small gradient may be rounding of larger ones.
            steady = doubt <= UNSTEADY * max(abs(slope), self.typical)
            least = 100 * floor if self.typical else 0.0
            wrong = wrong and steady and gap > max(least, max(tolerance, self.claim) * abs(slope))
        return ("wrong" if wrong else "undecided"), slope, self._error(slope, floor)

    def _stands_still(self) -> bool:
        """Whether the value does not change at all on short steps; on long ones it may jump."""
        return any(self.at(step) == (0, 0) for step in self.steps if step <= self.steps[0])

    def _is_zero(self, step: float, floor: float) -> bool:
        zero = floor + self.rounding(step)
        return abs(self.derivative) <= zero and abs(self.at(step)[0]) <= zero

    def _kink(self, short: float, long: float) -> float:
        """How much steeper the value is above, in the limit that no step shrinks."""
        ratio = long / short
        return abs(ratio * self.at(short)[1] - self.at(long)[1]) / (ratio - 1)

    def _error(self, slope: float, floor: float) -> float:
        error = abs(self.derivative - slope) / (max(abs(slope), self.typical, floor) or 1.0)
        return error if math.isfinite(error) else math.inf

    def _doubts(self) -> Iterator[tuple[float, float]]:
        """Slopes, and how far each may be from the truth, by what the next longer step says."""
        steps = sorted(self.steps)
        moves = any(self.at(step)[0] for step in steps)
        # Within the shortest step a value is straight: what it bends is rounding, or a kink.
        noise = 2 * steps[0] * abs(self.at(steps[0])[1])
        for short, long in itertools.pairwise(steps):
            slope, other = self.at(short)[0], self.at(long)[0]
            kink = self._kink(short, long)
            doubt = abs(slope - other) + kink / 2 + max(self.rounding(short), noise / short)
            # A value that stands still at short steps alone moves in jumps.
            jumps = moves and (slope == other == 0 or (self.derivative and self._stands_still()))
            yield (math.inf if jumps or not math.isfinite(doubt) else doubt), slope


Judged = dict[str, tuple[str, float, tuple[float, float]]]


def judged(
    evaluate: Evaluate,
    start: Tensor,
    named: Sequence[tuple[str, Tensor]],
    gradients: Sequence[Tensor | None],
    tolerance: float | None,
    seed: int,
    still: Mapping[Tensor, int],
) -> Judged:
    """For each tensor a verdict on its gradient, the error, and the derivative with the slope.

    A random direction sees what any part of a gradient lacks, one that is half the gradient's own
    sees a wrong size where a tensor is so large that a random one is nearly a right angle to it.
    """
    generator = torch.Generator().manual_seed(seed)
    size = sum(float(tensor.detach().square().sum()) for _, tensor in named)
    usual = math.sqrt(size / max(1, sum(tensor.numel() for _, tensor in named))) or 1.0
    lines: dict[str, list[Line]] = {}
    for (name, tensor), gradient in zip(named, gradients, strict=True):
        lines[name] = []
        if not start.isfinite() or (gradient is not None and not gradient.isfinite().all()):
            continue
        # Zeros are moved, too, and by less than what the others are worth.
        length = max(float(tensor.detach().norm()), 0.1 * usual * math.sqrt(tensor.numel()))
        for share in (0.0, 1.0):
            direction = random_like(tensor, generator, still)
            direction /= direction.norm()
            if gradient is not None and gradient.any():
                along = gradient / gradient.norm()
                if (direction * along).sum() < 0:  # or the two might cancel
                    direction.neg_()
                direction += share * along
            direction *= length / direction.norm()
            lines[name].append(Line(evaluate, start, tensor, gradient, direction))
    largest = max((line.size() for each in lines.values() for line in each), default=0.0)
    found: Judged = {}
    graph = any(gradient is not None for gradient in gradients)
    for (name, tensor), gradient in zip(named, gradients, strict=True):
        accepted = TOLERANCE[tensor.dtype] if tolerance is None else tolerance
        each = [
            (*line.judge(accepted, 1e-3 * accepted * largest, graph), line) for line in lines[name]
        ]
        if each:
            verdict, slope, error, line = max(each, key=lambda e: (_ORDER.index(e[0]), e[2]))
            if verdict == "wrong" and (gradient is None or not gradient.any()):
                verdict = "missing"
            found[name] = verdict, error, (line.derivative, slope)
        else:
            found[name] = "not finite", math.inf, (math.nan, math.nan)
    return found
