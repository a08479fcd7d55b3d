"""Peak memory and time of a training step with a prior, by number of path steps or samples.

Each configuration runs in a process of its own: what a step adds to the resident memory left by
plain training steps, and the largest sum of bytes that live tensors held during it. Times are
those of steps that take turns in one process.
"""

import argparse
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import in_turns, parser, ratio, save, save_plot, show
from captum.attr import IntegratedGradients
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_priors import AttributionPrior, ExpectedGradients, differentiable
from captum_priors.penalties import l2

BATCH = 32
LIMIT_MB = 6000
EXPLAINERS = ("IntegratedGradients", "ExpectedGradients")
WAYS = ("double_backprop", "recompute", "finite_difference")


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators return, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: object) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size


def training_steps(
    explainer: str, way: Any, n: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A plain training step of a small CNN, and one with a prior."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    if explainer == "IntegratedGradients":
        twin = differentiable(IntegratedGradients(model), differentiation=way)
        prior = AttributionPrior(twin, l2, n_steps=n, baselines=torch.zeros_like(x))
    else:
        twin = ExpectedGradients(model, differentiation=way)
        prior = AttributionPrior(twin, l2, n_samples=n, baselines=torch.rand(200, 1, 28, 28))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step(penalty: Callable[[], Tensor | float]) -> None:
        loss = F.cross_entropy(model(x), y) + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return lambda: step(lambda: 0.0), lambda: step(lambda: prior(x, target=y))


def memory_of_process(field: str) -> float:
    """Megabytes from Linux's books: now (VmRSS) or at most so far (VmHWM).

    Not ``getrusage``, whose maximum a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def measure(explainer: str, way: str, n: int) -> dict[str, float]:
    """Peak megabytes of one step; meaningful once in a process."""
    plain, step = training_steps(explainer, way, n)
    for _ in range(3):
        plain()
    before = memory_of_process("VmRSS")
    step()
    resident = memory_of_process("VmHWM") - before
    with LiveBytes() as tensors:
        step()
    return {"resident": resident, "tensors": tensors.peak / 2**20}


def in_fresh_process(explainer: str, way: str, n: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--child", explainer, way, str(n)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(explainer: str, way: str, counts: list[int]) -> dict[int, dict[str, float]]:
    """Peaks by count, as far as they fit."""
    found: dict[int, dict[str, float]] = {}
    mb_each = 0.0
    for n in counts:
        if n * mb_each > LIMIT_MB:
            break
        found[n] = in_fresh_process(explainer, way, n)
        mb_each = found[n]["resident"] / n
    return found


def relative_times(explainer: str, n: int, rounds: int) -> dict[str, Any]:
    """Time of a step, over that with ``double_backprop``."""
    steps = {way: training_steps(explainer, way, n)[1] for way in WAYS}
    for step in steps.values():
        step()
    seconds, again = in_turns(steps, rounds, time.process_time, WAYS[0])
    return {w: ratio(seconds[w], seconds[WAYS[0]]) for w in WAYS[1:]} | {"A/A": again}


def megabytes(peak: dict[str, float] | None) -> str:
    """Both peaks, or a dash where they were not measured."""
    return "-" if peak is None else f"{peak['resident']:.0f} / {peak['tensors']:.0f}"


def plot(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Peaks against the count."""
    figure = Figure(figsize=(10, 4))
    for axes, explainer in zip(figure.subplots(1, 2), EXPLAINERS, strict=True):
        for way in WAYS:
            peaks = results[explainer]["peak_mb"][way]
            for measure_, style in (("resident", "o-"), ("tensors", "x--")):
                each = [peak[measure_] for peak in peaks.values()]
                axes.loglog(list(peaks), each, style, label=f"{way}, {measure_}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=explainer, xlabel="steps or samples", ylabel="peak MB above plain training")
    axes.legend(fontsize=7)
    save_plot(args.output, "recompute_memory", figure)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.child:
        explainer, way, n = args.child
        print(json.dumps(measure(explainer, way, int(n))))
        return
    counts = [16, 64, 512] if args.quick else [16, 32, 64, 128, 256, 512]
    timed, rounds = ([16], 3) if args.quick else ([16, 64], 7)
    results: dict[str, Any] = {}
    for explainer in EXPLAINERS:
        peaks = {way: memory(explainer, way, counts) for way in WAYS}
        times = {n: relative_times(explainer, n, rounds) for n in timed}
        ours = peaks["recompute"]
        growth = {m: ours[counts[-1]][m] / ours[counts[0]][m] for m in ("resident", "tensors")}
        results[explainer] = {
            "peak_mb": peaks,
            "growth_recompute": growth,
            "relative_time": times,
        }
        show(
            f"{explainer}: peak MB of a step, resident and of live tensors; from {counts[0]} to "
            f"{counts[-1]} recompute grows {growth['resident']:.2f} and {growth['tensors']:.2f} x",
            ["n", *WAYS],
            [[n, *(megabytes(peaks[w].get(n)) for w in WAYS)] for n in counts],
        )
        show(
            f"{explainer}: time of a step over double_backprop",
            ["n", *WAYS[1:], "A/A"],
            [[n, *(t[w] for w in WAYS[1:]), t["A/A"][WAYS[0]]] for n, t in times.items()],
        )
    settings = {"batch": BATCH, "limit_mb": LIMIT_MB, "counts": counts, "quick": args.quick}
    save(args.output, "recompute_memory", settings, results)
    plot(args, results)


if __name__ == "__main__":
    main()
