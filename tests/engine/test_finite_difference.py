"""How far ``finite_difference`` is off on a transformer while it trains, and what it refuses."""

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    NotDifferentiableError,
    differentiable,
)
from captum_priors.integrations.huggingface import LogitsOf
from captum_priors.penalties import l1, l2, outside
from tests.asserts import draw_alike, gradients_of, relative_error

STEPS = (0, 10, 20, 40, 80)
WORDS, LENGTH = 60, 17


def batch(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The second token tells the label."""
    ids = torch.randint(10, WORDS, (64, LENGTH), generator=draw)
    labels = torch.randint(2, (64,), generator=draw)
    ids[:, 1] = 3 + labels
    return ids, labels


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def course() -> dict[int, Any]:
    """The classifier after some training steps, dropout and fused attention included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attn_implementation="sdpa",
    )
    model, draw, found = BertForSequenceClassification(config), seeded(0), {}
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            found[step] = copy.deepcopy(model)
        ids, labels = batch(draw)
        optimizer.zero_grad()
        F.cross_entropy(model(ids).logits, labels).backward()
        optimizer.step()
    torch.set_default_dtype(before)
    return found


def on_tag(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    return outside(attributions.sum(-1), annotation=annotation)


def gradient(model: Any, way: Any, context: Any = None, n_samples: int = 1) -> list[Tensor]:
    """Gradient of a prior against the telling word, evaluated under a context."""
    torch.set_default_dtype(torch.float32)
    ids, labels = batch(seeded(9))
    allowed = torch.ones(ids.shape)
    allowed[:, 1] = 0
    words = model.bert.embeddings.word_embeddings
    torch.manual_seed(1)  # where the prior's stream starts
    explainer = LayerExpectedGradients(LogitsOf(model), words, differentiation=way)
    prior = AttributionPrior(explainer, on_tag, n_samples=n_samples)
    with context or nullcontext():
        value = prior(ids, baselines=ids.roll(1, 0), target=labels, annotation=allowed)
    return gradients_of(value, list(model.parameters()))


def in_bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def error(model: Any, context: Any = None, prepared: Any = None, n_samples: int = 1) -> float:
    """Of the model, or as it was prepared, beside the exact gradient in float32."""
    with sdpa_kernel(SDPBackend.MATH):
        exact = gradient(model, "double_backprop", n_samples=n_samples)
    found = gradient(prepared or model, "finite_difference", context, n_samples)
    return relative_error(found, exact)


HOW = [
    ("float32", 1),
    ("float32", 3),  # examples between the classes, whose slopes are thousands of times others'
    ("autocast", 1),
    ("autocast that the model enters", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("how", "n_samples"), HOW)
def test_error(how: str, n_samples: int, step: int, course: dict[int, Any]) -> None:
    """The last is what Accelerate or Hugging Face's trainer make of every model."""
    model, prepared = course[step], copy.deepcopy(course[step])
    if how == "autocast that the model enters":
        prepared.forward = in_bfloat16()(prepared.forward)
    context = in_bfloat16() if how == "autocast" else None
    found = error(model, context, prepared, n_samples)
    assert found <= (1e-2 if how == "float32" else 3e-2)


def test_smooth_network_in_float32() -> None:
    """Accepted for every draw, and right."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 4)),
    ).float()
    x, y = torch.randn(32, 1, 16, 16).float(), torch.arange(32) % 4
    ways: Any = ("double_backprop", "finite_difference")
    exact, found = (
        AttributionPrior(ExpectedGradients(model, differentiation=way), l1, baselines=x.roll(1, 0))
        for way in ways
    )
    draw_alike(exact, found)
    parameters = [model[0].weight, model[3].weight, model[7].weight]
    for _ in range(40):
        pair = [torch.autograd.grad(prior(x, target=y), parameters) for prior in (found, exact)]
        assert relative_error(*pair) < 1e-3


# ---- Refusals ------------------------------------------------------------------------------


class Other(nn.Module):
    """A network beside a branch of another kind, which some of the examples take."""

    def __init__(self, branch: Any, share: float) -> None:
        super().__init__()
        self.main, self.side = (
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)
        )
        self.branch, self.share = branch, share

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1].detach()
        takes = first > first.quantile(1 - self.share)
        return self.main(x) + torch.where(takes, self.branch(self.side, x), 0)


def centred(side: nn.Module, x: Tensor) -> Tensor:
    return side(x - x.mean(0))


draws = torch.Generator().manual_seed(0)
BRANCHES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "detached": lambda side, x: 0.5 * side(x.detach()),
    "coupled": centred,
    "functional norm": lambda side, x: side(F.batch_norm(x, None, None, training=True)),
    "straight-through": lambda side, x: side(x + (x.round() - x).detach()),
    "detached factor": lambda side, x: side(x).square() * side(x).detach(),
    "private generator": lambda side, x: side(x + torch.randn(x.shape, generator=draws).to(x)),
}


@pytest.mark.parametrize("precision", ["float64", "float32", "autocast"])
@pytest.mark.parametrize("share", [1, 0.5, 0.25])
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES.keys())
def test_examples_that_another_gradient_moves(branch: Any, share: float, precision: str) -> None:
    """Whether all examples take it or few: what counts is each of them, and not their sum."""
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    model: Any = Other(branch, share)
    if precision != "float64":
        model, x = model.float(), x.float()
    explainer = differentiable(Saliency(model), differentiation="finite_difference")
    prior = AttributionPrior(explainer, l2, abs=False)
    with in_bfloat16() if precision == "autocast" else nullcontext():
        value = prior(x, target=y)
    with pytest.raises(NotDifferentiableError, match="agree with the input gradient"):
        value.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["single", "half"])
def test_half_precision_is_named_where_it_may_be_the_reason(dtype: torch.dtype) -> None:
    """Differences of parameters in bfloat16 fail for rounding alone, late in training."""
    x, model = torch.randn(16, 6, dtype=dtype), Other(centred, 1).main.to(dtype)
    moved = functools.partial(centred, model)
    explainer = differentiable(Saliency(moved), differentiation="finite_difference")
    value = AttributionPrior(explainer, l2, abs=False)(x, target=0)
    with pytest.raises(NotDifferentiableError) as found:
        value.backward()
    assert ("half precision" in str(found.value)) == (dtype == torch.bfloat16)
    assert "double_backprop" in str(found.value)
