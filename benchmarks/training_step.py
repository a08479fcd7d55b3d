"""Time of a training step with an expected-gradients prior.

Against the plain step, and against a step with the published loop (Erion et al. 2021) in place of
the prior: an MLP, a convolutional network and a transformer (on the math attention kernel, without
which neither runs), k = 1 and 8 samples, exact second derivatives. Same model, batch, background
and penalty; runs take turns; medians of the processor's time.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import interleaved, parser, save, save_plot, show
from _networks import NETWORKS, Network
from _published import PublishedLoop
from matplotlib.figure import Figure
from torch import Tensor

from captum_priors import AttributionPrior, ExpectedGradients, Lazy

COUNTS = (1, 8)
EVERY = 4
WEIGHT = 1e-3


def steps_of(network: Network, k: int) -> dict[str, Callable[[], None]]:
    """``EVERY`` training steps of each kind, each on a model of its own."""

    def steps(penalty_of: Callable[[Any], Callable[[], Tensor | float]]) -> Callable[[], None]:
        torch.manual_seed(0)
        model = network.make()
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        penalty = penalty_of(model)

        def run() -> None:
            for _ in range(EVERY):
                with network.context():
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
        loop = PublishedLoop(network.background, len(network.x), k)
        return lambda: (
            WEIGHT * network.penalty(loop.attribute(model, network.x, network.y)).mean()
        )

    return {
        "plain": steps(lambda model: lambda: 0.0),
        "published loop": steps(published),
        "prior": steps(lambda model: prior(model, 1)),
        f"prior, Lazy({EVERY})": steps(lambda model: prior(model, EVERY)),
    }


def main() -> None:
    """Run and report."""
    options = parser(__doc__).parse_args()
    rounds = 5 if options.quick else 41
    results: dict[str, Any] = {}
    for name, make in NETWORKS.items():
        network = make()
        results[name] = {}
        for k in COUNTS:
            runs = steps_of(network, k)
            for run in runs.values():
                run()
            seconds = interleaved(runs, rounds, time.process_time)
            results[name][k] = {
                "milliseconds": {kind: 1e3 * each / EVERY for kind, each in seconds.items()},
                "over plain": {
                    kind: each / seconds["plain"] for kind, each in seconds.items()
                },
                "published over prior": seconds["published loop"] / seconds["prior"],
            }
    rows = [
        [f"{name}, k = {k}", r["milliseconds"]["plain"], *list(r["over plain"].values())[1:],
         r["published over prior"]]
        for name, by_k in results.items()
        for k, r in by_k.items()
    ]
    show(
        "Training step",
        ["model", "plain, ms", "published loop / plain", "prior / plain", "Lazy / plain",
         "published loop / prior"],
        rows,
    )


if __name__ == "__main__":
    main()
