"""The sparsity prior on 100 rows of NHANES I, beside other ways to ask for few features.

Erion et al. 2021: 10-year survival, 100 training rows, random splits, a ReLU network with layers
of 512, 128 and 32, 100 epochs of Adam on the full batch; weight, of five for each method, and
epoch are those of the best ROC-AUC on 100 validation rows. Their 118 one-hot features are not to be
had: these are the 18 features of SHAP's subset, alone and with 100 columns of Gaussian noise
(``--noise-columns``).

    python benchmarks/nhanes_sparsity.py --data nhanes=DIR
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import save, save_plot
from _nhanes import Term, evaluate, fit, load, network, split
from _reproduction import (
    arguments_of,
    folder_of,
    gains,
    in_processes,
    seeds_of,
    show_runs,
    summary,
)
from captum.attr import Saliency
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients
from captum_priors.penalties import gini, l1

WIDTHS, EPOCHS = (512, 128, 32), 100
# Test ROC-AUC and Gini coefficient in the original, read off its figure.
PUBLISHED = {
    "unregularised": (0.705, 0.562),
    "L1 on weights": (0.759, 0.713),
    "group lasso": (0.755, 0.648),
    "L1-gradients": (0.694, 0.531),
    "Gini-gradients": (0.726, 0.730),
    "Gini-EG": (0.781, 0.839),
}


def _weights(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith("weight")]


def l1_on_weights(model: nn.Module) -> Term:
    """Sum of the absolute weights of all layers."""
    return lambda _: torch.stack([w.abs().sum() for w in _weights(model)]).sum()


def group_lasso(model: nn.Module) -> Term:
    """Sum over the features of the norm of what leaves them (Scardapane et al. 2017)."""
    return lambda _: _weights(model)[0].norm(dim=0).sum()


def on_gradients(model: nn.Module, penalty: Callable[[Tensor], Tensor]) -> Term:
    """A penalty on the gradient of the logit."""
    prior = AttributionPrior(Saliency(model), penalty, abs=False)
    return lambda x: prior(x, target=0)


def on_expected_gradients(model: nn.Module, penalty: Callable[[Tensor], Tensor]) -> Term:
    """A penalty on expected gradients with one reference a step, one of the training rows.

    With the Gini coefficient it is :class:`SparsityPrior`.
    """
    prior = AttributionPrior(ExpectedGradients(model), penalty, n_samples=1)
    return lambda x: prior(x, baselines=x, target=0)


def methods() -> dict[str, tuple[Callable[[nn.Module], Term] | None, tuple[float, ...]]]:
    """Every regularizer, and the weights that validation chooses from."""
    absolute, scale_free = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), (0.01, 0.03, 0.1, 0.3, 1.0)
    return {
        "unregularised": (None, (0.0,)),
        "L1 on weights": (l1_on_weights, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        "group lasso": (group_lasso, (1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
        "L1-gradients": (functools.partial(on_gradients, penalty=l1), absolute),
        "L1-EG": (functools.partial(on_expected_gradients, penalty=l1), absolute),
        "Gini-gradients": (functools.partial(on_gradients, penalty=gini), scale_free),
        "Gini-EG": (functools.partial(on_expected_gradients, penalty=gini), scale_free),
    }


def run_split(job: tuple[Path, int, int, int]) -> list[dict[str, Any]]:
    """Train every method at every weight on one split."""
    folder, noise_columns, seed, epochs = job
    data = split(load(folder), seed, noise_columns)
    found = []
    for name, (term_of, weights) in methods().items():
        for weight in weights:
            torch.manual_seed(seed)
            model = network(data.train[0].shape[1], WIDTHS)
            term = None if term_of is None else _weighted(weight, term_of(model))
            validation = fit(model, term, data, epochs)
            row = {"method": name, "weight": weight, "seed": seed, "validation": validation}
            found.append({**row, **evaluate(model, data)})
    print(f"split {seed} done", flush=True)
    return found


def _weighted(weight: float, term: Term) -> Term:
    return lambda x: weight * term(x)


def figures(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Keep what is reported of each run."""
    return [{k: row[k] for k in ("ROC-AUC", "Gini")} for row in rows]


def draw(by_weight: dict[str, dict[float, Any]]) -> Figure:
    """Test AUC against the Gini coefficient, each weight a point."""
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    for name, found in by_weight.items():
        points = list(found.values())
        axes.errorbar(
            [p["Gini"]["mean"] for p in points],
            [p["ROC-AUC"]["mean"] for p in points],
            yerr=[p["ROC-AUC"]["error"] for p in points],
            marker="o",
            label=name,
        )
    axes.set(xlabel="Gini coefficient of expected gradients", ylabel="test ROC-AUC")
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    """Run the benchmark with each number of columns of noise."""
    arguments = arguments_of(__doc__, data="nhanes=DIR with NHANESI_subset_X.csv and _y.csv")
    arguments.add_argument("--noise-columns", type=int, nargs="+", default=[0, 100])
    options = arguments.parse_args()
    for noise_columns in options.noise_columns:
        compare(options, noise_columns)


def compare(options: argparse.Namespace, noise_columns: int) -> None:
    """Run every split, choose by validation, compare with the original."""
    seeds = seeds_of(options, full=20, quick=2)
    epochs = 20 if options.quick else EPOCHS
    folder = folder_of(options.data, "nhanes")
    jobs = [(folder, noise_columns, seed, epochs) for seed in seeds]
    rows = [r for found in in_processes(run_split, jobs, options.jobs) for r in found]
    chosen: dict[str, list[dict[str, float]]] = {}
    by_weight: dict[str, dict[float, Any]] = {}
    for name, (_, weights) in methods().items():
        mine = [r for r in rows if r["method"] == name]
        best = [max((r for r in mine if r["seed"] == s), key=_validation) for s in seeds]
        chosen[name] = figures(best)
        by_weight[name] = {
            w: summary(figures([r for r in mine if r["weight"] == w])) for w in weights
        }
    title = f"NHANES I, 18 features + {noise_columns} of noise, 100 training rows"
    show_runs(title, chosen)
    name = "nhanes_sparsity" + ("_noise" if noise_columns else "")
    results = {
        "chosen": {method: summary(runs) for method, runs in chosen.items()},
        "published": PUBLISHED,
        "columns of noise": noise_columns,
        "by weight": by_weight,
        "gain over unregularised": {
            method: gains(runs, chosen["unregularised"]) for method, runs in chosen.items()
        },
    }
    settings = vars(options) | {"noise_columns": noise_columns, "epochs": epochs, "widths": WIDTHS}
    save(options.output, name, settings, results)
    save_plot(options.output, name, draw(by_weight))


def _validation(row: dict[str, Any]) -> float:
    return float(row["validation"])


if __name__ == "__main__":
    main()
