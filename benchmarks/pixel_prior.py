"""The pixel prior on MNIST: robustness to noise, smoothness of attributions, and cost.

The headline experiment of Erion et al. 2021 on the 10,000 images of MNIST's test file: 8,000 to
train on, 2,000 to test. Their two alternating optimisers are replaced by one joint loss, so their
weight does not transfer.

    python benchmarks/pixel_prior.py --data mnist=DIR
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import interleaved, mnist, parser, save, save_plot, show
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import ExpectedGradients, Lazy
from captum_priors.penalties import total_variation
from captum_priors.priors import PixelPrior

N_TRAIN, BATCH = 8000, 64
GAUSSIAN = (0.5, 0.75, 1.0, 1.25)
SALT_AND_PEPPER = (0.1, 0.2, 0.3)
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load(source: str) -> Data:
    """Training and test images in [-1, 1] with their labels, split by a fixed permutation."""
    x, y = mnist(source)
    x = 2 * x - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:N_TRAIN], order[N_TRAIN:]
    return x[train], y[train], x[test], y[test]


def new_model() -> nn.Sequential:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def step_of(
    model: nn.Module, weight: float, every: int
) -> Callable[[Tensor, Tensor, torch.optim.Optimizer], None]:
    """One training step with the pixel prior at this weight, on every ``every``-th step."""
    prior = None
    if weight:
        prior = PixelPrior(model) if every == 1 else Lazy(PixelPrior(model), every)

    def step(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss = F.cross_entropy(model(x), y)
        if prior is not None:
            loss = loss + weight * prior(x, baselines=x, target=y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def train(data: Data, weight: float, every: int, seed: int, epochs: int) -> nn.Module:
    """Adam with cosine decay to zero."""
    x, y = data[:2]
    torch.manual_seed(seed)
    model = new_model()
    step = step_of(model, weight, every)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    n_steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            step(x[rows], y[rows], optimizer)
            schedule.step()
    return model


def salt_and_pepper(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set a share of the pixels to black or white."""
    hit = torch.rand(x.shape, generator=generator) < share
    return torch.where(hit, (torch.rand(x.shape, generator=generator) < 0.5) * 2.0 - 1, x)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> dict[str, float]:
    """Accuracies under noise, and total variation of the attributions of 200 test images."""
    train_x, _, x, y = data
    generator = torch.Generator().manual_seed(1)
    noisy = {"clean": x}
    for sigma in GAUSSIAN:
        noisy[f"gauss {sigma:g}"] = x + sigma * torch.randn(x.shape, generator=generator)
    for share in SALT_AND_PEPPER:
        noisy[f"s&p {share:g}"] = salt_and_pepper(x, share, generator)
    model.eval()
    found = {
        name: (model(points).argmax(1) == y).float().mean().item() for name, points in noisy.items()
    }
    attributions = ExpectedGradients(model).attribute(
        x[:200], train_x[:1000], n_samples=20, target=y[:200], generator=generator
    )
    return {**found, "TV": total_variation(attributions).mean().item()}


def relative_times(data: Data, rounds: int) -> dict[str, float]:
    """Seconds of 16 steps over those of plain training."""
    x, y = data[0][:BATCH], data[1][:BATCH]

    def sixteen(weight: float, every: int) -> Callable[[], None]:
        torch.manual_seed(0)
        model = new_model()
        step, optimizer = step_of(model, weight, every), torch.optim.Adam(model.parameters(), 1e-3)

        def run() -> None:
            for _ in range(16):
                step(x, y, optimizer)

        return run

    runs = {"plain": sixteen(0, 1), "every step": sixteen(1e-3, 1), "Lazy(4)": sixteen(1e-3, 4)}
    for run in runs.values():
        run()
    seconds = interleaved(runs, rounds)
    return {name: each / seconds["plain"] for name, each in seconds.items()}


def name_of(weight: float, every: int) -> str:
    """Name a setting."""
    if not weight:
        return "no prior"
    return f"{weight:g}, {'every step' if every == 1 else f'Lazy({every})'}"


def report(runs: dict[str, list[dict[str, float]]]) -> None:
    """Print the mean over seeds of every measure so far."""
    columns = list(next(iter(runs.values()))[0])
    rows = [
        [name, len(seeds), *(statistics.mean(s[c] for s in seeds) for c in columns)]
        for name, seeds in runs.items()
    ]
    show("Pixel prior on MNIST: accuracies, mean over seeds", ["weight", "seeds", *columns], rows)


def plot(args: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    """Accuracy against the strength of the noise."""
    figure = Figure(figsize=(10, 4))
    for axes, kind, levels in zip(
        figure.subplots(1, 2), ("gauss", "s&p"), (GAUSSIAN, SALT_AND_PEPPER), strict=True
    ):
        for name, seeds in runs.items():
            keys = ["clean", *(f"{kind} {level:g}" for level in levels)]
            accuracies = [statistics.mean(s[key] for s in seeds) for key in keys]
            axes.plot([0, *levels], accuracies, "--" if "Lazy" in name else "-", label=name)
        axes.set(xlabel=f"{kind} noise", ylabel="accuracy")
    axes.legend(fontsize=7)
    save_plot(args.output, "pixel_prior", figure)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", required=True, help="mnist=DIR with the t10k-* IDX files")
    arguments.add_argument("--epochs", type=int, default=10)
    args = arguments.parse_args()
    data = load(args.data)
    weights = (0.0003, 0.0005, 0.001) if args.quick else (0.0003, 0.0005, 0.001, 0.002)
    settings = [(0.0, 1), *((w, every) for every in (1, 4) for w in weights)]
    runs: dict[str, list[dict[str, float]]] = {}
    times = relative_times(data, rounds=3 if args.quick else 9)
    show("Time of a step over plain", list(times), [list(times.values())])
    recorded = {"quick": args.quick, "epochs": args.epochs, "batch": BATCH, "weights": weights}
    results: dict[str, Any] = {"relative_time": times, "runs": runs}
    for seed in range(1 if args.quick else 3):
        for weight, every in settings:
            found = evaluate(train(data, weight, every, seed, args.epochs), data)
            runs.setdefault(name_of(weight, every), []).append(found)
            save(args.output, "pixel_prior", recorded, results)
            report(runs)
    plot(args, runs)


if __name__ == "__main__":
    main()
