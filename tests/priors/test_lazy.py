"""Lazy: every k-th step, weighted by k."""

from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, Lazy
from captum_priors.penalties import l1, l2
from captum_priors.priors import Prior
from tests.cases import mlp

# Contexts in which a value is only looked at.
LOOKING = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def _make(every: int) -> tuple[Lazy, Any, float]:
    case = mlp()
    prior = AttributionPrior(Saliency(case.model), l2)
    return Lazy(prior, every=every), case, prior(case.inputs, target=0).item()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_kth_step_is_weighted_by_k(every: int) -> None:
    lazy, case, full = _make(every)
    weight = case.model[0].weight
    (found,) = torch.autograd.grad(lazy(case.inputs, target=0), weight)
    (single,) = torch.autograd.grad(lazy.prior(case.inputs, target=0), weight)
    # One more rounding for the factor.
    torch.testing.assert_close(found, every * single, rtol=1e-14, atol=0)
    values = [lazy(case.inputs, target=0).item() for _ in range(5)]
    assert values == [every * full if step % every == 0 else 0.0 for step in range(1, 6)]


def test_skipped_step_costs_no_attribution_and_no_draw() -> None:
    case, calls = mlp(), []

    def count(attributions: Tensor) -> Tensor:
        calls.append(1)
        return attributions.sum()

    prior = AttributionPrior(ExpectedGradients(case.model), count, baselines=case.baselines)
    lazy = Lazy(prior, every=4)
    for _ in range(9):
        lazy(case.inputs, target=0)
    assert len(calls) == int(prior.stream) == 3


def test_skipped_step_is_like_the_inputs() -> None:
    lazy = Lazy(AttributionPrior(Saliency(nn.Linear(3, 1).float()), l1), every=2)
    values = [lazy(torch.ones(2, 3, dtype=torch.float32)) for _ in range(2)]
    assert [(v.dtype, v.shape) for v in values] == [(torch.float32, ())] * 2


class One(Prior):
    """Of anything, such as prompts and token ids."""

    def forward(self, *data: Any, **named: Any) -> Tensor:
        return torch.ones(())


@pytest.mark.parametrize("inputs", ["a prompt", torch.ones(2, 3, dtype=torch.long)])
def test_skipped_step_of_what_is_no_number_is_a_float(inputs: Any) -> None:
    lazy = Lazy(One(), every=2)
    values = [lazy(inputs) for _ in range(4)]
    assert [v.item() for v in values] == [2, 0, 2, 0]
    assert {v.dtype for v in values} == {torch.get_default_dtype()}


@pytest.mark.parametrize("how", LOOKING)
def test_looking_at_the_value_is_unweighted_and_not_counted(how: str) -> None:
    lazy, case, full = _make(3)
    lazy(case.inputs, target=0)
    lazy.train(how != "eval")
    with LOOKING[how]():
        values = [lazy(case.inputs, target=0).item() for _ in range(2)]
    # The same operations with and without a graph.
    assert values == pytest.approx([full, full], rel=1e-14)
    resumed = Lazy(lazy.prior, every=3)  # whose counter travels in the state
    resumed.load_state_dict(lazy.state_dict())
    for each in (lazy.train(), resumed):
        assert [each(case.inputs, target=0).item() for _ in range(3)] == [0, 0, 3 * full]


def test_counters_are_no_buffers_and_are_asked_for() -> None:
    """DistributedDataParallel broadcasts buffers, which NCCL refuses on the CPU."""
    lazy, _, _ = _make(3)
    assert list(lazy.buffers()) == []
    assert set(lazy.state_dict()) == {"prior.stream._extra_state", "counter._extra_state"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) .*counter\._extra_state"):
        lazy.load_state_dict({})


def test_wrong_inputs_are_refused_on_every_step_and_not_counted() -> None:
    lazy, case, full = _make(2)
    with pytest.raises(TypeError, match=r"found 'baselines'\. Leave it out"):
        lazy(case.inputs, case.inputs, target=0)
    assert lazy(case.inputs, target=0).item() == 2 * full
    with pytest.raises(ValueError, match=r"`inputs`: expected a non-empty batch .*, found shape"):
        lazy(case.inputs[:0], target=0)
    assert [lazy(case.inputs, target=0).item() for _ in range(2)] == [0, 2 * full]
