"""The pixel prior on MNIST: robustness to noise, smoothness of attributions, and cost.

The headline experiment of Erion et al. 2021 on the 10,000 images of MNIST's test file: 4,000 to
train on, 2,000 to test. As theirs, the network has BatchNorm after every layer but the last (which
is what salt and pepper breaks; priors are explained on the statistics of the batch, held) and is
compared with a total-variation prior on plain gradients.
Their two alternating optimisers are replaced by one joint loss, so their weight does not transfer.

    python benchmarks/pixel_prior.py --data mnist=DIR
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import in_turns, mnist, ratio, save, save_plot, show
from _reproduction import (
    accuracy,
    arguments_of,
    gains,
    in_processes,
    seeds_of,
    show_runs,
    summary,
)
from captum.attr import Saliency
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, Lazy
from captum_priors.penalties import total_variation
from captum_priors.priors import PixelPrior

N_TRAIN, N_TEST, BATCH = 4000, 2000, 64
GAUSSIAN = (0.25, 0.5, 0.75, 1.0)
SALT_AND_PEPPER = (0.05, 0.1, 0.2, 0.3)
# Accuracies in the original (weight 5e-11 for a separate Adam optimiser).
PUBLISHED = {
    "no prior": {"clean": 0.9952, "s&p 0.05": 0.8767, "s&p 0.1": 0.4905, "s&p 0.2": 0.1208},
    "pixel prior": {"clean": 0.9951, "s&p 0.05": 0.9871, "s&p 0.1": 0.9128, "s&p 0.2": 0.4070},
}
Data = tuple[Tensor, Tensor, Tensor, Tensor]
Setting = tuple[str, float]
PLAIN: Setting = ("no prior", 0.0)
PRIORS = ("pixel prior", "Lazy(pixel prior, 4)", "gradient TV")


def load(source: str) -> Data:
    """Training and test images in [-1, 1] with their labels, split by a fixed permutation."""
    x, y = mnist(source)
    x = 2 * x - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:N_TRAIN], order[N_TRAIN : N_TRAIN + N_TEST]
    return x[train], y[train], x[test], y[test]


def new_model() -> nn.Sequential:
    """Two convolutions and two linear layers, with BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, 10),
    )


def step_of(
    model: nn.Module, setting: Setting
) -> Callable[[Tensor, Tensor, torch.optim.Optimizer], None]:
    """One training step with a prior."""
    name, weight = setting
    prior: Any = None
    if name == "gradient TV":
        prior = AttributionPrior(Saliency(model), total_variation, abs=False)
    elif name != "no prior":
        prior = PixelPrior(model) if name == "pixel prior" else Lazy(PixelPrior(model), 4)

    def step(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss = F.cross_entropy(model(x), y)
        if prior is not None:
            references = {} if name == "gradient TV" else {"baselines": x}
            loss = loss + weight * prior(x, target=y, **references)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def train(data: Data, setting: Setting, seed: int, epochs: int) -> nn.Module:
    """Adam with cosine decay to zero."""
    x, y = data[:2]
    torch.manual_seed(seed)
    model = new_model()
    step = step_of(model, setting)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    n_steps = epochs * -(-len(x) // BATCH)
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
    found = {name: accuracy(model, points, y) for name, points in noisy.items()}
    attributions = ExpectedGradients(model).attribute(
        x[:200], train_x[:1000], n_samples=10, target=y[:200], generator=generator
    )
    return {**found, "TV": total_variation(attributions).mean().item()}


def relative_times(data: Data, rounds: int) -> dict[str, Any]:
    """Processor time of 16 steps over that of plain training."""
    x, y = data[0][:BATCH], data[1][:BATCH]

    def sixteen(setting: Setting) -> Callable[[], None]:
        torch.manual_seed(0)
        model = new_model()
        step, optimizer = step_of(model, setting), torch.optim.Adam(model.parameters(), 1e-3)

        def run() -> None:
            for _ in range(16):
                step(x, y, optimizer)

        return run

    runs = {
        "plain": sixteen(PLAIN),
        "every step": sixteen(("pixel prior", 1e-3)),
        "Lazy(4)": sixteen(("Lazy(pixel prior, 4)", 1e-3)),
        "gradient TV": sixteen(("gradient TV", 1e-3)),
    }
    for run in runs.values():
        run()
    seconds, again = in_turns(runs, rounds, time.process_time, "plain")
    plain = seconds.pop("plain")
    return {name: ratio(each, plain) for name, each in seconds.items()} | {"A/A": again}


def run(job: tuple[Setting, int], source: str, epochs: int) -> dict[str, float]:
    """Train and evaluate once."""
    setting, seed = job
    data = load(source)
    return evaluate(train(data, setting, seed, epochs), data)


def name_of(setting: Setting) -> str:
    """Name a setting."""
    return setting[0] if setting == PLAIN else f"{setting[0]}, {setting[1]:g}"


def plot(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Accuracy against the strength of the noise."""
    figure = Figure(figsize=(10, 4))
    for axes, kind, levels in zip(
        figure.subplots(1, 2), ("gauss", "s&p"), (GAUSSIAN, SALT_AND_PEPPER), strict=True
    ):
        for name, found in results.items():
            each = [found["clean"], *(found[f"{kind} {level:g}"] for level in levels)]
            means, stdev = ([e[k] for e in each] for k in ("mean", "stdev"))
            line = "--" if "Lazy" in name else ":" if "gradient" in name else "-"
            axes.errorbar([0, *levels], means, stdev, linestyle=line, label=name)
        axes.set(xlabel=f"{kind} noise", ylabel="accuracy")
    axes.legend(fontsize=7)
    save_plot(args.output, "pixel_prior", figure)


def main() -> None:
    """Run the benchmark."""
    arguments = arguments_of(__doc__, data="mnist=DIR with the t10k-* IDX files")
    arguments.add_argument("--epochs", type=int, default=5)
    arguments.add_argument("--priors", nargs="+", default=PRIORS, choices=PRIORS)
    arguments.add_argument("--weights", nargs="+", type=float, default=[0.0005, 0.002])
    args = arguments.parse_args()
    seeds = seeds_of(args, full=5, quick=1)
    weights = args.weights[:1] if args.quick else args.weights
    settings = [PLAIN, *((name, weight) for name in args.priors for weight in weights)]
    times = relative_times(load(args.data), rounds=3 if args.quick else 5)
    show("Time of a step over plain", [*times], [[*[*times.values()][:-1], times["A/A"]["plain"]]])
    epochs = 1 if args.quick else args.epochs
    jobs = [(setting, seed) for seed in seeds for setting in settings]
    found = in_processes(functools.partial(run, source=args.data, epochs=epochs), jobs, args.jobs)
    each = dict(zip(jobs, found, strict=True))
    runs = {name_of(s): [each[s, seed] for seed in seeds] for s in settings}
    show_runs("Pixel prior on MNIST: accuracies", runs)
    results = {name: summary(of_seeds) for name, of_seeds in runs.items()}
    document = {
        "relative_time": times,
        "found": results,
        "gain over no prior": {
            name: gains(each, runs["no prior"]) for name, each in runs.items() if name != "no prior"
        },
        "published": PUBLISHED,
    }
    save(args.output, "pixel_prior", vars(args) | {"epochs": epochs, "batch": BATCH}, document)
    plot(args, results)


if __name__ == "__main__":
    main()
