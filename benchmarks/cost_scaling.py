"""How the cost of a training step with an expected-gradients prior grows.

With the batch, the features, the samples and the parameters, one at a time, on MLPs: the exponent
of a power law fitted to the medians of the processor's time, for the plain step, the prior's
gradient with each differentiation, that of the published loop (``--authors-code``: its authors'
own), and values alone; and the ratio to the plain step. One is proportional; less means that a part
of the cost is fixed. (Parameters: the width of the hidden layers grows, their number stays.)
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import in_turns, parser, ratio, save, save_plot, show
from _networks import mlp
from _published import MakeLoop, add_option, loop_from
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from captum_priors import AttributionPrior, ExpectedGradients

WAYS = ("double_backprop", "recompute", "finite_difference")
BASE = {"batch": 128, "features": 256, "samples": 8, "width": 256}
# Sizes at which the arithmetic outweighs what a call costs anyway.
GRID = {
    "batch": (64, 128, 256, 512),
    "features": (256, 1024, 4096, 16384),
    "samples": (4, 8, 16, 32),
    "width": (256, 512, 1024),
}


def runs_of(
    make_loop: MakeLoop, *, batch: int, features: int, samples: int, width: int
) -> tuple[Any, int]:
    """Each kind of step, and the number of parameters."""
    network = mlp(batch, features, width, n_background=max(1000, batch * samples))
    torch.manual_seed(0)
    model = network.make()
    parameters = list(model.parameters())

    def plain() -> object:
        loss = F.cross_entropy(model(network.x), network.y)
        return torch.autograd.grad(loss, parameters)

    def prior(way: Any) -> Callable[[], object]:
        made = AttributionPrior(
            ExpectedGradients(model, differentiation=way),
            network.penalty,
            n_samples=samples,
            baselines=network.background,
        )

        def run() -> object:
            value = made(network.x, target=network.y)
            return torch.autograd.grad(value, parameters, allow_unused=True)

        return run

    explainer = ExpectedGradients(model)

    @torch.no_grad()
    def values() -> object:
        return explainer.attribute(network.x, network.background, samples, target=network.y)

    loop = make_loop(network.background, batch, samples)

    def published() -> object:
        value = network.penalty(loop.attribute(model, network.x, network.y)).mean()
        return torch.autograd.grad(value, parameters, allow_unused=True)

    ways = {way: prior(way) for way in WAYS}
    runs = {"plain step": plain, "published loop": published, **ways, "values": values}
    return runs, sum(p.numel() for p in parameters)


def main() -> None:
    """Run and report."""
    arguments = parser(__doc__)
    add_option(arguments)
    options = arguments.parse_args()
    make_loop = loop_from(options.authors_code)
    rounds = 3 if options.quick else 9
    results: dict[str, Any] = {}
    for axis, values in GRID.items():
        sizes: list[int] = []
        measured: list[dict[str, Any]] = []
        for value in values[:2] if options.quick else values:
            runs, n_parameters = runs_of(make_loop, **{**BASE, axis: value})
            for run in runs.values():
                run()
            seconds, again = in_turns(runs, rounds, time.process_time, "plain step")
            over = {name: ratio(each, seconds["plain step"]) for name, each in seconds.items()}
            measured.append({"seconds of rounds": seconds, "over plain": over, "A/A": again})
            sizes.append(n_parameters if axis == "width" else value)
        name = "parameters" if axis == "width" else axis
        times = {
            kind: [statistics.median(each["seconds of rounds"][kind]) for each in measured]
            for kind in measured[0]["over plain"]
        }
        results[name] = {
            "sizes": sizes,
            "seconds": times,
            "exponents": {  # slopes of log time over log size
                kind: float(np.polyfit(np.log(sizes), np.log(each), 1)[0])
                for kind, each in times.items()
            },
            "measured": dict(zip(map(str, sizes), measured, strict=True)),
        }
    kinds = list(results["batch"]["exponents"])
    rows = [[name, *found["exponents"].values()] for name, found in results.items()]
    show("Fitted exponents of the time", ["", *kinds], rows)
    rows = [
        [f"{size} {name}", *each["over plain"].values(), each["A/A"]["plain step"]]
        for name, found in results.items()
        for size, each in found["measured"].items()
    ]
    show("Time over the plain step", ["", *kinds, "A/A"], rows)
    save(options.output, "cost_scaling", vars(options) | {"base": BASE}, results)
    plot(options.output, results)


def plot(output: Path, results: dict[str, Any]) -> None:
    """Times, with their quartiles, and medians of the ratios to the plain step."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    for above, below, (name, found) in zip(*figure.subplots(2, 4), results.items(), strict=True):
        measured = found["measured"].values()
        for kind, medians in found["seconds"].items():
            rounds = [each["seconds of rounds"][kind] for each in measured]
            low, high = np.quantile(rounds, (0.25, 0.75), axis=1)
            ends = (medians - low, high - medians)
            above.errorbar(found["sizes"], medians, ends, fmt="o-", label=kind)
            below.plot(found["sizes"], [each["over plain"][kind] for each in measured], "o-")
        for axes, label in ((above, "seconds"), (below, "over the plain step")):
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
            axes.set_xticks(found["sizes"], [f"{size:,}" for size in found["sizes"]])
            axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save_plot(output, "cost_scaling", figure)


if __name__ == "__main__":
    main()
