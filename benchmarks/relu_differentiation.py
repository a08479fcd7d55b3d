"""Which parameter gradient should a prior on a ReLU network have? On MNIST and digits.

The gradient of a ReLU network is piecewise constant: double backpropagation sees what the weights
do within a piece and not that they move its borders, a finite difference sees both, and so does
double backpropagation through Softplus in the attribution pass alone (``smooth=``). The same small
network is trained with the pixel prior at several weights in each of these ways. Figures: accuracy,
and the total variation of the expected gradients of the ReLU network itself, on test images.

    python benchmarks/relu_differentiation.py --data mnist=DIR
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import mnist, save, save_plot, show
from _reproduction import accuracy, arguments_of, in_processes, seeds_of, summary
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from captum_priors import ExpectedGradients
from captum_priors.penalties import total_variation
from captum_priors.priors import PixelPrior

BATCH = 64
METHODS: dict[str, Callable[[nn.Module], PixelPrior]] = {
    "double_backprop": PixelPrior,
    "smooth=30": functools.partial(PixelPrior, smooth=30.0),
    "smooth=100": functools.partial(PixelPrior, smooth=100.0),
}
WEIGHTS = {"mnist": (0.0003, 0.001, 0.003), "digits": (0.0005, 0.002, 0.006)}
EPOCHS = {"mnist": 5, "digits": 12}
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load(name: str, source: str) -> Data:
    """Training and test images in [-1, 1] with labels, split by a fixed permutation."""
    if name == "mnist":
        x, y = mnist(source)
        n_train, n_test = 2000, 2000
    else:
        pixels, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
        # Twice as fine, so that neighbouring pixels have something to do with each other.
        x, y = F.interpolate(x, scale_factor=2, mode="bilinear"), torch.from_numpy(labels).long()
        n_train, n_test = 1000, 797
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:n_train], order[n_train : n_train + n_test]
    return 2 * x[train] - 1, y[train], 2 * x[test] - 1, y[test]


def network(size: int) -> nn.Sequential:
    """Two strided convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * (size // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def run(job: tuple[str, str, float, int], source: str, epochs: float) -> dict[str, float]:
    """Train once: Adam with cosine decay; measure."""
    name, method, weight, seed = job
    data = load(name, source)
    x, y, test_x, test_y = data
    torch.manual_seed(seed)
    model = network(x.shape[-1])
    prior = METHODS[method](model) if weight else None
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    n_epochs = max(1, round(epochs * EPOCHS[name]))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_epochs * -(-len(x) // BATCH))
    for _ in range(n_epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if prior is not None:
                loss = loss + weight * prior(x[rows], baselines=x[rows], target=y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        maps = ExpectedGradients(model).attribute(
            test_x[:200],
            x[:500],
            n_samples=20,
            target=test_y[:200],
            generator=torch.Generator().manual_seed(0),
        )
    return {
        "accuracy": accuracy(model, test_x, test_y),
        "TV": total_variation(maps).mean().item(),
    }


def at_equal_penalty(curves: dict[str, list[tuple[float, float]]]) -> dict[str, list[float]]:
    """Accuracies on the line through each method's points, at penalties that all of them reach."""
    low = max(min(tv for tv, _ in points) for points in curves.values())
    high = min(max(tv for tv, _ in points) for points in curves.values())
    levels = [low + share * (high - low) for share in (0.0, 0.25, 0.5)]
    found: dict[str, list[float]] = {"TV": levels}
    for method, points in curves.items():
        found[method] = [_interpolate(sorted(points), level) for level in levels]
    return found


def _interpolate(points: list[tuple[float, float]], at: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    raise AssertionError(f"{at} is outside {points}")


def draw(results: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Accuracy against penalty, one line a method."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, 2), results.items(), strict=True):
        for method, points in found.items():
            axes.errorbar(
                [p["TV"]["mean"] for p in points.values()],
                [p["accuracy"]["mean"] for p in points.values()],
                yerr=[p["accuracy"]["stdev"] for p in points.values()],
                marker="o",
                label=method,
            )
        axes.set(title=name, xlabel="total variation of attributions", ylabel="test accuracy")
    axes.legend()
    return figure


def main() -> None:
    """Train everything, compare at equal penalty."""
    arguments = arguments_of(__doc__, data="mnist=DIR with the t10k-* IDX files")
    options = arguments.parse_args()
    seeds = seeds_of(options, full=3, quick=1)
    jobs = [
        (name, method, weight, seed)
        for name, weights in WEIGHTS.items()
        for seed in seeds
        for method, weight in [("none", 0.0), *itertools.product(METHODS, weights)]
    ]
    job = functools.partial(run, source=options.data, epochs=0.2 if options.quick else 1.0)
    runs = dict(zip(jobs, in_processes(job, jobs, options.jobs), strict=True))
    results: dict[str, Any] = {}
    equal: dict[str, Any] = {}
    for name, weights in WEIGHTS.items():
        plain = summary([runs[name, "none", 0.0, s] for s in seeds])
        results[name] = {
            method: {0.0: plain}
            | {w: summary([runs[name, method, w, s] for s in seeds]) for w in weights}
            for method in METHODS
        }
        rows = [
            [method, w, *(f"{p[c]['mean']:.4g} ± {p[c]['stdev']:.2g}" for c in p)]
            for method, points in results[name].items()
            for w, p in points.items()
        ]
        show(f"{name}, {len(seeds)} seeds", ["parameter gradient", "weight", *plain], rows)
        curves = {
            method: [(p["TV"]["mean"], p["accuracy"]["mean"]) for p in points.values()]
            for method, points in results[name].items()
        }
        equal[name] = at_equal_penalty(curves)
        levels = [f"TV {level:.3g}" for level in equal[name]["TV"]]
        show(
            f"{name}: accuracy at equal penalty",
            ["parameter gradient", *levels],
            [[method, *values] for method, values in equal[name].items() if method != "TV"],
        )
    settings = vars(options) | {"weights": WEIGHTS, "epochs": EPOCHS, "batch": BATCH}
    document = {"found": results, "at equal penalty": equal}
    save(options.output, "relu_differentiation", settings, document)
    save_plot(options.output, "relu_differentiation", draw(results))


if __name__ == "__main__":
    main()
