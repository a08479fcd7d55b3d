"""Gradient evaluations that expected gradients need for the error of GradientShap, and of SHAP's.

The truth averages a Gauss-Legendre quadrature of the path integral over all reference rows. The
error is relative, in the Frobenius norm over a test batch; the median of several seeds.
``shap.GradientExplainer`` draws as GradientShap does, row by row; it takes long, so that a fifth of
the seeds must do.
"""

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import shap
import torch
import torch.nn.functional as F
from _common import parser, save, save_plot, show
from captum.attr import GradientShap
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from captum_priors import ExpectedGradients

BATCH, N_REFERENCES, NODES = 64, 200, 50
Explain = Callable[[Tensor, Tensor, int, Tensor], Tensor]


def breast_cancer() -> tuple[Tensor, Tensor]:
    """30 standardised measurements, two classes."""
    x, y = load_breast_cancer(return_X_y=True)
    return torch.tensor((x - x.mean(0)) / x.std(0)), torch.tensor(y)


def digits() -> tuple[Tensor, Tensor]:
    """64 pixels in [0, 1], ten classes."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16), torch.tensor(y)


def trained(x: Tensor, y: Tensor, width: int) -> nn.Module:
    """Train an MLP with two hidden layers, in double precision."""
    model = nn.Sequential(
        *(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, int(y.max()) + 1),
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        rows = torch.randint(len(x), (128,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def exact(model: nn.Module, x: Tensor, references: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Expected gradients over all references, the path integral by quadrature."""
    places, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(nodes))
    alphas, weights = ((1 + places) / 2).reshape(-1, 1, 1), (weights / 2).reshape(-1, 1, 1)
    total = torch.zeros_like(x)
    for reference in references:
        points = (reference + alphas * (x - reference)).requires_grad_()
        output = model(points.flatten(0, 1)).reshape(nodes, len(x), -1)
        chosen = output.gather(2, target.expand(nodes, -1).unsqueeze(2)).sum()
        (gradient,) = torch.autograd.grad(chosen, points)
        total += (x - reference) * (weights * gradient).sum(0)
    return total / len(references)


def methods_for(model: nn.Module) -> dict[str, Explain]:
    """Captum's estimator and ours."""

    def explain(attribute: Any, x: Tensor, references: Tensor, n: int, target: Tensor) -> Tensor:
        found: Tensor = attribute(x, references, n_samples=n, target=target)
        return found.detach()

    ours = ExpectedGradients(model).attribute
    return {
        "GradientShap": partial(explain, GradientShap(model).attribute),
        "GradientExplainer": gradient_explainer(model),
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


def measure(
    x: Tensor, y: Tensor, width: int, counts: list[int], repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[int, dict[str, Any]]], float]:
    """Errors of every method, ratios at equal error to each peer, and the truth's own error."""
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    test, target, rest = x[:BATCH], y[:BATCH], x[BATCH:]
    model = trained(rest, y[BATCH:], width)
    references = rest[:N_REFERENCES]
    truth = exact(model, test, references, target, 2 * NODES)
    error_of_truth = exact(model, test, references, target, NODES).sub(truth).norm() / truth.norm()
    errors: dict[str, list[float]] = {}
    for name, explain in methods_for(model).items():
        errors[name] = []
        seeds = repeats // 5 if name == "GradientExplainer" else repeats
        for n in counts:
            each = []
            for seed in range(max(1, seeds)):
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - GradientShap draws from it
                estimate = explain(test, references, n, target)
                each.append(float((estimate - truth).norm() / truth.norm()))
            errors[name].append(statistics.median(each))
    found = {
        peer: ratios(counts, errors[peer], errors["control_variate"])
        for peer in ("GradientShap", "GradientExplainer")
    }
    return errors, found, float(error_of_truth)


def main() -> None:
    """Run the benchmark."""
    args = parser(__doc__).parse_args()
    counts = [2**k for k in range(8 if args.quick else 10)]
    repeats = 3 if args.quick else 15
    results: dict[str, Any] = {}
    figure = Figure(figsize=(10, 4))
    for axes, (name, load, width) in zip(
        figure.subplots(1, 2),
        (("breast cancer", breast_cancer, 32), ("digits", digits, 64)),
        strict=True,
    ):
        errors, found, error_of_truth = measure(*load(), width, counts, repeats)
        medians = {
            peer: statistics.median(r["ratio"] for r in by_count.values())
            for peer, by_count in found.items()
        }
        results[name] = {
            "samples": counts,
            "errors": errors,
            "ratios": found,
            "median_ratio": medians,
            "error_of_truth": error_of_truth,
        }
        rows = [
            [
                n,
                *(errors[m][i] for m in errors),
                *(by_count.get(n, {}).get("ratio", "") for by_count in found.values()),
            ]
            for i, n in enumerate(counts)
        ]
        shown = ", ".join(f"{peer} {median:.2f}" for peer, median in medians.items())
        show(
            f"{name}: relative error; median ratio: {shown} (truth good to {error_of_truth:.1g})",
            ["samples", *errors, *(f"{peer} / control variate, equal error" for peer in found)],
            rows,
        )
        for method, each in errors.items():
            axes.loglog(counts, each, "o-", label=method)
        axes.set(title=name, xlabel="gradient evaluations per example", ylabel="relative error")
        axes.legend()
    settings = {
        "batch": BATCH,
        "references": N_REFERENCES,
        "quadrature_nodes": 2 * NODES,
        "repeats": repeats,
        "quick": args.quick,
    }
    save(args.output, "estimator_efficiency", settings, results)
    save_plot(args.output, "estimator_efficiency", figure)


if __name__ == "__main__":
    main()
