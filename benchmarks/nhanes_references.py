"""How many references does the sparsity prior need? And what does the X-Gradient do without any?

Hesse et al. 2021 on NHANES I: in a network without biases, input × gradient is the integrated
gradient with baseline zero and needs one gradient (X-Gradient), while expected gradients need about
32 references to train as well. Here: test ROC-AUC and Gini coefficient for 1 to 128 references,
with the original's estimator and with the control variate, on the 18 features of SHAP's subset and
a small network, its weight chosen on validation; and the error of the prior's parameter gradient
beside that with 2,048 references.

    python benchmarks/nhanes_references.py --data nhanes=DIR
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import save, save_plot, show
from _nhanes import Split, evaluate, fit, load, network, split
from _reproduction import arguments_of, folder_of, in_processes, seeds_of, show_runs, summary
from captum.attr import InputXGradient, IntegratedGradients
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import AttributionPrior
from captum_priors.penalties import gini
from captum_priors.priors import Prior, SparsityPrior

WIDTHS, EPOCHS, RATE, WEIGHTS = (64, 32), 60, 3e-3, (0.1, 0.3)
REFERENCES = (1, 2, 4, 8, 16, 32, 64, 128)
ESTIMATORS = ("monte_carlo", "control_variate")
# Test ROC-AUC in the original's code; for expected gradients at 1 to 128 references.
PUBLISHED = {
    "unregularised": 0.704,
    "unregularised, no bias": 0.706,
    "X-Gradient": 0.767,
    "expected gradients": [0.750, 0.757, 0.762, 0.763, 0.767, 0.770, 0.770, 0.768],
}


def new_model(data: Split, seed: int, *, bias: bool = True) -> nn.Sequential:
    """Start a network from a seed."""
    torch.manual_seed(seed)
    return network(data.train[0].shape[1], WIDTHS, bias=bias)


def run_split(job: tuple[int, tuple[int, ...]], folder: Path, epochs: int) -> dict[str, Any]:
    """Train every variant on one split."""
    seed, references = job
    data = split(load(folder), seed)
    found = {}
    for bias in (True, False):
        model = new_model(data, seed, bias=bias)
        fit(model, None, data, epochs, RATE)
        found["unregularised" if bias else "unregularised, no bias"] = evaluate(model, data)
    found["X-Gradient"], model = best_of(
        lambda model: AttributionPrior(InputXGradient(model), gini), data, seed, epochs, bias=False
    )
    rows = data.test[0][:100]
    exact = IntegratedGradients(model).attribute(rows, target=0, n_steps=20)
    gap = (InputXGradient(model).attribute(rows, target=0) - exact).abs().max() / exact.abs().max()
    for estimator in ESTIMATORS:
        for k in references:
            # One reference has no covariance: there the two are the same.
            if estimator == "control_variate" and k == 1:
                found[name_of(estimator, k)] = found[name_of("monte_carlo", k)]
                continue
            options = {"n_samples": k, "estimator": estimator, "baselines": data.train[0]}
            prior_of = functools.partial(SparsityPrior, **options)
            found[name_of(estimator, k)], _ = best_of(prior_of, data, seed, epochs)
    print(f"split {seed} done", flush=True)
    return {"scores": found, "gap": gap.item(), "errors": gradient_errors(data, seed, references)}


def best_of(
    prior_of: Callable[[nn.Module], Prior],
    data: Split,
    seed: int,
    epochs: int,
    *,
    bias: bool = True,
) -> tuple[dict[str, float], nn.Module]:
    """Scores, and the network, of the weight that is best on validation."""
    tried = []
    for weight in WEIGHTS:
        model = new_model(data, seed, bias=bias)
        prior = weight * prior_of(model)
        tried.append((fit(model, functools.partial(prior, target=0), data, epochs, RATE), model))
    model = max(tried, key=lambda each: each[0])[1]
    return evaluate(model, data), model


def name_of(estimator: str, k: int) -> str:
    """Name an expected-gradients variant."""
    return f"{estimator}, k = {k}"


def gradient_errors(
    data: Split, seed: int, references: tuple[int, ...], repeats: int = 5
) -> dict[str, float]:
    """Relative error of the prior's parameter gradient in a trained network."""
    model = new_model(data, seed)
    fit(model, None, data, 30, RATE)
    x = data.train[0]

    def gradients(estimator: str, k: int, n: int) -> list[Tensor]:
        """Take several from one prior, which draws anew at each step."""
        prior = SparsityPrior(model, n_samples=k, estimator=estimator)
        found = []
        for _ in range(n):
            value = prior(x, target=0, baselines=x)
            # The bias of the output moves no attribution.
            each = torch.autograd.grad(value, [*model.parameters()], allow_unused=True)
            found.append(torch.cat([g.flatten() for g in each if g is not None]))
        return found

    torch.manual_seed(10_000 + seed)
    exact = torch.stack(gradients("control_variate", 512, 4)).mean(0)
    torch.manual_seed(20_000 + seed)  # draws of their own
    found = {}
    for estimator in ESTIMATORS:
        for k in references:
            squares = [(g - exact).square().sum() for g in gradients(estimator, k, repeats)]
            error = (torch.stack(squares).mean() / exact.square().sum()).sqrt()
            found[name_of(estimator, k)] = error.item()
    return found


def draw(results: dict[str, Any], errors: dict[str, Any], references: tuple[int, ...]) -> Figure:
    """AUC and gradient error against the number of references."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for estimator in ESTIMATORS:
        scores = [results[name_of(estimator, k)]["ROC-AUC"] for k in references]
        means, error = ([s[key] for s in scores] for key in ("mean", "error"))
        left.errorbar(references, means, error, marker="o", label=estimator)
        values = [errors[name_of(estimator, k)]["mean"] for k in references]
        right.loglog(references, values, "o-", label=estimator)
    for name, style in (("X-Gradient", "k--"), ("unregularised", "k:")):
        left.plot(
            [references[0], references[-1]],
            [results[name]["ROC-AUC"]["mean"]] * 2,
            style,
            label=name,
        )
    left.set(xscale="log", xlabel="references", ylabel="test ROC-AUC")
    right.set(xlabel="references", ylabel="relative error of the parameter gradient")
    left.legend(fontsize=7)
    return figure


def main() -> None:
    """Run every split."""
    arguments = arguments_of(__doc__, data="nhanes=DIR with NHANESI_subset_X.csv and _y.csv")
    options = arguments.parse_args()
    seeds = seeds_of(options, full=5, quick=1)
    references = (1, 4, 16) if options.quick else REFERENCES
    job = functools.partial(
        run_split,
        folder=folder_of(options.data, "nhanes"),
        epochs=20 if options.quick else EPOCHS,
    )
    found = in_processes(job, [(seed, references) for seed in seeds], options.jobs)
    runs = {name: [each["scores"][name] for each in found] for name in found[0]["scores"]}
    show_runs("NHANES I, 100 training rows", runs)
    results = {name: summary(each) for name, each in runs.items()}
    errors = summary([each["errors"] for each in found])
    show(
        "Relative error of the prior's parameter gradient",
        ["estimator", *(f"k = {k}" for k in references)],
        [[e, *(errors[name_of(e, k)]["mean"] for k in references)] for e in ESTIMATORS],
    )
    gap = max(each["gap"] for each in found)
    print(f"X-Gradient beside integrated gradients, largest difference: {gap:.2g} of the largest")
    settings = vars(options) | {"widths": WIDTHS, "rate": RATE, "weights": WEIGHTS}
    document = {
        "found": results,
        "gradient errors": errors,
        "X-Gradient - IG": gap,
        "published": PUBLISHED,
    }
    save(options.output, "nhanes_references", settings, document)
    save_plot(options.output, "nhanes_references", draw(results, errors, references))


if __name__ == "__main__":
    main()
