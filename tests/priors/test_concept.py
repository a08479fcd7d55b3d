"""The concept prior against gradients by the activation in a loop over examples."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_priors.priors import ConceptPrior
from tests.asserts import assert_is, assert_same_numbers
from tests.cases import DIFFERENTIATIONS, EXACT, TwoInputs

# The same float64 operations in another order.
ROUNDING = 1e-11


def network() -> tuple[nn.Module, nn.Module, nn.Sequential]:
    """Body, head and the two: maps of four channels in between."""
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh())
    head = nn.Sequential(nn.Conv2d(4, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(18, 3))
    return body, head, nn.Sequential(body, head)


def explained(outputs: Tensor, target: Any, label: int) -> Tensor:
    return {None: outputs[label], "max": outputs.max(), "all": outputs.sum()}[target]


def expected(body: Any, head: Any, x: Tensor, y: Tensor, concept: Tensor, **options: Any) -> Tensor:
    """Example by example, from the formula."""
    scores = []
    for image, label in zip(x, y.tolist(), strict=True):
        a = body(image.unsqueeze(0))
        a = a if a.requires_grad else a.requires_grad_()
        output = explained(head(a)[0], options.get("target"), label)
        (g,) = torch.autograd.grad(output, a, create_graph=True)
        g = (g[0].mean((1, 2)) if concept.dim() == 1 and len(concept) == 4 else g[0]).flatten()
        dot = sum(p * q for p, q in zip(g, concept.flatten(), strict=True))
        if options.get("form") == "cosine":
            dot = dot / (g.norm() * concept.norm())
        scores.append(dot.square() if options.get("form") == "square" else dot.abs())
    return torch.stack(scores).mean()


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("concept", ["channels", "map", "flat"])
@pytest.mark.parametrize("form", ["abs", "square", "cosine"])
@pytest.mark.parametrize(
    ("target", "frozen"), [(None, False), (None, True), ("max", False), ("all", False)]
)
def test_equals_its_formula(target: Any, frozen: bool, form: Any, concept: str, way: Any) -> None:
    """Also where a frozen body leaves the head alone to be trained."""
    body, head, model = network()
    body.requires_grad_(not frozen)
    x, y = torch.randn(5, 1, 6, 6), torch.tensor([0, 1, 2, 1, 0])
    shape = {"channels": (4,), "map": (4, 4, 4), "flat": (64,)}[concept]
    direction, options = 3 * torch.randn(shape), {"target": target, "form": form}
    prior = ConceptPrior(model, body, direction, differentiation=way, **options)
    value, wanted = prior(x, target=y), expected(body, head, x, y, direction, **options)
    # Finite differences: truncation of a .2 % step, as in the laws.
    tolerance = ROUNDING if way in EXACT else 5e-3
    assert_is(value, wanted, head if frozen else model, ROUNDING, tolerance)


def test_random_signs_are_drawn_for_each_example_and_step() -> None:
    body, head, model = network()
    x, concept = torch.randn(3, 1, 6, 6), torch.randn(4)
    prior = ConceptPrior(model, body, concept, target="random", form="abs", reduction="sum")
    possible = []
    for image in x:
        a = body(image.unsqueeze(0))
        slopes = [
            torch.autograd.grad(output, a, retain_graph=True)[0].mean((2, 3))[0] @ concept
            for output in head(a)[0]
        ]
        signed = itertools.product([1, -1], repeat=2)  # up to one sign for all
        each = [(slopes[0] + s * slopes[1] + t * slopes[2]).abs() for s, t in signed]
        possible.append(torch.stack(each).detach())
    sums = torch.stack([torch.stack(each).sum() for each in itertools.product(*possible)])
    seen = torch.stack([prior(x).detach() for _ in range(300)])
    nearest = (seen.unsqueeze(1) - sums).abs().min(1)
    assert float(nearest.values.max()) < ROUNDING * float(sums.max())
    # 64 equally likely sums in 300 steps: fewer than 50 of them come with probability 1e-9.
    assert len(nearest.indices.unique()) > 50


def test_a_direction_that_the_head_ignores_costs_nothing() -> None:
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    with torch.no_grad():
        head.weight[:, 2] = 0
    model = nn.Sequential(body, nn.Tanh(), head)
    for form in ("abs", "square", "cosine"):
        prior = ConceptPrior(model, model[1], torch.eye(4)[2], form=form)
        assert prior(torch.randn(5, 3), target=1).item() == 0


class Tokens(nn.Module):
    """Embedded tokens, mixed, and averaged; or documents of sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embedding(ids.flatten(0, -2))))
        return self.head(hidden.mean(1)).reshape(len(ids), -1, 2).mean(1)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_tokens_have_their_channels_last(shape: tuple[int, ...]) -> None:
    """Where the layer sees sentences, of which each example has three, these are places."""
    model, ids, concept = Tokens(), torch.randint(9, shape), torch.randn(4)
    prior = ConceptPrior(model, model.embedding, concept, channel_dim=-1)
    e = model.embedding(ids.flatten(0, -2)).detach().requires_grad_()
    outputs = model.head(torch.tanh(model.mix(e)).mean(1)).reshape(len(ids), -1, 2).mean(1)
    (g,) = torch.autograd.grad(outputs[:, 1].sum(), e)
    wanted = (g.reshape(len(ids), -1, 4).mean(1) @ concept).abs().mean()
    assert_same_numbers(prior(ids, target=1).detach(), wanted, ROUNDING)


def test_several_inputs_and_arguments() -> None:
    model, x = TwoInputs(), (torch.randn(4, 2, 2), torch.randn(4, 3))
    scale, concept = torch.rand(4) + 0.5, torch.randn(5)
    prior = ConceptPrior(model, model.left, concept)
    value = prior(x, target=1, additional_forward_args=(scale, 1.0))
    slope = 1 - torch.tanh(model.left(x[0].flatten(1))).square()
    slope = slope * torch.sigmoid(model.right(x[1])) * scale.unsqueeze(1) * model.head.weight[1]
    assert_same_numbers(value, (slope @ concept).abs().mean(), ROUNDING)


def test_the_concept_moves_and_is_kept_with_the_prior() -> None:
    body, _, model = network()
    prior, other = (ConceptPrior(model, body, torch.randn(4)) for _ in range(2))
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.concept, prior.concept)
    assert prior.float().concept.dtype == torch.float32
    assert [*prior.parameters()] == []  # those of the model are not its own
