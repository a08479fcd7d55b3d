"""Words that people marked: does it help to train on them, and do other explainers see it?

Film reviews, each with a version that a person edited so that its sentiment turned (Kaushik, Hovy,
Lipton 2020, Apache-2.0). What was edited of the original is its rationale; the edited versions, the
counterfactuals, are what the training data are not. A network of words, one convolution and a mean
is trained on the 1,707 originals alone: with the five rationale losses (of gradient x input of the
embedding), with comprehensiveness or sufficiency (of predictions), without a prior, and, as an
upper mark, on the counterfactuals, too.

Each prior has three weights, of which the one with the highest accuracy on validation originals is
taken, over all seeds. Agreement with the rationales is measured on test originals: the area under
the ROC curve of the words' sizes, and their share of the evidence, for the explainer that was
trained on, for integrated gradients and for leaving words out one by one (the first 40 reviews).

    python benchmarks/rationales.py --data imdb_counterfactual=DIR
"""

import csv
import difflib
import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _common import save, save_plot
from _reproduction import (
    accuracy,
    arguments_of,
    folder_of,
    in_processes,
    roc_auc,
    seeds_of,
    show_runs,
    summary,
)
from captum.attr import FeatureAblation, LayerGradientXActivation, LayerIntegratedGradients
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors import AttributionPrior
from captum_priors.penalties import rationale
from captum_priors.priors import Comprehensiveness, Sufficiency

LENGTH, BATCH, EPOCHS, RATE = 150, 64, 5, 1e-2
LEFT_OUT = 40
WEIGHTS = (0.01, 0.1, 1.0)
KINDS = ("bce", "kl", "l1", "huber", "order")
PRIORS = (*KINDS, "comprehensiveness", "sufficiency")
PLAIN, AUGMENTED = "no prior", "counterfactuals, too"
Setting = tuple[str, float]


class Part(NamedTuple):
    """Originals as word ids, padded with 0, their rationales and labels, and counterfactuals."""

    ids: Tensor
    marked: Tensor
    labels: Tensor
    turned: Tensor

    def rows(self, chosen: Tensor) -> "Part":
        """Select examples."""
        return Part(*(t[chosen] for t in self))


# ---- Data ----------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Lower-case words, the first of them."""
    return re.findall(r"[a-z0-9']+|[!?]", text.lower().replace("<br />", " "))[:LENGTH]


def edited(before: list[str], after: list[str]) -> list[bool]:
    """Tell which words were replaced or taken out."""
    found = [False] * len(before)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, _, _ in matcher.get_opcodes():
        if kind in ("replace", "delete"):
            found[start:end] = [True] * (end - start)
    return found


def load(folder: Path) -> tuple[dict[str, Part], int]:
    """Read the three parts, the first of each pair being the original; and count the words."""
    pairs: dict[str, list[tuple[list[str], list[str], int]]] = {}
    for part in ("train", "dev", "test"):
        with (folder / f"{part}_paired.tsv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
        pairs[part] = [
            (words_of(a["Text"]), words_of(b["Text"]), int(a["Sentiment"] == "Positive"))
            for a, b in zip(lines[::2], lines[1::2], strict=True)
        ]
    counts = Counter(word for before, _, _ in pairs["train"] for word in before)
    known = {word: i for i, word in enumerate((w for w, n in counts.items() if n > 2), 2)}

    def padded(rows: list[list[Any]]) -> Tensor:
        return torch.stack([F.pad(torch.tensor(row), (0, LENGTH - len(row))) for row in rows])

    def ids(texts: list[list[str]]) -> Tensor:
        return padded([[known.get(word, 1) for word in words] for words in texts])

    parts = {}
    for part, rows in pairs.items():
        before, after, labels = (list(each) for each in zip(*rows, strict=True))
        marks = [edited(a, b) for a, b in zip(before, after, strict=True)]
        parts[part] = Part(ids(before), padded(marks), torch.tensor(labels), ids(after))
    return parts, len(known) + 2


# ---- Training ------------------------------------------------------------------------------


class Reader(nn.Module):
    """Words, a convolution over three of them, and the mean over a review."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_words, 16, padding_idx=0)
        self.dropout, self.conv = nn.Dropout(0.3), nn.Conv1d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits; words of id 0 are not there."""
        there = (ids != 0).unsqueeze(1)
        words = self.dropout(self.embedding(ids)).transpose(1, 2)
        found = self.conv(words * there).relu() * there
        out: Tensor = self.head(found.sum(2) / there.sum(2).clamp_min(1))
        return out


def prior_of(name: str, model: Reader) -> Any:
    """Make the prior of a name."""
    if name in KINDS:
        penalty = functools.partial(rationale, kind=name)
        return AttributionPrior(LayerGradientXActivation(model, model.embedding), penalty)
    return {"comprehensiveness": Comprehensiveness, "sufficiency": Sufficiency}[name](model)


def trained(setting: Setting, seed: int, data: Part, n_words: int, epochs: int) -> Reader:
    """Adam on originals, with the same start and order for every setting."""
    name, weight = setting
    torch.manual_seed(seed)
    model = Reader(n_words)
    prior = weight * prior_of(name, model) if name in PRIORS else None
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for epoch in range(epochs):
        torch.manual_seed(1000 * seed + epoch)
        for rows in torch.randperm(len(data.labels)).split(BATCH):
            batch = data.rows(rows)
            used = int((batch.ids != 0).sum(1).max())
            ids, marked = batch.ids[:, :used], batch.marked[:, :used]
            loss = F.cross_entropy(model(ids), batch.labels)
            if name == AUGMENTED:
                loss = loss / 2 + F.cross_entropy(model(batch.turned), 1 - batch.labels) / 2
            if prior is not None:
                said = {"annotation": marked.unsqueeze(-1) if name in KINDS else marked}
                given = {"target": batch.labels, "annotated": marked.any(1)}
                loss = loss + prior(ids, **given, **said)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model.eval()


# ---- Figures -------------------------------------------------------------------------------


def maps_of(model: Reader, part: Part) -> dict[str, Tensor]:
    """Sizes of the words, by three explainers."""
    layer, call = model.embedding, {"target": part.labels}
    integrated = LayerIntegratedGradients(model, layer)
    few = part.rows(torch.arange(min(LEFT_OUT, len(part.labels))))
    ablation = FeatureAblation(model).attribute(few.ids, baselines=0, target=few.labels)
    maps = {
        "trained on": LayerGradientXActivation(model, layer).attribute(part.ids, **call).sum(2),
        "IG": integrated.attribute(part.ids, baselines=0 * part.ids, n_steps=8, **call).sum(2),
        "left out": ablation,
    }
    return {name: found.detach().float().abs() for name, found in maps.items()}


def agreement(sizes: Tensor, part: Part) -> dict[str, float]:
    """Mean area under the ROC curve, and mean share of the evidence, of the marked words."""
    areas, shares = [], []
    for size, ids, marked in zip(sizes, part.ids, part.marked, strict=False):
        there = ids != 0
        size, mark = size[there], marked[there]
        if mark.any() and not mark.all() and size.any():
            areas.append(roc_auc(size, mark))
            shares.append(float((size * mark).sum() / size.sum()))
    return {"AUC": sum(areas) / len(areas), "share": sum(shares) / len(shares)}


def try_seed(
    seed: int, source: str, epochs: int, weights: tuple[float, ...]
) -> dict[Setting, tuple[dict[str, float], dict[str, Tensor]]]:
    """Train every setting; return accuracies, and parameters to explain later."""
    data, n_words = load(folder_of(source, "imdb_counterfactual"))
    settings = [(PLAIN, 0.0), (AUGMENTED, 0.0), *((n, w) for n in PRIORS for w in weights)]
    found = {}
    for setting in settings:
        model = trained(setting, seed, data["train"], n_words, epochs)
        scores = {"validation": accuracy(model, data["dev"].ids, data["dev"].labels)}
        test = data["test"]
        scores |= {
            "originals": accuracy(model, test.ids, test.labels),
            "counterfactuals": accuracy(model, test.turned, 1 - test.labels),
        }
        found[setting] = (scores, model.state_dict())
    return found


def explain_seed(states: dict[str, dict[str, Tensor]], source: str) -> dict[str, dict[str, float]]:
    """Agreement of the chosen networks of one seed with the rationales."""
    data, n_words = load(folder_of(source, "imdb_counterfactual"))
    model, found = Reader(n_words).eval(), {}
    for name, state in states.items():
        model.load_state_dict(state)
        found[name] = {
            f"{figure}, {explainer}": value
            for explainer, sizes in maps_of(model, data["test"]).items()
            for figure, value in agreement(sizes, data["test"]).items()
        }
    return found


def draw(results: dict[str, Any]) -> Figure:
    """Accuracies, and agreement."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    kinds = ("originals", "counterfactuals"), ("AUC, trained on", "AUC, IG", "AUC, left out")
    for axes, keys in zip(figure.subplots(1, 2), kinds, strict=True):
        for i, key in enumerate(keys):
            places = [row + 0.25 * (i - 0.5) for row in range(len(results))]
            means, stdev = ([r[key][k] for r in results.values()] for k in ("mean", "stdev"))
            axes.barh(places, means, 0.25, xerr=stdev, label=key)
        axes.set_yticks(range(len(results)), list(results))
        axes.set_xlim(0.4, 1)
        axes.invert_yaxis()
        axes.legend(loc="lower right")
    return figure


def main() -> None:
    """Train all, choose the weights, explain what was chosen."""
    options = arguments_of(__doc__, data="imdb_counterfactual=DIR").parse_args()
    seeds = seeds_of(options, full=3, quick=1)
    epochs, weights = (1, WEIGHTS[-1:]) if options.quick else (EPOCHS, WEIGHTS)
    run = functools.partial(try_seed, source=options.data, epochs=epochs, weights=weights)
    tried = in_processes(run, seeds, options.jobs)
    mean = {s: sum(each[s][0]["validation"] for each in tried) / len(seeds) for s in tried[0]}
    best: dict[str, float] = {}
    for name, weight in mean:  # the larger of equals
        if name not in best or mean[name, weight] >= mean[name, best[name]]:
            best[name] = weight
    chosen = [{name: each[name, weight][1] for name, weight in best.items()} for each in tried]
    explain = functools.partial(explain_seed, source=options.data)
    explained = in_processes(explain, chosen, options.jobs)
    runs = {
        name: [
            each[name, weight][0] | agreed[name]
            for each, agreed in zip(tried, explained, strict=True)
        ]
        for name, weight in best.items()
    }
    show_runs("test reviews", runs)
    gains = {
        name: summary(
            [{k: v - p[k] for k, v in r.items()} for r, p in zip(rows, runs[PLAIN], strict=True)]
        )
        for name, rows in runs.items()
    }
    results = {
        "found": {name: summary(rows) for name, rows in runs.items()},
        "gain over no prior, paired": gains,
        "weights": best,
        "runs": runs,
        "tried": {f"{n}, weight {w:g}": [e[n, w][0] for e in tried] for n, w in mean},
    }
    settings = {**vars(options), "seeds": [*seeds], "epochs": epochs, "weights": weights}
    save(options.output, "rationales", settings, results)
    save_plot(options.output, "rationales", draw(results["found"]))


if __name__ == "__main__":
    main()
