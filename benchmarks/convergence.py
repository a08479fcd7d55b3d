"""Which attributions can a prior work through? An order of estimators, not a speed.

The convergence demo of Erion et al. 2021: two inputs that are always equal, a saturated classifier
sigmoid(10 x1 + 10 x2 - 6) that uses both, and a prior on the mean absolute attribution of the
second. The dependence is |w2 / w1|; in the original it vanishes after 58 to 68 epochs with expected
gradients, about 107 with gradients of the log probability and with integrated gradients of four
steps, and not within 200 with plain gradients (.16) or integrated gradients of two steps (1.0).
Here an epoch is one batch of 64 and the learning rate is five times theirs: what is compared is the
order of the estimators, and numbers of epochs are not.

    python benchmarks/convergence.py
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import save, save_plot
from _reproduction import arguments_of, in_processes, seeds_of, show_runs, summary
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients

RATE, GONE = 0.05, 0.01
PUBLISHED = {"EG, k = 1": 68, "EG, k = 5": 58, "gradients of log p": 106, "IG, 4 steps": 107}


class Probability(nn.Module):
    """The probability, or the log probability, of a logistic classifier."""

    def __init__(self, linear: nn.Linear, log: bool) -> None:
        super().__init__()
        self.linear, self.log = linear, log

    def forward(self, x: Tensor) -> Tensor:
        """One number for each row."""
        logit = self.linear(x)
        return F.logsigmoid(logit) if self.log else torch.sigmoid(logit)


def of_second(attributions: Tensor) -> Tensor:
    """Penalise the absolute attribution of the second feature."""
    return attributions[:, 1].abs()


def methods() -> dict[str, Callable[[nn.Linear], Any]]:
    """The prior of each attribution method."""

    def expected(linear: nn.Linear, k: int, estimator: str) -> Any:
        explainer = ExpectedGradients(Probability(linear, log=False))
        return AttributionPrior(explainer, of_second, n_samples=k, estimator=estimator)

    def integrated(linear: nn.Linear, steps: int) -> Any:
        explainer = IntegratedGradients(Probability(linear, log=False))
        # Few evenly spaced points that end in the input; the original's exact rule is not known.
        return AttributionPrior(explainer, of_second, n_steps=steps, method="riemann_right")

    def gradients(linear: nn.Linear, log: bool) -> Any:
        return AttributionPrior(Saliency(Probability(linear, log=log)), of_second, abs=False)

    def input_x_gradient(linear: nn.Linear) -> Any:
        return AttributionPrior(InputXGradient(Probability(linear, log=False)), of_second)

    eg = functools.partial(expected, estimator="monte_carlo")
    return {
        "EG, k = 1": functools.partial(eg, k=1),
        "EG, k = 2": functools.partial(eg, k=2),
        "EG, k = 5": functools.partial(eg, k=5),
        "EG, k = 2, control variate": functools.partial(expected, k=2, estimator="control_variate"),
        "EG, k = 5, control variate": functools.partial(expected, k=5, estimator="control_variate"),
        "IG, 2 steps": functools.partial(integrated, steps=2),
        "IG, 4 steps": functools.partial(integrated, steps=4),
        "gradients": functools.partial(gradients, log=False),
        "gradients of log p": functools.partial(gradients, log=True),
        "input × gradient": input_x_gradient,
    }


def run(job: tuple[str, int, int]) -> list[float]:
    """Train one method; the dependence after every epoch."""
    name, seed, epochs = job
    torch.manual_seed(seed)
    linear = nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.fill_(10.0)
        linear.bias.fill_(-6.0)
    prior = methods()[name](linear)
    optimizer = torch.optim.Adam(linear.parameters(), RATE)
    dependence = []
    for _ in range(epochs):
        y = torch.randint(2, (64,)).float()
        x = y.unsqueeze(1).repeat(1, 2)
        options: dict[str, Any] = {"baselines": x} if name.startswith("EG") else {}
        loss = F.binary_cross_entropy_with_logits(linear(x)[:, 0], y)
        loss = loss + prior(x, target=0, **options)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        first, second = linear.weight[0].abs().tolist()
        dependence.append(second / first)
    return dependence


def draw(curves: dict[str, list[list[float]]]) -> Figure:
    """Dependence against epochs, mean over seeds."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for name, of_seeds in curves.items():
        mean = torch.tensor(of_seeds).mean(0).tolist()
        line = "-" if name.startswith("EG") else "--"
        axes.plot(mean, line, label=name)
    axes.set(xlabel="epoch", ylabel="dependence on the second feature, |w2 / w1|", ylim=(0, 1.1))
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    """Run every method."""
    options = arguments_of(__doc__).parse_args()
    seeds = seeds_of(options, full=5, quick=1)
    epochs = 60 if options.quick else 300
    jobs = [(name, seed, epochs) for name in methods() for seed in seeds]
    found = dict(zip(jobs, in_processes(run, jobs, options.jobs), strict=True))
    curves = {name: [found[name, seed, epochs] for seed in seeds] for name in methods()}
    runs = {
        name: [
            {
                # The number of epochs that were run where it does not vanish.
                "epochs until gone": next((i for i, d in enumerate(c, 1) if d < GONE), epochs),
                "dependence at the end": c[-1],
            }
            for c in of_seeds
        ]
        for name, of_seeds in curves.items()
    }
    show_runs(f"Two equal features, {epochs} epochs", runs)
    results = {name: summary(each) for name, each in runs.items()}
    document = {"found": results, "published epochs": PUBLISHED}
    save(options.output, "convergence", vars(options) | {"epochs": epochs}, document)
    save_plot(options.output, "convergence", draw(curves))


if __name__ == "__main__":
    main()
