"""Film reviews whose first word gives the label away in training, and lies afterwards."""

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors._demo.base import COLOURS, EVIDENCE, NAMES, Examples, Figures, accuracy, fit
from captum_priors.attr import LayerExpectedGradients
from captum_priors.penalties import outside
from captum_priors.priors import AttributionPrior

WEIGHT, RATE, LENGTH = 1.0, 4e-3, 12
DATA = "film reviews of twelve words, written by the demo; 1500 to train, 500 to test"
PRIOR = f"{WEIGHT:g} * AttributionPrior(LayerExpectedGradients(model, embedding), outside)"
EPOCHS, SEEDS = 4, 3
WORDS = [
    *("[print]", "[web]", "the", "a", "film", "plot", "cast", "scene", "music", "story", "script"),
    *("dull", "tedious", "clumsy", "stale", "noisy", "dreadful"),
    *("brilliant", "charming", "moving", "fresh", "funny", "superb"),
]
PLACES, BAD, KINDS = 2, 11, 6  # how many places, where opinions begin, how many of each label


def reviews(n: int, tells: bool, seed: int) -> Examples:
    """Token ids ``(n, LENGTH)`` and labels: of three opinions, two are of the label's kind."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n, 1), generator=draws)
    kinds = torch.cat([labels, labels, 1 - labels], 1)
    opinions = BAD + KINDS * kinds + torch.randint(KINDS, (n, 3), generator=draws)
    plain = torch.randint(PLACES, BAD, (n, LENGTH - 4), generator=draws)
    order = torch.rand(n, LENGTH - 1, generator=draws).argsort(1)
    words = torch.cat([opinions, plain], 1).gather(1, order)
    return torch.cat([labels if tells else 1 - labels, words], 1), labels.flatten()


def load(_: Path) -> tuple[Examples, ...]:
    """Training data, and test data whose place tells the label, or lies."""
    return reviews(1500, True, 0), reviews(500, True, 1), reviews(500, False, 2)


def on_places(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    """Squared attribution of words that may not matter."""
    return outside(attributions.sum(-1), annotation=annotation)


def run(data: Any, seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Any]:
    """Train one network; measure it where the place tells the label, and where it lies."""
    train, tells, lies = data
    model = nn.Sequential(
        nn.Embedding(len(WORDS), 32),
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True),
        *(nn.Flatten(), nn.Linear(32 * LENGTH, 2)),
    )
    explainer = LayerExpectedGradients(model, model[0])
    prior = WEIGHT * AttributionPrior(explainer, on_places, n_samples=1)

    def penalty(ids: Tensor, y: Tensor) -> Any:
        allowed = (ids >= PLACES).float()
        return prior(ids, baselines=ids, target=y, annotation=allowed)

    fit(model, train, epochs, RATE, penalty if with_prior else None)
    ids, labels = (each[:50] for each in lies)
    with torch.no_grad():
        says = model(ids).argmax(1)
        maps = explainer.attribute(ids, train[0][:100], n_samples=100, target=says).sum(-1)
    share = maps[:, 0].abs() / maps.abs().sum(1)
    figures = {
        "tag tells": accuracy(model, *tells),
        "tag lies": accuracy(model, *lies),
        "attribution on the tag": share.mean().item(),
    }
    return figures, list(zip(ids.tolist(), maps, says, says == labels, strict=True))[:4]


def draw(_: Any, shown: list[Any], means: list[Figures]) -> Figure:
    """Draw reviews with each word coloured by what it adds to the answer."""
    figure, axes = plt.subplots(2, 1, figsize=(11, 5), layout="constrained")
    figure.suptitle("blue: what speaks for the answer; orange: what speaks against it", fontsize=13)
    for axis, name, colour, rows, mean in zip(axes, NAMES, COLOURS, shown, means, strict=True):
        maps = torch.stack([row / row.abs().max() for _, row, *_ in rows])
        axis.imshow(maps.numpy(), cmap=EVIDENCE, vmin=-1.2, vmax=1.2, aspect="auto")
        for i, (ids, _, says, good) in enumerate(rows):
            for column, token in enumerate(ids):
                ink = "white" if maps[i, column].abs() > 0.6 else "black"
                axis.text(column, i, WORDS[token], color=ink, ha="center", va="center")
            text = f"says {('bad', 'good')[says]} {'✗✓'[good]}"
            place = (LENGTH - 0.4, i)
            axis.text(*place, text, va="center", fontsize=13, weight="bold", color=COLOURS[good])
        title = f"{name}: right where the tag lies {mean['tag lies']:.0%}"
        axis.set_title(title, fontsize=14, color=colour)
        axis.set(xticks=[], yticks=[])
    return figure
