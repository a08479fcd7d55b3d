"""Slopes of a number by difference quotients, each evaluation from one and the same state."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Evaluate = Callable[[], Tensor]


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
# alone. Nowhere may the slope be in doubt by more.
CLAIM, UNSTEADY = 0.25, 0.02
_ORDER = ("constant", "right", "undecided", "wrong", "not finite")


class Finding(NamedTuple):
    """What is said about a gradient."""

    verdict: str
    error: float  # relative to the slope
    slopes: tuple[float, float]  # the derivative by the gradient, and by differences


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

    def judge(self, tolerance: float, floor: float) -> Finding:
        """Compare the derivative with the slope; what is below the floor counts as zero."""
        first, longest = self.steps[0], max(self.steps)
        if abs(self.derivative) > floor:
            for step in self.steps:
                found = self._finding("right", self.at(step)[0], floor)
                if found.error <= tolerance:
                    return found
        elif self._is_zero(first, 0, floor):
            flat = self._is_zero(first, 1, floor) and self._is_zero(longest, 0, floor)
            if flat or self._stands_still():
                return Finding("constant", 0.0, (self.derivative, self.at(first)[0]))
        doubt, slope = min(self._doubts())
        gap = abs(self.derivative - slope)
        wrong = gap > max(2 * doubt + floor, self.claim * abs(slope))
        steady = doubt <= UNSTEADY * abs(slope)  # a kink looks like a slope that is not
        return self._finding("wrong" if wrong and steady else "undecided", slope, floor)

    def _is_zero(self, step: float, which: int, floor: float) -> bool:
        """Whether the slope (0), or what it differs by on both sides (1), is but rounding."""
        return abs(self.at(step)[which]) <= floor + self.rounding(step)

    def _stands_still(self) -> bool:
        """Whether the value does not change at all on some steps; on longer ones it may jump."""
        return any(self.at(step) == (0, 0) for step in self.steps)

    def _finding(self, verdict: str, slope: float, floor: float) -> Finding:
        error = abs(self.derivative - slope) / (max(abs(slope), self.typical, floor) or 1.0)
        error = error if math.isfinite(error) else math.inf
        return Finding(verdict, error, (self.derivative, slope))

    def _doubts(self) -> Iterator[tuple[float, float]]:
        """How far slopes may be from the truth, by what the next longer step says, and they."""
        steps = sorted(self.steps)
        jumps = self._stands_still() and any(self.at(step)[0] for step in steps)
        for short, long in itertools.pairwise(steps):
            (slope, bend), (other, longer) = self.at(short), self.at(long)
            # A kink is as much steeper above in the limit that no step shrinks.
            kink = abs(long * bend - short * longer) / (long - short)
            doubt = abs(slope - other) + kink / 2 + self.rounding(short)
            yield (math.inf if jumps or not math.isfinite(doubt) else doubt), slope


def judged(
    evaluate: Evaluate,
    start: Tensor,
    named: Sequence[tuple[str, Tensor]],
    gradients: Sequence[Tensor | None],
    tolerance: float | None,
    seed: int,
    still: Mapping[Tensor, int],
) -> dict[str, Finding]:
    """Judge the gradient of each tensor.

    A random direction sees what any part of a gradient lacks, one that is mostly the gradient's own
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
        for share in (0, 2):
            direction = random_like(tensor, generator, still)
            direction /= direction.norm()
            if gradient is not None and gradient.any():
                direction += share * gradient / gradient.norm()
            direction *= length / direction.norm()
            lines[name].append(Line(evaluate, start, tensor, gradient, direction))
    largest = max((line.size() for each in lines.values() for line in each), default=0.0)
    found: dict[str, Finding] = {}
    for (name, tensor), gradient in zip(named, gradients, strict=True):
        accepted = TOLERANCE[tensor.dtype] if tolerance is None else tolerance
        each = [line.judge(accepted, 1e-3 * accepted * largest) for line in lines[name]]
        each = each or [Finding("not finite", math.inf, (math.nan, math.nan))]
        worst = max(each, key=lambda f: (_ORDER.index(f.verdict), f.error))
        if worst.verdict == "wrong" and (gradient is None or not gradient.any()):
            worst = worst._replace(verdict="missing")
        found[name] = worst
    return found
