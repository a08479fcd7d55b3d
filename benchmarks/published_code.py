"""Penalties of public projects, as they are written and as they are meant: do they train?

Four ways to lose the gradient of an explanation that public code has, rewritten from their
description, each beside its correction: right for the right reasons through ``.grad.data``, and
with ``retain_graph`` where ``create_graph`` is needed; integrated gradients by Captum's own class;
a map that is detached before it meets the model's probability. ``check_gradient`` measures each by
itself, in float64. Then networks are trained on decoy MNIST (see ``decoy_mnist.py``; 2,000 images
and 2,000 to test, 20 epochs), with the weights that the corrected penalties did best with on
another seed. Value and weight of a pair are the same; so are its initial network and its batches.

    python benchmarks/published_code.py --data mnist=DIR
"""

import copy
import functools
import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import mnist, save, save_plot
from _reproduction import accuracy, arguments_of, in_processes, seeds_of, show_runs, summary
from captum.attr import IntegratedGradients
from decoy_mnist import decoys
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import differentiable
from captum_priors.testing import check_gradient

N_TRAIN, N_TEST, BATCH, EPOCHS, N_STEPS = 2000, 2000, 100, 20, 8
Penalty = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def forbidden(attributions: Tensor, allowed: Tensor) -> Tensor:
    """Squared attributions where there may be none, mean over the examples."""
    return ((1 - allowed) * attributions).square().flatten(1).sum(1).mean()


def log_probabilities(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Input that is differentiated, and the logarithms of all probabilities."""
    x = x.detach().clone().requires_grad_()
    return x, model(x).log_softmax(1)


def reasons(model: nn.Module, x: Tensor, y: Tensor, allowed: Tensor) -> Tensor:
    """Right for the right reasons, as it is meant."""
    x, scores = log_probabilities(model, x)
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return forbidden(gradient, allowed)


def reasons_by_grad_data(model: nn.Module, x: Tensor, y: Tensor, allowed: Tensor) -> Tensor:
    """Of ``.grad.data``, which has no history."""
    x, scores = log_probabilities(model, x)
    scores.sum().backward(inputs=[x])
    assert x.grad is not None
    return forbidden(x.grad.data, allowed)


def reasons_by_retain_graph(model: nn.Module, x: Tensor, y: Tensor, allowed: Tensor) -> Tensor:
    """With ``retain_graph``, which keeps the graph of the scores and makes none of the gradient."""
    x, scores = log_probabilities(model, x)
    (gradient,) = torch.autograd.grad(scores.sum(), x, retain_graph=True)
    return forbidden(gradient, allowed)


def integrated(model: nn.Module, x: Tensor, y: Tensor, allowed: Tensor) -> Tensor:
    """Integrated gradients, with their graph."""
    explainer = differentiable(IntegratedGradients(model))
    return forbidden(explainer.attribute(x, target=y, n_steps=N_STEPS), allowed)


def integrated_by_captum(model: nn.Module, x: Tensor, y: Tensor, allowed: Tensor) -> Tensor:
    """Captum's own class, which is made to explain."""
    found = IntegratedGradients(model).attribute(x, target=y, n_steps=N_STEPS)
    return forbidden(found, allowed)


def probable(
    model: nn.Module, x: Tensor, y: Tensor, allowed: Tensor, *, detached: bool = False
) -> Tensor:
    """Gradient of the label's probability: the probability times the gradient of its logarithm."""
    x, scores = log_probabilities(model, x)
    own = scores.gather(1, y.unsqueeze(1))
    (gradient,) = torch.autograd.grad(own.sum(), x, create_graph=True)
    gradient = gradient.detach() if detached else gradient
    return forbidden(own.exp().reshape(-1, 1, 1, 1) * gradient, allowed)


PENALTIES: dict[str, tuple[float, Penalty]] = {
    "RRR": (100.0, reasons),
    "RRR through .grad.data": (100.0, reasons_by_grad_data),
    "RRR, retain_graph": (100.0, reasons_by_retain_graph),
    "IG": (1000.0, integrated),
    "IG by Captum": (1000.0, integrated_by_captum),
    "probability's gradient": (10000.0, probable),
    "probability's gradient, map detached": (10000.0, functools.partial(probable, detached=True)),
}
"""Weights and penalties; what is written wrongly stands after what is meant."""
MEANT = {
    "RRR through .grad.data": "RRR",
    "RRR, retain_graph": "RRR",
    "IG by Captum": "IG",
    "probability's gradient, map detached": "probability's gradient",
}
Data = tuple[Tensor, Tensor, Tensor]


def network() -> nn.Sequential:
    """The network of ``decoy_mnist.py``."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 50), nn.ReLU()),
        *(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 10)),
    )


def digits(seed: int, source: str) -> tuple[Data, Data]:
    """Training images whose patch tells the label, and test images whose patch is any label's."""
    x, y = mnist(source)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)[: N_TRAIN + N_TEST]
    n = len(order) * N_TRAIN // (N_TRAIN + N_TEST)
    train, test = order[:n], order[n:]
    marked, allowed = decoys(x[train], y[train], generator=generator)
    told = torch.randint(10, (len(test),), generator=generator)
    misled, free = decoys(x[test], told, generator=generator)
    return (marked, y[train], allowed), (misled, y[test], free)


def measured(name: str, model: nn.Module, data: Data, rows: int = 64) -> dict[str, Any]:
    """What ``check_gradient`` says, and the gradient beside that of what is meant."""
    model = copy.deepcopy(model).double()
    x, y, allowed = (t[:rows].double() if t.is_floating_point() else t[:rows] for t in data)

    def gradient(which: str) -> Tensor:
        value = PENALTIES[which][1](model, x, y, allowed)
        found: Any = [None] * 6
        if value.requires_grad:
            found = torch.autograd.grad(value, [*model.parameters()], allow_unused=True)
        pairs = zip(found, model.parameters(), strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    penalty = functools.partial(PENALTIES[name][1], model, x, y, allowed)
    report = check_gradient(penalty, model, raise_exception=False)
    ours, meant = gradient(name), gradient(MEANT.get(name, name))
    product = float(ours.norm() * meant.norm())
    return {
        "verdicts": dict(Counter(report.verdicts.values())),
        "largest error": max(report.errors.values()),
        "size over that of what is meant": float(ours.norm() / meant.norm()),
        "cosine with what is meant": float(ours @ meant) / product if product else None,
    }


def train(data: Data, name: str | None, weight: float, seed: int, epochs: int) -> nn.Sequential:
    """Cross entropy and, where there is one, a penalty."""
    x, y, allowed = data
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if name is not None:
                penalty = PENALTIES[name][1](model, x[rows], y[rows], allowed[rows])
                loss = loss + weight * penalty
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model


def run_seed(seed: int, source: str, epochs: int) -> dict[str, Any]:
    """Certificates at a network that has learnt the shortcut, and every training with one seed."""
    data, test = digits(seed, source)
    plain = train(data, None, 0.0, seed, epochs)
    found: dict[str, Any] = {"certificates": {n: measured(n, plain, data) for n in PENALTIES}}
    found["runs"] = {}
    for name in (None, *PENALTIES):
        weight = 0.0 if name is None else PENALTIES[name][0]
        model = plain if name is None else train(data, name, weight, seed, epochs)
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        found["runs"][name or "no penalty"] = {
            "train": accuracy(model, *data[:2]),
            "test": accuracy(model, *test[:2]),
            "the network without": float(all(torch.equal(a, b) for a, b in pairs)),
        }
    return found


def paired(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Test accuracy of what is meant less that of what is written, seed by seed."""
    found = {}
    for written, meant in MEANT.items():
        pairs = zip(runs[meant], runs[written], strict=True)
        gains = [{"test": a["test"] - b["test"]} for a, b in pairs]
        found[written] = summary(gains)["test"]
    return found


def draw(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Test accuracy of every penalty."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    each = [[run["test"] for run in some] for some in runs.values()]
    axes.barh(range(len(runs)), [statistics.mean(values) for values in each], color="lightgray")
    for place, values in enumerate(each):
        axes.plot(values, [place] * len(values), "k.")
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy where the patch lies (dots: seeds)")
    return figure


def commit() -> str:
    """Of the code that ran, where that is known."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    """Run the seeds."""
    options = arguments_of(__doc__, data="mnist=DIR with the t10k-* IDX files").parse_args()
    seeds = seeds_of(options, full=3, quick=1)
    epochs = 3 if options.quick else EPOCHS
    job = functools.partial(run_seed, source=options.data, epochs=epochs)
    found = in_processes(job, seeds, options.jobs)
    runs = {name: [each["runs"][name] for each in found] for name in found[0]["runs"]}
    show_runs("Decoy MNIST", runs)
    results = {
        "certificates": {n: [each["certificates"][n] for each in found] for n in PENALTIES},
        "found": {name: summary(each) for name, each in runs.items()},
        "what is meant less what is written": paired(runs),
        "of each seed": runs,
        "weights": {name: weight for name, (weight, _) in PENALTIES.items()},
        "commit": commit(),
        "processor": f"{platform.machine()}, one thread",
    }
    for name, each in results["certificates"].items():
        print(f"{name}: {each[0]}")
    settings = {**vars(options), "seeds": len(seeds)}
    save(options.output, "published_code", settings, results)
    save_plot(options.output, "published_code", draw(runs))


if __name__ == "__main__":
    main()
