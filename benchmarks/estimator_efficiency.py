"""Gradient evaluations that expected gradients need for the error of GradientShap, and of SHAP's.

On six trained networks and one that is not. The truth averages a Gauss-Legendre quadrature of the
path integral over all reference rows. The error is relative, in the Frobenius norm over a test
batch; the median of several seeds. ``shap.GradientExplainer`` draws as GradientShap does, row by
row; it takes long, so that one seed must do, and is left out of the transformer, the convolutional
network and the network that is not trained.
"""

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import shap
import torch
import torch.nn.functional as F
from _common import parser, save, save_plot, show
from _networks import Transformer
from captum.attr import GradientShap
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from captum_priors import ExpectedGradients

BATCH, N_REFERENCES, NODES = 32, 100, 32
Explain = Callable[[Tensor, Tensor, int, Tensor], Tensor]


def breast_cancer() -> tuple[Tensor, Tensor]:
    """30 standardised measurements, two classes."""
    x, y = load_breast_cancer(return_X_y=True)
    return torch.tensor((x - x.mean(0)) / x.std(0)), torch.tensor(y)


def digits() -> tuple[Tensor, Tensor]:
    """64 pixels in [0, 1], ten classes."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16), torch.tensor(y)


def images() -> tuple[Tensor, Tensor]:
    """The same as 8 by 8 images of one channel."""
    x, y = digits()
    return x.reshape(-1, 1, 8, 8), y


def rows() -> tuple[Tensor, Tensor]:
    """The same as sequences of eight rows."""
    x, y = digits()
    return x.reshape(-1, 8, 8), y


def mlp(n_in: int, width: int, n_out: int, activation: type[nn.Module]) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        *(nn.Linear(n_in, width), activation(), nn.Linear(width, width), activation()),
        nn.Linear(width, n_out),
    )


def cnn() -> nn.Module:
    """Two convolutions with pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


@dataclass(frozen=True)
class Case:
    """A network, its data, how long it is trained, and whether SHAP explains it, too."""

    data: Callable[[], tuple[Tensor, Tensor]]
    make: Callable[[], nn.Module]
    rate: float = 1e-2
    steps: int = 300
    beside_shap: bool = False


CASES = {
    "breast cancer, ReLU": Case(breast_cancer, partial(mlp, 30, 32, 2, nn.ReLU), beside_shap=True),
    "breast cancer, tanh": Case(breast_cancer, partial(mlp, 30, 32, 2, nn.Tanh)),
    "digits, ReLU": Case(digits, partial(mlp, 64, 64, 10, nn.ReLU), beside_shap=True),
    "digits, tanh": Case(digits, partial(mlp, 64, 64, 10, nn.Tanh)),
    "digits, convolutions": Case(images, cnn, 3e-3),
    "digits, transformer": Case(rows, partial(Transformer, 8, 8, 16, 2), 3e-3),
    "digits, ReLU, untrained": Case(digits, partial(mlp, 64, 64, 10, nn.ReLU), steps=0),
}


def trained(case: Case, x: Tensor, y: Tensor) -> nn.Module:
    """Train a network, in double precision."""
    model = case.make().double()
    optimizer = torch.optim.Adam(model.parameters(), case.rate)
    for _ in range(case.steps):
        batch = torch.randint(len(x), (128,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def exact(model: nn.Module, x: Tensor, references: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Expected gradients over all references, the path integral by quadrature."""
    places, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(nodes))
    each = (-1, *(1 for _ in x.shape))
    alphas, weights = ((1 + places) / 2).reshape(each), (weights / 2).reshape(each)
    total = torch.zeros_like(x)
    for reference in references:
        points = (reference + alphas * (x - reference)).requires_grad_()
        output = model(points.flatten(0, 1)).reshape(nodes, len(x), -1)
        chosen = output.gather(2, target.expand(nodes, -1).unsqueeze(2)).sum()
        (gradient,) = torch.autograd.grad(chosen, points)
        total += (x - reference) * (weights * gradient).sum(0)
    return total / len(references)


def methods_for(model: nn.Module, *, beside_shap: bool) -> dict[str, Explain]:
    """The estimators of Captum, of SHAP if asked for, and ours."""

    def explain(attribute: Any, x: Tensor, references: Tensor, n: int, target: Tensor) -> Tensor:
        found: Tensor = attribute(x, references, n_samples=n, target=target)
        return found.detach()

    ours = ExpectedGradients(model).attribute
    theirs = {"GradientShap": partial(explain, GradientShap(model).attribute)}
    if beside_shap:
        theirs["GradientExplainer"] = gradient_explainer(model)
    return {
        **theirs,
        "monte_carlo": partial(explain, partial(ours, estimator="monte_carlo")),
        "control_variate": partial(explain, partial(ours, estimator="control_variate")),
    }


class OneOutput(nn.Module):
    """One output, shape ``(batch, 1)``: SHAP explains all that there are, in single precision."""

    def __init__(self, model: nn.Module, output: int) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        outputs: Tensor = self.model(x)
        return outputs[:, self.output : self.output + 1]


def gradient_explainer(model: nn.Module) -> Explain:
    """SHAP's estimator of the target output of each row."""
    single = copy.deepcopy(model).float()

    def explain(x: Tensor, references: Tensor, n: int, target: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for output in target.unique().tolist():
            rows = target == output
            explainer = shap.GradientExplainer(OneOutput(single, output), references.float())
            seed = np.random.randint(2**31)  # noqa: NPY002  # the same generator
            values = explainer.shap_values(x[rows].float(), nsamples=n, rseed=seed)
            found[rows] = torch.as_tensor(values).reshape(found[rows].shape).to(x)
        return found

    return explain


def ratios(counts: list[int], theirs: list[float], ours: list[float]) -> dict[int, dict[str, Any]]:
    """Evaluations that theirs takes over those that ours takes, at each error that both reach."""
    found = {}
    for n, error in zip(counts[1:], theirs[1:], strict=True):  # with one sample they are the same
        if min(ours) <= error <= max(ours):
            # Errors fall with the count, so interpolate on the reversed curve.
            mine = np.exp(np.interp(np.log(error), np.log(ours[::-1]), np.log(counts[::-1])))
            found[n] = {"error": error, "ratio": n / float(mine)}
    return found


def median_ratio(found: dict[int, dict[str, Any]]) -> float:
    """Median over the counts; not a number where there are none."""
    return statistics.median(each["ratio"] for each in found.values()) if found else math.nan


def measure(case: Case, counts: list[int], repeats: int) -> dict[str, Any]:
    """Errors of every method, ratios at equal error to each peer, and the truth's own error."""
    torch.manual_seed(0)
    x, y = case.data()
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    test, target, rest = x[:BATCH], y[:BATCH], x[BATCH:]
    model = trained(case, rest, y[BATCH:])
    references = rest[:N_REFERENCES]
    truth = exact(model, test, references, target, 2 * NODES)
    error_of_truth = exact(model, test, references, target, NODES).sub(truth).norm() / truth.norm()
    values: dict[str, list[list[float]]] = {}
    for name, explain in methods_for(model, beside_shap=case.beside_shap).items():
        seeds = 1 if name == "GradientExplainer" else repeats
        values[name] = [
            [error_of(explain(test, references, n, target), truth) for _ in seeded(seeds)]
            for n in counts
        ]
    errors = {name: [statistics.median(each) for each in found] for name, found in values.items()}
    peers = [name for name in errors if name.startswith("Gradient")]
    found = {peer: ratios(counts, errors[peer], errors["control_variate"]) for peer in peers}
    by_seed: dict[str, list[float]] = {}
    for peer, seed in itertools.product(peers, range(repeats)):
        theirs, ours = (
            [each[min(seed, len(each) - 1)] for each in values[name]]  # of one, all the same
            for name in (peer, "control_variate")
        )
        by_seed.setdefault(peer, []).append(median_ratio(ratios(counts, theirs, ours)))
    return {
        "samples": counts,
        "errors": errors,
        "errors of seeds": values,
        "error over GradientShap's": {
            n: ours / theirs
            for n, ours, theirs in zip(
                counts, errors["control_variate"], errors["GradientShap"], strict=True
            )
        },
        "ratios": found,
        "median_ratio": {peer: median_ratio(by_count) for peer, by_count in found.items()},
        "median_ratio of seeds": by_seed,
        "error_of_truth": float(error_of_truth),
        "accuracy": float((model(test).argmax(1) == target).double().mean()),
    }


def seeded(n: int) -> Iterator[int]:
    """Seed the generators that the estimators draw from."""
    for seed in range(n):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - GradientShap draws from it
        yield seed


def error_of(estimate: Tensor, truth: Tensor) -> float:
    """Relative error."""
    return float((estimate - truth).norm() / truth.norm())


def draw(results: dict[str, Any]) -> Figure:
    """Errors against samples, a panel for each network."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    colours = {"GradientShap": "C0", "GradientExplainer": "C1", "monte_carlo": "C2"}
    *panels, spare = figure.subplots(2, 4).flat
    spare.set_axis_off()
    for axes, (name, found) in zip(panels, results.items(), strict=True):
        for method, each in found["errors"].items():
            colour = colours.get(method, "C3")
            axes.loglog(found["samples"], each, "o-", color=colour, label=method, markersize=3)
        axes.set_title(name, fontsize=9)
        axes.legend(fontsize=6)
    figure.supxlabel("gradient evaluations per example")
    figure.supylabel("relative error")
    return figure


def main() -> None:
    """Run the benchmark."""
    args = parser(__doc__).parse_args()
    counts = [2**k for k in range(7 if args.quick else 9)]
    repeats = 3 if args.quick else 9
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = found = measure(case, counts, repeats)
        cells = [
            [
                n,
                *(each[i] for each in found["errors"].values()),
                *(by_count.get(n, {}).get("ratio", "") for by_count in found["ratios"].values()),
            ]
            for i, n in enumerate(counts)
        ]
        shown = ", ".join(f"{peer} {median:.2f}" for peer, median in found["median_ratio"].items())
        show(
            f"{name}: relative error; median ratio: {shown} "
            f"(truth good to {found['error_of_truth']:.1g})",
            [
                "samples",
                *found["errors"],
                *(f"{peer} / control variate" for peer in found["ratios"]),
            ],
            cells,
        )
    settings = {
        "batch": BATCH,
        "references": N_REFERENCES,
        "quadrature_nodes": 2 * NODES,
        "seeds": repeats,
        "quick": args.quick,
    }
    save(args.output, "estimator_efficiency", settings, results)
    save_plot(args.output, "estimator_efficiency", draw(results))


if __name__ == "__main__":
    main()
