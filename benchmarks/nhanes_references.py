"""How many references does the sparsity prior need? And what does the X-Gradient do without any?

Hesse et al. 2021 on NHANES I: in a network without biases, input × gradient is the integrated
gradient with baseline zero and needs one gradient (X-Gradient), while expected gradients need about
32 references to train as well. Here: test ROC-AUC and Gini coefficient for 1, 16 and 128 references
with the original's estimator and for 16 with the control variate, in pairs over random splits, on
the 18 features of SHAP's subset and a small network, its weight chosen on validation; and, for some
of the splits, the error of the prior's parameter gradient beside that with 2,048 references.

    python benchmarks/nhanes_references.py --data nhanes=DIR
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import save, save_plot, show
from _nhanes import Split, evaluate, fit, load, network, split
from _reproduction import (
    arguments_of,
    folder_of,
    gains,
    in_processes,
    seeds_of,
    show_runs,
    summary,
)
from captum.attr import InputXGradient, IntegratedGradients
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import AttributionPrior
from captum_priors.penalties import gini
from captum_priors.priors import Prior, SparsityPrior

WIDTHS, EPOCHS, RATE, WEIGHTS = (64, 32), 60, 3e-3, (0.1, 0.3)
REFERENCES = (1, 2, 4, 8, 16, 32, 64, 128)
ESTIMATORS = ("monte_carlo", "control_variate")
TRAINED = ("monte_carlo", 1), ("monte_carlo", 16), ("monte_carlo", 128), ("control_variate", 16)
# Splits whose gradients' errors are measured, too.
N_ERRORS = 5
# Means over the 200 replicates that the authors' repository holds; standard errors about .003.
PUBLISHED = {
    "unregularised": 0.7077,
    "X-Gradient": 0.7673,
    "expected gradients": dict(
        zip(
            map(str, REFERENCES),
            (0.7486, 0.7518, 0.7603, 0.7607, 0.7640, 0.7679, 0.7687, 0.7722),
            strict=True,
        )
    ),
    "128 references less 1": {"mean": 0.0236, "error": 0.0031},
}
# What is compared in pairs: the first less the second.
PAIRS = (
    ("monte_carlo, k = 128", "monte_carlo, k = 1"),
    ("monte_carlo, k = 16", "monte_carlo, k = 1"),
    ("control_variate, k = 16", "monte_carlo, k = 16"),
    ("X-Gradient", "monte_carlo, k = 1"),
    ("X-Gradient", "monte_carlo, k = 128"),
    ("X-Gradient", "unregularised, no bias"),
    ("monte_carlo, k = 1", "unregularised"),
    ("monte_carlo, k = 128", "unregularised"),
)


def new_model(data: Split, seed: int, *, bias: bool = True) -> nn.Sequential:
    """Start a network from a seed."""
    torch.manual_seed(seed)
    return network(data.train[0].shape[1], WIDTHS, bias=bias)


def run_split(seed: int, folder: Path, epochs: int) -> dict[str, Any]:
    """Train every variant on one split."""
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
    for estimator, k in TRAINED:
        options = {"n_samples": k, "estimator": estimator, "baselines": data.train[0]}
        prior_of = functools.partial(SparsityPrior, **options)
        found[name_of(estimator, k)], _ = best_of(prior_of, data, seed, epochs)
    errors = gradient_errors(data, seed) if seed < N_ERRORS else None
    print(f"split {seed} done", flush=True)
    return {"scores": found, "gap": gap.item(), "errors": errors}


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


def gradient_errors(data: Split, seed: int, repeats: int = 5) -> dict[str, float]:
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
        for k in REFERENCES:
            squares = [(g - exact).square().sum() for g in gradients(estimator, k, repeats)]
            error = (torch.stack(squares).mean() / exact.square().sum()).sqrt()
            found[name_of(estimator, k)] = error.item()
    return found


def draw(results: dict[str, Any], errors: dict[str, Any]) -> Figure:
    """AUC and gradient error against the number of references."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for estimator in ESTIMATORS:
        counts = [k for name, k in TRAINED if name == estimator]
        scores = [results[name_of(estimator, k)]["ROC-AUC"] for k in counts]
        means, error = ([s[key] for s in scores] for key in ("mean", "error"))
        left.errorbar(counts, means, error, marker="o", label=estimator)
        values = [errors[name_of(estimator, k)]["mean"] for k in REFERENCES]
        right.loglog(REFERENCES, values, "o-", label=estimator)
    for name, style in (("X-Gradient", "k--"), ("unregularised", "k:")):
        left.plot(
            [REFERENCES[0], REFERENCES[-1]],
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
    seeds = seeds_of(options, full=100, quick=1)
    job = functools.partial(
        run_split,
        folder=folder_of(options.data, "nhanes"),
        epochs=20 if options.quick else EPOCHS,
    )
    found = in_processes(job, seeds, options.jobs)
    runs = {name: [each["scores"][name] for each in found] for name in found[0]["scores"]}
    show_runs("NHANES I, 100 training rows", runs)
    results = {name: summary(each) for name, each in runs.items()}
    paired = {f"{one} less {other}": gains(runs[one], runs[other]) for one, other in PAIRS}
    show(
        "ROC-AUC, in pairs",
        ["", "mean", "standard error"],
        [[n, f"{g['ROC-AUC']['mean']:+.4f}", g["ROC-AUC"]["error"]] for n, g in paired.items()],
    )
    errors = summary([each["errors"] for each in found if each["errors"]])
    show(
        "Relative error of the prior's parameter gradient",
        ["estimator", *(f"k = {k}" for k in REFERENCES)],
        [[e, *(errors[name_of(e, k)]["mean"] for k in REFERENCES)] for e in ESTIMATORS],
    )
    gap = max(each["gap"] for each in found)
    print(f"X-Gradient beside integrated gradients, largest difference: {gap:.2g} of the largest")
    settings = vars(options) | {"seeds": len(seeds), "widths": WIDTHS, "epochs": EPOCHS}
    document = {
        "found": results,
        "paired": paired,
        "gradient errors": errors,
        "X-Gradient - IG": gap,
        "published": PUBLISHED,
    }
    settings |= {"rate": RATE, "weights": WEIGHTS}
    save(options.output, "nhanes_references", settings, document)
    save_plot(options.output, "nhanes_references", draw(results, errors))


if __name__ == "__main__":
    main()
