"""The graph prior on data whose graph is known: the true graph, a random one, and none.

Erion et al. 2021 (drug response, gene network): the graph helps, a random graph does not, and more
training without a graph does not. Here the graph is known because the data are made with it: 60
features in 12 modules of five noisy readings of one hidden quantity, and a target that depends on
four of these quantities. The true graph joins the features of a module; the random one is the same
graph with its nodes shuffled, so that degrees and clusters are equal. 100 training rows; epoch and
weight are those of the least error on 100 validation rows.

    python benchmarks/graph_prior.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from _common import save, save_plot
from _reproduction import arguments_of, gains, in_processes, seeds_of, show_runs, summary
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import ExpectedGradients
from captum_priors.penalties import GraphLaplacian
from captum_priors.priors import GraphPrior

MODULES, SIZE, ACTIVE = 12, 5, 4
PARTS = (100, 100, 1000)
WEIGHTS, RATE, EPOCHS, SAMPLES = (0.1, 1.0, 10.0), 3e-3, 100, 4
Rows = tuple[Tensor, Tensor]


def make_data(generator: torch.Generator) -> list[Rows]:
    """Rows to train on, to choose with and to test."""
    hidden = torch.randn(sum(PARTS), MODULES, generator=generator)
    noise = torch.randn(sum(PARTS), MODULES * SIZE, generator=generator)
    x = hidden.repeat_interleave(SIZE, 1) + noise
    effect = 1 + torch.rand(ACTIVE, generator=generator)
    effect = effect * (2.0 * torch.randint(2, (ACTIVE,), generator=generator) - 1)
    y = (hidden[:, :ACTIVE] * effect).sum(1) + hidden[:, 0].clamp_min(0) * hidden[:, 1]
    y = y + 0.5 * torch.randn(len(y), generator=generator)
    return list(zip(x.split(PARTS), y.split(PARTS), strict=True))


def graphs(generator: torch.Generator) -> dict[str, Tensor]:
    """The true graph, and itself with shuffled nodes."""
    true = torch.block_diag(*[1 - torch.eye(SIZE)] * MODULES)
    shuffled = torch.randperm(len(true), generator=generator)
    return {"true graph": true, "random graph": true[shuffled][:, shuffled]}


def mse(model: nn.Module, rows: Rows) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(rows[0])[:, 0], rows[1])


def train(
    data: list[Rows], graph: Tensor | None, weight: float, seed: int, epochs: int
) -> tuple[float, nn.Sequential]:
    """Adam on all rows; returns the least validation error and the network that had it."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(MODULES * SIZE, 64), nn.ReLU()),
        *(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)),
    )
    prior = None if graph is None else weight * GraphPrior(model, graph, n_samples=SAMPLES)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    x = data[0][0]
    best, kept = float("inf"), model.state_dict()
    for _ in range(epochs):
        loss = mse(model, data[0])
        if prior is not None:
            loss = loss + prior(x, baselines=x, target=0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            error = float(mse(model, data[1]))
        if error < best:
            best, kept = error, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return best, model


@torch.no_grad()
def evaluate(model: nn.Module, data: list[Rows]) -> dict[str, float]:
    """Share of the test variance explained, and how rough and how true the attributions are."""
    x, y = data[2]
    attributions = ExpectedGradients(model).attribute(
        x[:300], data[0][0], n_samples=20, target=0, generator=torch.Generator().manual_seed(0)
    )
    importance = attributions.abs().mean(0)
    true = torch.block_diag(*[1 - torch.eye(SIZE)] * MODULES)
    return {
        "R2": float(1 - mse(model, data[2]) / y.var()),
        "roughness on the true graph": GraphLaplacian(true)(attributions).item(),
        "importance of active modules": float(importance[: ACTIVE * SIZE].sum() / importance.sum()),
    }


def run(job: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Each graph at its best weight, for one data set."""
    seed, epochs = job
    generator = torch.Generator().manual_seed(seed)
    data = make_data(generator)
    _, plain = train(data, None, 0.0, seed, epochs)
    # A prior's runs take more time; the same number of epochs again must not be what helps.
    _, longer = train(data, None, 0.0, seed, 3 * epochs)
    found = {"no graph": evaluate(plain, data), "no graph, 3 × epochs": evaluate(longer, data)}
    for name, graph in graphs(generator).items():
        tried = [(*train(data, graph, w, seed, epochs), w) for w in WEIGHTS]
        _, model, weight = min(tried, key=lambda t: t[0])
        found[name] = {**evaluate(model, data), "weight": weight}
    return found


def draw(results: dict[str, Any], seeds: int) -> Figure:
    """Test R² and roughness of each graph."""
    figure = Figure(figsize=(10, 4))
    for axes, key in zip(figure.subplots(1, 2), ("R2", "roughness on the true graph"), strict=True):
        means, stdev = ([r[key][part] for r in results.values()] for part in ("mean", "stdev"))
        axes.bar(range(len(results)), means, yerr=stdev)
        axes.set_xticks(range(len(results)), list(results), rotation=15)
        axes.set(title=f"{key}, {seeds} data sets")
    return figure


def main() -> None:
    """Run every data set; compare pairwise."""
    options = arguments_of(__doc__).parse_args()
    seeds = seeds_of(options, full=12, quick=1)
    epochs = 30 if options.quick else EPOCHS
    found = in_processes(run, [(seed, epochs) for seed in seeds], options.jobs)
    keys = ["R2", "roughness on the true graph", "importance of active modules"]
    runs = {name: [{k: f[name][k] for k in keys} for f in found] for name in found[0]}
    show_runs("Graph prior, synthetic modules", runs)
    results: dict[str, Any] = {name: summary(each) for name, each in runs.items()}
    gain = {
        name: gains(*([{"R2": f[n]["R2"]} for f in found] for n in (name, "no graph")))
        for name in found[0]
    }
    chosen = {name: [f[name]["weight"] for f in found] for name in ("true graph", "random graph")}
    show_runs(
        "Gain in R2 over no graph, data set by data set",
        {n: [{"R2": f[n]["R2"] - f["no graph"]["R2"]} for f in found] for n in chosen},
    )
    document = {"found": results, "gain over no graph": gain, "chosen weights": chosen}
    save(options.output, "graph_prior", vars(options) | {"weights": WEIGHTS}, document)
    save_plot(options.output, "graph_prior", draw(results, len(seeds)))


if __name__ == "__main__":
    main()
