"""Film reviews whose first word gives the label away in training, and lies afterwards."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_priors._demo.base import EVIDENCE, GREEN, NAMES, RED, Demo, Figures, accuracy, fit
from captum_priors.attr import LayerExpectedGradients
from captum_priors.penalties import outside
from captum_priors.priors import AttributionPrior

WEIGHT, RATE, LENGTH = 1.0, 4e-3, 12
PLACES = ["[print]", "[web]"]
OPINIONS = (
    ["dull", "tedious", "clumsy", "stale", "noisy", "dreadful"],
    ["brilliant", "charming", "moving", "fresh", "funny", "superb"],
)
PLAIN = ["the", "a", "film", "plot", "cast", "scene", "music", "story", "script", "camera", "was"]
WORDS = [*PLACES, *PLAIN, *OPINIONS[0], *OPINIONS[1]]


@cache
def reviews(n: int, tells: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids ``(n, LENGTH)`` and labels: of three opinions, two are of the label's kind."""
    draws = torch.Generator().manual_seed(seed)

    def pick(words: list[str], k: int) -> list[str]:
        return [words[i] for i in torch.randint(len(words), (k,), generator=draws)]

    labels = torch.randint(2, (n,), generator=draws)
    rows = []
    for label in labels.tolist():
        words = pick(OPINIONS[label], 2) + pick(OPINIONS[1 - label], 1) + pick(PLAIN, LENGTH - 4)
        words = [words[i] for i in torch.randperm(LENGTH - 1, generator=draws)]
        place = PLACES[label if tells else 1 - label]
        rows.append([WORDS.index(word) for word in (place, *words)])
    return torch.tensor(rows), labels


class Classifier(nn.Module):
    """A small transformer: token ids in, the logits of bad and good out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 32)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, 32))
        layer = nn.TransformerEncoderLayer(
            32, nhead=4, dim_feedforward=64, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.encoder(self.embedding(ids) + self.position).mean(1))
        return logits


def on_places(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    """Squared attribution of words that may not matter."""
    return outside(attributions.sum(-1), annotation=annotation)


def run(seed: int, with_prior: bool, epochs: int) -> tuple[Figures, Any]:
    """Train one network; measure it where the place tells the label, and where it lies."""
    train = reviews(1500, True, 0)
    tells, lies = reviews(500, True, 1), reviews(500, False, 2)
    model = Classifier()
    explainer = LayerExpectedGradients(model, model.embedding)
    prior = WEIGHT * AttributionPrior(explainer, on_places, n_samples=1)

    def penalty(ids: Tensor, y: Tensor) -> Tensor:
        allowed = (ids >= len(PLACES)).float()
        value: Tensor = prior(ids, baselines=ids, target=y, annotation=allowed)
        return value

    fit(model, train, epochs, RATE, penalty if with_prior else None)
    with torch.no_grad():
        says = model(lies[0][:50]).argmax(1)
        maps = explainer.attribute(lies[0][:50], train[0][:100], n_samples=100, target=says).sum(-1)
    share = maps[:, 0].abs() / maps.abs().sum(1)
    figures = {
        "tag tells": accuracy(model, *tells),
        "tag lies": accuracy(model, *lies),
        "attribution on the tag": share.mean().item(),
    }
    return figures, (lies, says, maps)


def draw(shown: dict[str, Any], means: dict[str, Figures]) -> Figure:
    """Draw reviews with each word coloured by what it adds to the answer."""
    figure, axes = plt.subplots(2, 1, figsize=(11, 5), layout="constrained")
    figure.suptitle("blue: what speaks for the answer; orange: what speaks against it", fontsize=13)
    for axis, name, colour in zip(axes, NAMES, (RED, GREEN), strict=True):
        (ids, labels), says, maps = shown[name]
        maps = maps[:4] / maps[:4].abs().amax(1, keepdim=True)
        axis.imshow(maps.numpy(), cmap=EVIDENCE, vmin=-1.2, vmax=1.2, aspect="auto")
        for row in range(4):
            for column, token in enumerate(ids[row].tolist()):
                ink = "white" if maps[row, column].abs() > 0.6 else "black"
                axis.text(column, row, WORDS[token], color=ink, ha="center", va="center")
            good = bool(says[row] == labels[row])
            text = f"says {('bad', 'good')[says[row]]} {'✓' if good else '✗'}"
            axis.text(
                *(LENGTH - 0.4, row, text),
                va="center",
                fontsize=13,
                weight="bold",
                color=GREEN if good else RED,
            )
        right = means[name]["tag lies"]
        axis.set_title(f"{name}: right where the tag lies {right:.0%}", fontsize=14, color=colour)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def demo(_: Path) -> Demo:
    """Return the demo."""
    return Demo(
        data="film reviews of twelve words, written by the demo; 1500 to train, 500 to test",
        prior=f"{WEIGHT:g} * AttributionPrior(LayerExpectedGradients(model, embedding), outside)",
        epochs=4,
        run=run,
        draw=draw,
    )
