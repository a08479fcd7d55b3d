"""Rows are examples: none depends on another, and where the model makes them, that is refused."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    NotDifferentiableError,
    differentiable,
)
from captum_priors.penalties import l2
from tests.asserts import gradients_of
from tests.laws.leaves import (
    LEAVES_AND_WAYS,
    Around,
    Leaf,
    background,
    every_leaf_and_way,
    net,
    those,
    way_options,
)


def total(leaf: Leaf, prior: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The value with its gradient by the parameters."""
    value = prior(x, **leaf.call(x))
    gradients = gradients_of(value, [*model.parameters()])
    return [value.detach(), torch.cat([g.flatten() for g in gradients])]


@every_leaf_and_way
def test_scores_add_up_over_examples(leaf: Leaf, way: str) -> None:
    """Nothing of one example, value or gradient, changes with another: mixed differences are 0."""
    model = leaf.model()
    prior = leaf.make(model, reduction="sum", **way_options(leaf, way)).eval()  # draws as before
    x, z = leaf.batch(), leaf.batch()
    even = (torch.arange(len(x)) % 2 == 0).reshape(-1, *[1] * (x.dim() - 1))
    a, b, c, d = (
        total(leaf, prior, model, batch)
        for batch in (x, z, torch.where(even, x, z), torch.where(even, z, x))
    )
    for each in zip(a, b, c, d, strict=True):
        mixed = each[0] + each[1] - each[2] - each[3]
        # Rounding of sums over rows and of differences, whose steps the batch's rounding decides.
        assert float(mixed.abs().max()) <= 1e-7 * float(torch.stack(each).abs().max())


@those(draws=False)
def test_scores_of_a_batch_are_those_of_its_examples(leaf: Leaf) -> None:
    prior, x = leaf.make(leaf.model()), leaf.batch()
    alone = [prior(x[i : i + 1], **leaf.call(x, slice(i, i + 1))) for i in range(len(x))]
    torch.testing.assert_close(prior(x, **leaf.call(x)), torch.stack(alone).mean())


@those(draws=True)
def test_expected_score_is_that_of_the_examples(leaf: Leaf) -> None:
    prior, x = leaf.make(leaf.model()), leaf.batch(2)
    together = torch.stack([prior(x, **leaf.call(x)).detach() for _ in range(30)])
    rows = (slice(0, 1), slice(1, 2))
    each = [[prior(x[row], **leaf.call(x, row)).item() for row in rows] for _ in range(30)]
    alone = torch.tensor(each).mean(1)
    error = ((together.var() + alone.var()) / 30).sqrt()
    assert float((together.mean() - alone.mean()).abs()) <= 4 * float(error)


class Coupled(Around):
    """Outputs of an example that depend on the others, also where all stand one after another."""

    def __init__(self, inner: nn.Module, couple: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inner)
        self.couple, self.block = couple, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)  # in blocks, the batch is by itself however often it is repeated
        return torch.cat([self.couple(part) for part in h.split(self.block or len(h))])


def centred(h: Tensor) -> Tensor:
    return (h - h.mean(0)) + 9 * (h - h.mean(0)).pow(3)  # no activation, which a leaf may look at


def neighbours(h: Tensor) -> Tensor:
    return h + 3 * h * h.roll(1, 0)


def joined_by_a_graph(h: Tensor) -> Tensor:
    """Edges between the four examples of every batch here; no other number of rows goes through."""
    return h + 3 * h * (torch.eye(4).roll(1, 0) @ h.flatten(1)).reshape(h.shape)


COUPLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": centred,
    "graph": neighbours,
    "fixed graph": joined_by_a_graph,
}
every_coupling = pytest.mark.parametrize("coupling", COUPLINGS)


def refused(leaf: Leaf, way: str, coupling: str) -> bool:
    """Whether it is refused; where not, it must be what every block of the batch gives."""
    model, x = Coupled(leaf.model(), COUPLINGS[coupling]).eval(), leaf.batch()
    prior = leaf.make(model, **way_options(leaf, way)).eval()
    twin = leaf.make(model).eval()
    twin.load_state_dict(prior.state_dict())  # the same draws
    try:
        found = total(leaf, prior, model, x)
    except NotDifferentiableError as error:
        return "influence each other" in str(error)
    model.block = len(x)
    tolerance = 5e-3 if way == "finite_difference" else 1e-9  # truncation with a step of .2 %
    for a, b in zip(found, total(leaf, twin, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-9)
    return False


@pytest.mark.parametrize(
    ("leaf", "way", "coupling"),
    [
        pytest.param(leaf, way, coupling, id=f"{leaf.name}-{way}-{coupling}")
        for leaf, way in LEAVES_AND_WAYS
        for coupling in COUPLINGS
    ],
)
def test_coupled_examples(leaf: Leaf, way: str, coupling: str) -> None:
    # Layers look whether half of the examples have half of the rows.
    halved = coupling == "fixed graph" and leaf.name.startswith(("LayerEG", "Concept"))
    may_be = leaf.stacks or way == "finite_difference" or halved
    assert not refused(leaf, way, coupling) or may_be


@every_coupling
@pytest.mark.parametrize("explainer", ["ExpectedGradients", "IG-5", "GradientShap", "NoiseTunnel"])
def test_coupled_examples_in_chunks(explainer: str, coupling: str) -> None:
    """Where fewer rows than the batch go through together, or copies of one stand side by side."""
    model = Coupled(net(), COUPLINGS[coupling]).eval()
    made, options = {
        "ExpectedGradients": (
            ExpectedGradients(model, differentiation="recompute"),
            {"baselines": background(), "n_samples": 1, "internal_batch_size": 2},
        ),
        "IG-5": (
            differentiable(ca.IntegratedGradients(model), differentiation="recompute"),
            {"n_steps": 5, "internal_batch_size": 8},
        ),
        "GradientShap": (ca.GradientShap(model), {"baselines": background(), "n_samples": 3}),
        "NoiseTunnel": (ca.NoiseTunnel(ca.Saliency(model)), {"nt_samples": 3}),
    }[explainer]
    prior = AttributionPrior(made, l2, **options)
    with pytest.raises(NotDifferentiableError, match="influence each other"):
        prior(torch.randn(4, 5), target=torch.tensor([0, 1, 2, 0])).backward()
