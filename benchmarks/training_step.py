"""Time of a training step with an expected-gradients prior.

Against the plain step, and against a step with the published loop (Erion et al. 2021, or with
``--authors-code`` that of its authors) in place of the prior: an MLP, a convolutional network and a
transformer (on the math attention kernel, without which neither runs), k = 1 and 8 samples, exact
second derivatives. Same model, batch, background and penalty; runs take turns; medians of the
processor's time. The background has 1,000 rows, and with k = 1 also 10,000: the published loop is
given the training set, and shuffles all of it at every step.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import in_turns, parser, ratio, save, save_plot, show
from _networks import Network, cnn, mlp, transformer
from _published import MakeLoop, add_option, loop_from
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_priors import AttributionPrior, ExpectedGradients, Lazy

# What to measure on, and how many rounds.
NETWORKS = {"MLP": (mlp, 100), "CNN": (cnn, 7), "transformer": (transformer, 21)}
SETTINGS = ((1, 10_000), (1, 1_000), (8, 1_000))  # samples, rows of the background
EVERY = 4
WEIGHT = 1e-3


def steps_of(network: Network, k: int, make_loop: MakeLoop) -> dict[str, Callable[[], None]]:
    """``EVERY`` training steps of each kind, each on a model of its own."""

    def steps(penalty_of: Callable[[Any], Callable[[], Tensor | float]]) -> Callable[[], None]:
        torch.manual_seed(0)
        model = network.make()
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        penalty = penalty_of(model)

        def run() -> None:
            for _ in range(EVERY):
                loss = F.cross_entropy(model(network.x), network.y) + penalty()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        return run

    def prior(model: Any, every: int) -> Callable[[], Tensor]:
        made: Any = AttributionPrior(
            ExpectedGradients(model), network.penalty, n_samples=k, baselines=network.background
        )
        made = WEIGHT * (made if every == 1 else Lazy(made, every))
        return lambda: made(network.x, target=network.y)

    def published(model: Any) -> Callable[[], Tensor]:
        loop = make_loop(network.background, len(network.x), k)

        def penalty() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # which a prior sees to itself
                attributions = loop.attribute(model, network.x, network.y)
            return WEIGHT * network.penalty(attributions).mean()

        return penalty

    return {
        "plain": steps(lambda model: lambda: 0.0),
        "published loop": steps(published),
        "prior": steps(lambda model: prior(model, 1)),
        f"prior, Lazy({EVERY})": steps(lambda model: prior(model, EVERY)),
    }


def measure(network: Network, k: int, rounds: int, make_loop: MakeLoop) -> dict[str, Any]:
    """Milliseconds of a step of each kind, and the ratios."""
    runs = steps_of(network, k, make_loop)
    for run in runs.values():
        run()
    seconds, again = in_turns(runs, rounds, time.process_time, "plain", "published loop")
    return {
        "milliseconds": {n: 1e3 * statistics.median(s) / EVERY for n, s in seconds.items()},
        "over plain": {n: ratio(s, seconds["plain"]) for n, s in seconds.items() if n != "plain"},
        "published over prior": ratio(seconds["published loop"], seconds["prior"]),
        "A/A": again,
    }


def main() -> None:
    """Run and report."""
    arguments = parser(__doc__)
    add_option(arguments)
    options = arguments.parse_args()
    make_loop = loop_from(options.authors_code)
    results = {
        name: {
            f"{k}, {n}": measure(with_background(make(), n), k, rounds, make_loop)
            for k, n in SETTINGS
        }
        for name, (make, full) in NETWORKS.items()
        for rounds in [max(3, full // 10) if options.quick else full]
    }
    rows = [
        [
            setting,
            found["milliseconds"]["plain"],
            *found["over plain"].values(),
            found["published over prior"],
            *found["A/A"].values(),
        ]
        for setting, found in flat(results)
    ]
    over = [f"{kind} / plain" for kind in flat(results)[0][1]["over plain"]]
    columns = ["plain, ms", *over, "published loop / prior", "A/A: plain", "published loop"]
    show("Training step", ["model", *columns], rows)
    save(options.output, "training_step", vars(options) | {"weight": WEIGHT}, results)
    plot(options.output, results)


def with_background(network: Network, n: int) -> Network:
    """Return the network with another number of reference rows."""
    rows = torch.rand(n, *network.x.shape[1:], generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(network, background=rows)


def flat(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What was found in each setting, with a name for it."""
    return [
        (f"{name}, k = {k} of {n}", by_setting[f"{k}, {n}"])
        for name, by_setting in results.items()
        for k, n in SETTINGS
    ]


def plot(output: Path, results: dict[str, Any]) -> None:
    """Bars of the time over the plain step."""
    figure = Figure(figsize=(12, 4))
    axes = figure.subplots()
    settings = flat(results)
    kinds = [*settings[0][1]["over plain"]]
    for i, kind in enumerate(kinds):
        heights = [found["over plain"][kind] for _, found in settings]
        places = [j + 0.27 * (i - 1) for j in range(len(settings))]
        axes.bar(places, heights, 0.27, label=kind)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(settings)), [name.replace(", ", "\n") for name, _ in settings])
    axes.set(ylabel="time over the plain step", yscale="log")
    axes.legend()
    save_plot(output, "training_step", figure)


if __name__ == "__main__":
    main()
