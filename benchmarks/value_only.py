"""Attributions alone: expected gradients beside Captum's GradientShap and SHAP's GradientExplainer.

Time at equal samples, under ``torch.no_grad``, on an MLP and a convolutional network with ten
outputs: one output of 64 examples beside GradientShap, all ten of 8 examples beside
GradientExplainer, which explains every output (and one output, on a network that has no more). The
estimator is the default, which needs fewer samples for the same error
(``estimator_efficiency.py``). Runs take turns; medians of the processor's time.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shap
import torch
from _common import in_turns, parser, ratio, save, save_plot, show
from _networks import CLASSES, Network, cnn, mlp
from captum.attr import GradientShap
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import ExpectedGradients

NETWORKS = {"MLP": mlp, "CNN": cnn}
COUNTS = (1, 5, 20, 50)
FEW = 8  # examples, beside SHAP


class OneOutput(nn.Module):
    """The first output alone, shape ``(batch, 1)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return one output."""
        outputs: Tensor = self.model(x)
        return outputs[:, :1]


def runs_of(network: Network, n: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Ours and theirs, for each comparison."""
    torch.manual_seed(0)
    model = network.make().eval()
    single = OneOutput(model)
    x, few, background = network.x, network.x[:FEW], network.background[:200]

    def ours(forward: nn.Module, inputs: Tensor, targets: list[Any]) -> Callable[[], object]:
        explainer = ExpectedGradients(forward)

        @torch.no_grad()
        def run() -> object:
            return [explainer.attribute(inputs, background, n_samples=n, target=t) for t in targets]

        return run

    theirs = GradientShap(model)
    return {
        "GradientShap": {
            "ours": ours(model, x, [network.y]),
            "theirs": lambda: theirs.attribute(
                x.clone(), background, n_samples=n, target=network.y
            ),
        },
        "GradientExplainer, ten outputs": {
            "ours": ours(model, few, list(range(CLASSES))),
            "theirs": _shap(model, background, few, n),
        },
        "GradientExplainer, one output": {
            "ours": ours(single, few, [0]),
            "theirs": _shap(single, background, few, n),
        },
    }


def _shap(model: nn.Module, background: Tensor, x: Tensor, n: int) -> Callable[[], object]:
    explainer = shap.GradientExplainer(model, background)
    return lambda: explainer.shap_values(x.clone(), nsamples=n)


def plot(output: Path, results: dict[str, Any]) -> None:
    """Ratios against the number of samples."""
    figure = Figure(figsize=(10, 4))
    for axes, (name, found) in zip(figure.subplots(1, 2), results.items(), strict=True):
        for peer, ratios in found.items():
            axes.loglog(list(ratios), [r["ratio"] for r in ratios.values()], "o-", label=peer)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(title=name, xlabel="samples", ylabel="time of theirs over ours")
    axes.legend(fontsize=7)
    save_plot(output, "value_only", figure)


def main() -> None:
    """Run and report."""
    options = parser(__doc__).parse_args()
    np.random.seed(0)  # noqa: NPY002 - SHAP and Captum draw from it
    counts = COUNTS[1:3] if options.quick else COUNTS
    budget = 1.0 if options.quick else 6.0  # seconds for the rounds of one comparison
    results: dict[str, Any] = {}
    for name, make in NETWORKS.items():
        results[name] = {}
        for n in counts:
            for peer, runs in runs_of(make(), n).items():
                start = time.process_time()
                for run in runs.values():
                    run()
                rounds = min(200, max(5, int(budget / (time.process_time() - start))))
                seconds, again = in_turns(runs, rounds, time.process_time, "theirs")
                results[name].setdefault(peer, {})[n] = {
                    "milliseconds": {k: 1e3 * float(np.median(s)) for k, s in seconds.items()},
                    "ratio": ratio(seconds["theirs"], seconds["ours"]),
                    "A/A": again,
                }
    rows = [
        [f"{name}, {peer}", n, found["ratio"], found["A/A"]["theirs"]]
        for name, by_peer in results.items()
        for peer, by_count in by_peer.items()
        for n, found in by_count.items()
    ]
    show("Time of theirs over ours", ["", "samples", "theirs / ours", "A/A: theirs"], rows)
    settings = {**vars(options), "shap": shap.__version__, "examples beside SHAP": FEW}
    save(options.output, "value_only", settings, results)
    plot(options.output, results)


if __name__ == "__main__":
    main()
