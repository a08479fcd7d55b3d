"""How the cost of a training step with an expected-gradients prior grows.

With the batch, the features, the samples and the parameters, one at a time, on MLPs: the exponent
of a power law fitted to the medians of the processor's time, for the plain step, the prior's
gradient with each differentiation, and values alone. One is proportional; less means that a part of
the cost is fixed. (Parameters: the width of the hidden layers grows, their number stays.)
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import interleaved, parser, save, save_plot, show
from _networks import mlp
from matplotlib.figure import Figure

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


def runs_of(*, batch: int, features: int, samples: int, width: int) -> tuple[Any, int]:
    """Each kind of step, and the number of parameters."""
    network = mlp(batch, features, width)
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

    runs = {"plain step": plain, **{way: prior(way) for way in WAYS}, "values": values}
    return runs, sum(p.numel() for p in parameters)


def exponents(sizes: list[int], seconds: dict[str, list[float]]) -> dict[str, float]:
    """Slope of log time over log size, for each kind of step."""
    return {
        name: float(np.polyfit(np.log(sizes), np.log(each), 1)[0]) for name, each in seconds.items()
    }


def main() -> None:
    """Run and report."""
    options = parser(__doc__).parse_args()
    rounds = 3 if options.quick else 9
    results: dict[str, Any] = {}
    for axis, values in GRID.items():
        sizes: list[int] = []
        seconds: dict[str, list[float]] = {}
        for value in values[:2] if options.quick else values:
            runs, n_parameters = runs_of(**{**BASE, axis: value})
            for run in runs.values():
                run()
            for name, each in interleaved(runs, rounds, time.process_time).items():
                seconds.setdefault(name, []).append(each)
            sizes.append(n_parameters if axis == "width" else value)
        name = "parameters" if axis == "width" else axis
        results[name] = {
            "sizes": sizes,
            "seconds": seconds,
            "exponents": exponents(sizes, seconds),
        }
    kinds = list(results["batch"]["exponents"])
    rows = [[name, *found["exponents"].values()] for name, found in results.items()]
    show("Fitted exponents of the time", ["", *kinds], rows)
    save(options.output, "cost_scaling", vars(options) | {"base": BASE}, results)
    plot(options.output, results)


def plot(output: Path, results: dict[str, Any]) -> None:
    """Times on logarithmic axes."""
    figure = Figure(figsize=(14, 3.5))
    for axes, (name, found) in zip(figure.subplots(1, 4), results.items(), strict=True):
        for kind, each in found["seconds"].items():
            axes.loglog(found["sizes"], each, "o-", label=kind)
        axes.set(xlabel=name, ylabel="seconds")
    axes.legend(fontsize=7)
    save_plot(output, "cost_scaling", figure)


if __name__ == "__main__":
    main()
