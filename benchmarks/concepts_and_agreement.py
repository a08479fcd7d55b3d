"""A tag that is unlearnt by its concept, and explainers that are trained to agree.

*Concepts* (RR-ClArC, Dreyer et al. 2024). Nine of ten images of the digit 8 wear a tag in training,
and no others: a network takes the tag for an 8. The concept is the difference that the tag makes
to a convolutional layer's activations (200 images, with it and without); what comes after the layer
is trained on, without the prior and with it. Tests: clean images, and images that all wear the tag.

*Agreement* (PEAR, Schwarzschild et al. 2023). Ten-year survival in NHANES I, from 4,000 people: two
layers trained with and without the prior on gradients and integrated gradients that are not
multiplied by the inputs. (Multiplied, they cannot agree with gradients on standardised columns,
whose signs they change: one setting shows what that costs.) Agreement is the mean rank correlation
over 300 test rows, also of pairs that were not trained on; the share of the logits' variance that a
linear function explains says how much of the network is left.

    python benchmarks/concepts_and_agreement.py --data mnist=DIR --data nhanes=DIR
"""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from _common import mnist, parser, save, save_plot
from _nhanes import load
from _reproduction import (
    accuracy,
    folder_of,
    in_processes,
    roc_auc,
    seeds_of,
    show_runs,
    summary,
)
from captum.attr import (
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    Saliency,
)
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors.concepts import fit
from captum_priors.metrics import spearman
from captum_priors.priors import AgreementPrior, ConceptPrior, Prior

DIGIT, SHARE, TAG = 8, 0.9, 5
CONCEPTS: dict[str, dict[str, Any]] = {
    "no prior": {},
    "difference, random": {"method": "difference", "target": "random"},
    "difference, label": {"method": "difference", "target": None},
    "ridge, random": {"method": "ridge", "target": "random"},
    "logistic, random": {"method": "logistic", "target": "random"},
    "difference, cosine": {"method": "difference", "target": "random", "form": "cosine"},
}
CONCEPT_WEIGHT = 10.0
# Weight, and whether the integrated gradients of the prior are multiplied by the inputs.
AGREEMENTS: dict[str, tuple[float, bool]] = {
    "no prior": (0.0, False),
    "weight 0.1": (0.1, False),
    "weight 0.5": (0.5, False),
    "weight 2": (2.0, False),
    "weight 0.5, IG times inputs": (0.5, True),
}
Runs = dict[str, dict[str, float]]


# ---- Concepts ------------------------------------------------------------------------------


def with_tag(x: Tensor) -> Tensor:
    """Images with a bright frame in the upper left corner."""
    x = x.clone()
    x[..., 1 : 1 + TAG, 1 : 1 + TAG] = 1
    x[..., 2:TAG, 2:TAG] = 0
    return x


def network() -> nn.Sequential:
    """Convolutions, whose maps the concept lives in, and what comes after."""
    body = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
    )
    head = nn.Sequential(
        *(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    return nn.Sequential(body, head)


def train(model: nn.Sequential, data: tuple[Tensor, Tensor], prior: Prior | None, epochs: int):
    """Adam on what may be trained."""
    x, y = data
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if prior is not None:
                loss = loss + prior(x[rows], target=y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def run_concepts(seed: int, source: str, epochs: int, quick: bool) -> Runs:
    """One network, and every setting of the prior from there on."""
    x, y = mnist(source)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    part = len(x) * 4 // 5
    wears = (y[:part] == DIGIT) & (torch.rand(part, generator=generator) < SHARE)
    seen = torch.where(wears.reshape(-1, 1, 1, 1), with_tag(x[:part]), x[:part])
    clean, labels = x[part:], y[part:]
    tagged = with_tag(clean)
    torch.manual_seed(seed)
    start = network()
    train(start, (seen, y[:part]), None, epochs)
    start[0].requires_grad_(False)
    examples = x[:part][~wears][:200]
    both = torch.cat([with_tag(examples), examples])
    activations = LayerActivation(start, start[0]).attribute(both)
    present = torch.arange(len(both)) < len(examples)
    found = {}
    for name, options in CONCEPTS.items():
        if quick and name not in ("no prior", "difference, random"):
            continue
        model, options = copy.deepcopy(start), dict(options)
        prior = None
        if options:
            direction = fit(activations.flatten(1), present, options.pop("method"))
            prior = CONCEPT_WEIGHT * ConceptPrior(model, model[0], direction, **options)
        torch.manual_seed(seed)
        train(model, (seen, y[:part]), prior, epochs)
        with torch.no_grad():
            taken = model(tagged[labels != DIGIT]).argmax(1) == DIGIT
        found[name] = {
            "clean": accuracy(model, clean, labels),
            "all tagged": accuracy(model, tagged, labels),
            "taken for an 8": float(taken.float().mean()),
        }
    return found


# ---- Agreement -----------------------------------------------------------------------------


def agreements(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Mean rank correlation of pairs of explainers."""
    gradient = Saliency(model).attribute(x, abs=False)
    integrated = IntegratedGradients(model).attribute(x, n_steps=32)
    average = IntegratedGradients(model, multiply_by_inputs=False).attribute(x, n_steps=32)
    times_input = InputXGradient(model).attribute(x)
    ablation = FeatureAblation(model).attribute(x)
    pairs = {
        "gradient, average gradient": (gradient, average),
        "input x gradient, IG": (times_input, integrated),
        "input x gradient, ablation": (times_input, ablation),
    }
    return {name: float(spearman(*pair).mean()) for name, pair in pairs.items()}


def linear_share(model: nn.Module, x: Tensor) -> float:
    """Share of the logits' variance that the best linear function of the inputs explains."""
    with torch.no_grad():
        logits = model(x).double()
    columns = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    residual = logits - columns @ torch.linalg.lstsq(columns, logits.unsqueeze(1)).solution[:, 0]
    return float(1 - residual.var() / logits.var())


class OneLogit(nn.Module):
    """A network with one output for each row."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return shape ``(rows,)``."""
        return self.layers(x).squeeze(1)


def run_agreement(seed: int, source: str, epochs: int, quick: bool) -> Runs:
    """Every weight on one split."""
    x, y = load(folder_of(source, "nhanes"))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    part = min(4000, len(x) // 2)
    mean = x[:part].nanmean(0)
    x = torch.where(x.isnan(), mean, x) - mean
    x = x / x[:part].std(0).clamp_min(1e-6)
    found = {}
    for name, (weight, multiplied) in AGREEMENTS.items():
        if quick and name not in ("no prior", "weight 2"):
            continue
        torch.manual_seed(seed)
        model = OneLogit(x.shape[1])
        prior = weight * AgreementPrior(
            Saliency(model),
            IntegratedGradients(model, multiply_by_inputs=multiplied),
            options_a={"abs": False},
            options_b={"n_steps": 8},
        )
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
        for _ in range(epochs):
            for rows in torch.randperm(part).split(128):
                loss = F.binary_cross_entropy_with_logits(model(x[rows]), y[rows])
                if weight:
                    loss = loss + prior(x[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        test = x[part:]
        with torch.no_grad():
            score = roc_auc(model(test), y[part:])
        found[name] = {
            "ROC-AUC": score,
            **agreements(model, test[:300]),
            "linear share": linear_share(model, test),
        }
    return found


# ---- Both ----------------------------------------------------------------------------------


def draw(concepts: dict[str, Any], agreement: dict[str, Any]) -> Figure:
    """Accuracies of the first, agreement beside accuracy of the second."""
    figure = Figure(figsize=(12, 4))
    left, right = figure.subplots(1, 2)
    for offset, part in ((-0.2, "clean"), (0.2, "all tagged")):
        places = [i + offset for i in range(len(concepts))]
        means, stdev = ([r[part][k] for r in concepts.values()] for k in ("mean", "stdev"))
        left.bar(places, means, 0.4, yerr=stdev, label=part)
    left.set_xticks(range(len(concepts)), list(concepts), rotation=20)
    left.set_ylabel("test accuracy")
    left.legend(loc="lower right")
    for part in next(iter(agreement.values())):
        means = [r[part]["mean"] for r in agreement.values()]
        right.plot(list(agreement), means, "o-", label=part)
    right.tick_params("x", rotation=20)
    right.legend()
    return figure


def main() -> None:
    """Run both on all seeds."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", action="append", required=True, help="mnist=DIR, nhanes=DIR")
    arguments.add_argument("--seeds", type=int, default=None, help="seeds, or random splits")
    arguments.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    arguments.add_argument("--epochs", type=int, default=None)
    options = arguments.parse_args()
    sources = {source.partition("=")[0]: source for source in options.data}
    seeds = seeds_of(options, full=3, quick=1)
    results = {}
    for title, job, data, full in (
        ("concepts", run_concepts, "mnist", 5),
        ("agreement", run_agreement, "nhanes", 20),
    ):
        epochs = options.epochs or (2 if options.quick else full)
        run = functools.partial(job, source=sources[data], epochs=epochs, quick=options.quick)
        found = in_processes(run, seeds, options.jobs)
        runs = {name: [each[name] for each in found] for name in found[0]}
        show_runs(title, runs)
        results[title] = {name: summary(each) for name, each in runs.items()}
    settings = {k: v for k, v in vars(options).items() if k != "data"}
    settings |= {"concept weight": CONCEPT_WEIGHT, "seeds": len(seeds)}
    save(options.output, "concepts_and_agreement", settings, results)
    save_plot(options.output, "concepts_and_agreement", draw(**results))


if __name__ == "__main__":
    main()
