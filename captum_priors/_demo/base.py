"""What the demos share: colours, a training loop, and the comparison of two networks.

A demo is a module with texts ``DATA`` and ``PRIOR``, ``EPOCHS``, ``SEEDS``, and three functions:
``load(folder)`` returns its data; ``run(data, seed, with_prior, epochs)`` trains a network and
returns figures, and what the picture shows of it; ``draw(data, shown, means)`` makes the picture
from these two of the first seed and the mean figures, both in the order of ``NAMES``.
"""

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

mpl.use("Agg")  # needs no screen

NAMES = ("without prior", "with prior")
COLOURS = RED, GREEN = "#c0392b", "#1e8449"  # of the two networks, and of wrong and right answers
# What speaks against an answer is orange, what speaks for it blue.
EVIDENCE = LinearSegmentedColormap.from_list("evidence", ["#d35400", "#ffffff", "#0b4fd6"])
Figures = dict[str, float]
Examples = tuple[Tensor, Tensor]  # inputs and labels


def compare(demo: Any, data: Any, first: int, epochs: int) -> tuple[dict[str, Any], Figure]:
    """Train both networks from each seed; return and print their figures, and return a picture."""
    found: dict[str, list[Figures]] = {name: [] for name in NAMES}
    shown = []
    for seed in range(first, first + demo.SEEDS):
        for name, runs in found.items():
            torch.manual_seed(seed)  # the first steps differ by the prior alone
            figures, what = demo.run(data, seed, name == NAMES[1], epochs)
            runs.append({"seed": seed, **figures})
            shown.append(what)
            print(f"seed {seed}, {name} trained", flush=True)
    names = [name for name in runs[0] if name != "seed"]
    means = [{n: sum(run[n] for run in each) / len(each) for n in names} for each in found.values()]
    print(f"\n{f'means (seeds: {demo.SEEDS})':30}{NAMES[0]:>15}{NAMES[1]:>15}{'difference':>15}")
    for name in names:
        a, b = (each[name] for each in means)
        print(f"{name:30}{a:15.3g}{b:15.3g}{b - a:+15.2g}")
    models = {
        name: {**mean, "seeds": runs}
        for (name, runs), mean in zip(found.items(), means, strict=True)
    }
    return models, demo.draw(data, shown[:2], means)


def fit(
    model: nn.Module,
    data: Examples,
    epochs: int,
    rate: float,
    prior: Callable[[Tensor, Tensor], Tensor] | None,
    batch_size: int = 64,
) -> None:
    """Train a classifier, with a prior of each batch and its labels where there is one."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), rate)
    n_steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch_size):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if prior is not None:
                loss = loss + prior(x[rows], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of examples that the model gets right."""
    return float((model(x).argmax(1) == y).float().mean())
