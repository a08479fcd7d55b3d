"""Expected gradients beside integrated gradients and gradients on 18 keep/remove metrics.

Table 1 of Erion et al. 2021, on SHAP's two synthetic regressions with 60 Gaussian features (every
third of the first 30 has coefficient 1): in ``correlated groups`` those 30 come in threes that
correlate at .99, in ``independent linear`` none do. A network is trained on 900 rows and explained
on 100. A metric keeps or removes the features that an attribution ranks first, a growing number of
them, and asks how the output changes: K(eep) or R(emove); P(ositive), N(egative) or A(bsolute)
attributions; the missing features set to their M(ean), R(esampled) from the training rows, or
I(mputed) from the features that are there. Higher is better everywhere; P and N are areas under the
mean output, A under the R².

    python benchmarks/correlated_groups.py
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from _common import save, save_plot, show
from _reproduction import arguments_of, in_processes, seeds_of, summary
from captum.attr import IntegratedGradients, Saliency
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import ExpectedGradients

N_FEATURES, N_TRAIN, N_TEST, SAMPLES = 60, 900, 100, 200
METRICS = ["".join(name) for name in itertools.product("KR", "PNA", "MRI")]
# Four columns of their Table 1, correlated groups.
PUBLISHED = {
    "expected gradients": {"KPM": 3.731, "RPM": 3.612, "KAM": 0.906, "RAM": 0.897},
    "integrated gradients": {"KPM": 3.667, "RPM": 3.539, "KAM": 0.905, "RAM": 0.872},
    "gradients": {"KPM": 0.096, "RPM": 0.035, "KAM": 0.838, "RAM": 0.729},
    "random": {"KPM": 0.033, "RPM": -0.053, "KAM": 0.593, "RAM": 0.400},
}


def make_data(kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features and targets; noise of standard deviation .01."""
    beta = torch.zeros(N_FEATURES)
    beta[0:30:3] = 1
    covariance = torch.eye(N_FEATURES)
    if kind == "correlated groups":
        for start in range(0, 30, 3):
            covariance[start : start + 3, start : start + 3] += 0.99 * (1 - torch.eye(3))
    x = torch.randn(N_TRAIN + N_TEST, N_FEATURES, generator=generator)
    x = x @ torch.linalg.cholesky(covariance).T
    return x, x @ beta + 0.01 * torch.randn(len(x), generator=generator)


def fit(x: Tensor, y: Tensor, epochs: int) -> nn.Sequential:
    """A network with two hidden layers."""
    model = nn.Sequential(
        *(nn.Linear(N_FEATURES, 64), nn.ReLU()),
        *(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = F.mse_loss(model(x[rows])[:, 0], y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
    return model


def attributions_of(model: nn.Module, x: Tensor, background: Tensor) -> dict[str, Tensor]:
    """Each method's attributions; expected and integrated gradients with 200 samples or steps."""
    expected, settings = ExpectedGradients(model), {"n_samples": SAMPLES, "target": 0}
    return {
        "expected gradients": expected.attribute(
            x, background, estimator="monte_carlo", **settings
        ).detach(),
        "expected gradients, control variate": expected.attribute(
            x, background, **settings
        ).detach(),
        "integrated gradients": IntegratedGradients(model)
        .attribute(x, background.mean(0, keepdim=True), target=0, n_steps=SAMPLES)
        .detach()
        .float(),
        "gradients": Saliency(model).attribute(x, target=0, abs=False).detach(),
        "random": torch.randn(x.shape),
    }


class Metrics:
    """Keep/remove metrics of one model on its test rows."""

    def __init__(self, model: nn.Module, train: Tensor, test: tuple[Tensor, Tensor]) -> None:
        self.model, self.train = model, train
        self.x, self.y = test
        # Eleven numbers of features, dense where they are few.
        steps = (torch.logspace(0, 1, 11) - 1) / 9
        self.counts = (N_FEATURES * steps).round().unique().long()
        self.mean = train.mean(0)
        self.covariance = train.T.cov().double() + 1e-6 * torch.eye(N_FEATURES)

    @torch.no_grad()
    def score(self, metric: str, attributions: Tensor) -> float:
        """One of the 18 metrics."""
        act, sign, fill = metric
        ranked = {"P": attributions, "N": -attributions, "A": attributions.abs()}[sign]
        rank = ranked.argsort(1, descending=True).argsort(1)
        values = []
        for count in self.counts:
            # Features that count against the sign are never chosen.
            chosen = rank < torch.minimum(count, (ranked >= 0).sum(1)).unsqueeze(1)
            outputs = self._outputs(chosen if act == "K" else ~chosen, fill)
            if sign == "A":
                values.append(float(1 - (outputs - self.y).square().mean() / self.y.var()))
            else:
                values.append(float(outputs.mean()))
        area = float(torch.trapezoid(torch.tensor(values), self.counts / N_FEATURES))
        if sign == "A":
            return area if act == "K" else 1 - area
        return area if (act == "K") == (sign == "P") else -area

    def _outputs(self, known: Tensor, fill: str) -> Tensor:
        if fill == "M":
            return self._predict(torch.where(known, self.x, self.mean))
        if fill == "R":
            rows = self.train[torch.randperm(len(self.train))[:SAMPLES]]
            filled = torch.where(known.unsqueeze(1), self.x.unsqueeze(1), rows)
            return self._predict(filled.flatten(0, 1)).unflatten(0, (*known.shape[:1], -1)).mean(1)
        # Conditional mean of a Gaussian given what is known: for each row one linear system, with
        # the identity where a feature is not known.
        both = known.unsqueeze(2) & known.unsqueeze(1)
        system = torch.where(both, self.covariance, torch.eye(N_FEATURES).double())
        deviation = torch.where(known, self.x - self.mean, 0).double()
        solved = torch.linalg.solve(system, deviation)
        imputed = self.mean + (solved * known @ self.covariance).float()
        return self._predict(torch.where(known, self.x, imputed))

    def _predict(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.model(x)[:, 0]
        return outputs


def run(job: tuple[str, int, int]) -> dict[str, dict[str, float]]:
    """All methods on all metrics, for one data set and seed."""
    kind, seed, epochs = job
    x, y = make_data(kind, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    train, test = (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])
    model = fit(*train, epochs)
    metrics = Metrics(model, train[0], test)
    return {
        name: {metric: metrics.score(metric, each) for metric in METRICS}
        for name, each in attributions_of(model, test[0], train[0]).items()
    }


def wins(found: list[dict[str, dict[str, float]]], one: str, other: str) -> int:
    """On how many metrics the mean over seeds of one method is above that of another."""
    return sum(
        sum(run[one][metric] for run in found) > sum(run[other][metric] for run in found)
        for metric in METRICS
    )


def draw(results: dict[str, Any]) -> Figure:
    """Every metric relative to the best method's."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (kind, each) in zip(figure.subplots(2, 1), results.items(), strict=True):
        for name, scores in each["scores"].items():
            heights = [
                scores[m]["mean"] / max(s[m]["mean"] for s in each["scores"].values())
                for m in METRICS
            ]
            axes.plot(METRICS, heights, "o-", label=name)
        axes.set(title=kind, ylabel="share of the best")
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    """Run both data sets and count the wins."""
    options = arguments_of(__doc__).parse_args()
    seeds = seeds_of(options, full=5, quick=1)
    epochs = 20 if options.quick else 40
    jobs = [
        (kind, seed, epochs)
        for kind in ("correlated groups", "independent linear")
        for seed in seeds
    ]
    runs = dict(zip(jobs, in_processes(run, jobs, options.jobs), strict=True))
    results: dict[str, Any] = {}
    for kind in ("correlated groups", "independent linear"):
        found = [runs[kind, seed, epochs] for seed in seeds]
        scores = {name: summary([each[name] for each in found]) for name in found[0]}
        ours = {n: wins(found, n, "integrated gradients") for n in scores if "expected" in n}
        results[kind] = {"scores": scores, "metrics better than integrated gradients": ours}
        rows = [[n, *(s[m]["mean"] for m in METRICS)] for n, s in scores.items()]
        show(f"{kind}, {len(seeds)} seeds", ["", *METRICS], rows)
        print(f"{kind}: metrics out of 18 above integrated gradients: {ours}")
    document = {"found": results, "published": PUBLISHED}
    save(options.output, "correlated_groups", vars(options) | {"epochs": epochs}, document)
    save_plot(options.output, "correlated_groups", draw(results))


if __name__ == "__main__":
    main()
