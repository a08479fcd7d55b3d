"""Comprehensiveness and sufficiency: values against an oracle, gradients by model and mask."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_priors import shared
from captum_priors.priors import Comprehensiveness, Sufficiency
from tests import oracles
from tests.asserts import assert_slope
from tests.cases import curved, tuple_inputs

every_prior = pytest.mark.parametrize("prior", [Comprehensiveness, Sufficiency])
every_form = pytest.mark.parametrize("form", ["probability", "log"])
MASK = torch.tensor([[1, 0, 0.25, 0], [0, 0, 1, 1]])


def batch(n: int = 6) -> tuple[Tensor, dict[str, Any]]:
    given = {"target": torch.arange(n) % 3, "annotation": MASK.double().repeat(n // 2, 1)}
    return torch.randn(n, 4), {**given, "baselines": torch.randn(n, 4)}


@every_prior
@every_form
@pytest.mark.parametrize("margin", [None, 0.0, 0.1])
def test_value(prior: Any, form: Any, margin: Any) -> None:
    """One example at a time, by a network that is written out."""
    model = curved()
    net = oracles.TanhNet.of(model)
    x, call = batch()
    columns = (t.numpy() for t in (x, *(call[k] for k in ("target", "annotation", "baselines"))))
    each = []
    for example, label, m, b in zip(*columns, strict=True):
        kept = 1 - m if prior is Comprehensiveness else m
        points = example, kept * example + (1 - kept) * b
        whole, part = (net.probabilities(z)[label] for z in points)
        if form == "log":
            whole, part = np.log(whole), np.log(part)
        change = part - whole if prior is Comprehensiveness else whole - part
        each.append(change if margin is None else max(change + margin, 0))
    if margin == 0:
        assert 0 < sum(value > 0 for value in each) < 6
    found = prior(model, form=form, margin=margin)(x, **call)
    assert found.item() == pytest.approx(np.mean(each), rel=1e-11)  # float64, another order


@every_prior
@every_form
def test_certificate_by_the_parameters_and_by_the_mask(prior: Any, form: Any) -> None:
    model = curved()
    x, call = batch()
    term = prior(model, form=form, margin=0.1)
    mask = call.pop("annotation").clone().clamp(0.2, 0.8).requires_grad_()

    def value() -> Tensor:
        return term(x, **call, annotation=mask)

    assert_slope(value, [*model.parameters(), mask])
    (found,) = torch.autograd.grad(value(), mask)
    assert bool((found != 0).any(1).any())


@every_prior
def test_baselines_are_captums(prior: Any) -> None:
    model = curved()
    x, call = batch()
    row = call.pop("baselines")[:1]
    term = prior(model)
    zero = term(x, **call)
    for same in (0, torch.zeros(4), torch.zeros(1, 4), torch.zeros(6, 4)):
        assert torch.equal(term(x, **call, baselines=same), zero)
    found = term(x, **call, baselines=row)
    torch.testing.assert_close(found, term(x, **call, baselines=row.expand(6, 4)))
    assert not torch.allclose(found, zero)


@every_prior
def test_token_ids_are_kept_or_replaced(prior: Any) -> None:
    """The ids that the model sees, padding included."""
    table, seen = nn.Embedding(9, 3), []

    def classify(ids: Tensor) -> Tensor:
        seen.append(ids.clone())
        return table(ids).sum(1).tanh()

    ids, words = torch.tensor([[5, 6, 7], [8, 1, 1]]), torch.tensor([[1, 0, 1], [0, 0, 1]])
    call = {"target": torch.tensor([2, 0]), "baselines": 4}
    value = prior(classify)(ids, **call, annotation=words.bool())
    erased = [[4, 6, 4], [8, 1, 4]] if prior is Comprehensiveness else [[5, 4, 7], [4, 4, 1]]
    assert seen[-1].tolist() == [*ids.tolist(), *erased]
    assert torch.equal(prior(classify)(ids, **call, annotation=words), value)
    value.backward()
    assert table.weight.grad[4].any()
    with pytest.raises(ValueError, match=r"`annotation`: expected zeros and ones, found .* = 0\.5"):
        prior(classify)(ids, **call, annotation=words / 2)


@every_prior
def test_none_leaves_an_input_as_it_is(prior: Any) -> None:
    case, mask = tuple_inputs(), torch.tensor([1.0, 0.0, 1.0]).expand(4, 3)
    given = {"target": torch.tensor([0, 1, 1, 0]), "additional_forward_args": (torch.ones(4), 1.0)}
    term, untouched = prior(case.model), torch.full((4, 2, 2), float(prior is Sufficiency))
    expected = term(case.inputs, **given, annotation=(untouched, mask))
    assert expected != 0
    for same in (mask, shared(mask[0])):
        found = term(case.inputs, **given, annotation=(None, same), baselines=(5, 0))
        torch.testing.assert_close(found, expected)
    assert term(case.inputs, **given, annotation=(None, None)) == 0
