"""Right for the right reasons on decoy MNIST (Ross, Hughes, Doshi-Velez 2017).

A 4×4 patch in a random corner has brightness 255 - 25·label in training and that of a random label
in the test set: a network that reads the patch fails there. The regularizer forbids gradients in
the patch. Their network (50 and 30 units, Adam, 64 epochs, batches of 256) on the 10,000 images of
MNIST's test file: 8,000 to train on, 2,000 to test.

    python benchmarks/decoy_mnist.py --data mnist=DIR
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from _common import mnist, save, save_plot
from _reproduction import accuracy, arguments_of, in_processes, seeds_of, show_runs, summary
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors.metrics import wrong_reason_rate
from captum_priors.priors import RightForTheRightReasons

N_TRAIN, BATCH, PATCH, L2 = 8000, 256, 4, 1e-4
# Test accuracy in the original, which trained on 60,000 images.
PUBLISHED = {"clean data": 0.961, "decoy, weight 0": 0.5155, "decoy, weight 1000": 0.9607}


def decoys(
    x: Tensor, y: Tensor, *, generator: torch.Generator, size: int = PATCH
) -> tuple[Tensor, Tensor]:
    """Images with a patch that tells ``y``, and where they may be looked at."""
    x, allowed = x.clone(), torch.ones_like(x)
    corners = torch.randint(2, (2, len(x)), generator=generator) * (x.shape[-1] - size)
    for i, (top, left) in enumerate(corners.T.tolist()):
        patch = (i, 0, slice(top, top + size), slice(left, left + size))
        x[patch] = (255 - 25 * y[i]) / 255
        allowed[patch] = 0
    return x, allowed


def train(
    data: tuple[Tensor, Tensor, Tensor], weight: float, seed: int, epochs: int
) -> nn.Sequential:
    """Cross-entropy, squared weights, and the regularizer where it has a weight."""
    x, y, allowed = data
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 50), nn.ReLU()),
        *(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 10)),
    )
    prior = RightForTheRightReasons(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss = loss + L2 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
            if weight:
                # The original sums both terms over the examples, which leaves their ratio.
                loss = loss + weight * prior(x[rows], annotation=allowed[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model


def run_seed(
    seed: int, source: str, weights: tuple[float, ...], epochs: int
) -> dict[str, dict[str, float]]:
    """Every setting with one seed, which also draws the split and the patches."""
    x, y = mnist(source)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    seen, unseen = (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])
    decoy, allowed = decoys(*seen, generator=generator)
    of_random_labels = torch.randint(10, (len(unseen[1]),), generator=generator)
    test, test_allowed = decoys(unseen[0], of_random_labels, generator=generator)
    settings = {"clean data": 0.0, **{f"decoy, weight {w:g}": w for w in weights}}
    found = {}
    for name, weight in settings.items():
        clean = name == "clean data"
        images = seen[0] if clean else decoy
        model = train((images, seen[1], allowed), weight, seed, epochs)
        probe = test[:500].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(probe).log_softmax(1).sum(), probe)
        wrong = wrong_reason_rate(gradient.abs(), annotation=test_allowed[:500])
        found[name] = {
            "train": accuracy(model, images, seen[1]),
            "test": accuracy(model, unseen[0] if clean else test, unseen[1]),
            "patch pixels that matter": float(wrong.mean()),
        }
    return found


def draw(results: dict[str, Any]) -> Figure:
    """Training and test accuracy of every setting."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for offset, part in ((-0.2, "train"), (0.2, "test")):
        places = [i + offset for i in range(len(results))]
        means, stdev = ([r[part][k] for r in results.values()] for k in ("mean", "stdev"))
        axes.bar(places, means, 0.4, yerr=stdev, label=part)
    for i, name in enumerate(results):
        if name in PUBLISHED:
            axes.plot([i, i + 0.4], [PUBLISHED[name]] * 2, "k--")
    axes.set_xticks(range(len(results)), list(results), rotation=15)
    axes.set_ylabel("accuracy (dashed: published, test)")
    axes.legend()
    return figure


def main() -> None:
    """Run the seeds and compare with the original."""
    arguments = arguments_of(__doc__, data="mnist=DIR with the t10k-* IDX files")
    arguments.add_argument("--epochs", type=int, default=64)
    options = arguments.parse_args()
    seeds = seeds_of(options, full=3, quick=1)
    weights = (0.0, 1e3) if options.quick else (0.0, 1e3, 1e5)
    job = functools.partial(
        run_seed,
        source=options.data,
        weights=weights,
        epochs=10 if options.quick else options.epochs,
    )
    found = in_processes(job, seeds, options.jobs)
    runs = {name: [each[name] for each in found] for name in found[0]}
    show_runs("Decoy MNIST", runs)
    results = {name: summary(each) for name, each in runs.items()}
    save(options.output, "decoy_mnist", vars(options), {"found": results, "published": PUBLISHED})
    save_plot(options.output, "decoy_mnist", draw(results))


if __name__ == "__main__":
    main()
