"""Lazy: every k-th step, weighted by k."""

from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import nn

from captum_priors import AttributionPrior, ExpectedGradients, Lazy
from captum_priors.penalties import l1, l2
from captum_priors.priors import Prior
from tests.cases import mlp


def _make(every: int) -> tuple[Lazy, Any, float]:
    case = mlp()
    prior = AttributionPrior(Saliency(case.model), l2)
    return Lazy(prior, every=every), case, prior(case.inputs, target=0).item()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_kth_step_is_weighted_by_k(every: int) -> None:
    lazy, case, full = _make(every)
    values = [lazy(case.inputs, target=0).item() for _ in range(6)]
    assert values == [every * full if step % every == 0 else 0.0 for step in range(6)]


def test_gradient_of_a_due_step_is_weighted_too() -> None:
    lazy, case, _ = _make(3)
    weight = case.model[0].weight
    (found,) = torch.autograd.grad(lazy(case.inputs, target=0), weight)
    (single,) = torch.autograd.grad(lazy.prior(case.inputs, target=0), weight)
    # One more rounding for the factor.
    torch.testing.assert_close(found, 3 * single, rtol=1e-14, atol=0)


def test_skipped_step_costs_no_attribution() -> None:
    case, calls = mlp(), []

    def count(attributions: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return attributions.sum()

    lazy = Lazy(AttributionPrior(Saliency(case.model), count), every=4)
    for _ in range(9):
        lazy(case.inputs, target=0)
    assert len(calls) == 3


def test_skipped_step_is_like_the_inputs() -> None:
    model = nn.Linear(3, 1).float()
    lazy = Lazy(AttributionPrior(Saliency(model), l1), every=2)
    for _ in range(2):
        value = lazy(torch.ones(2, 3, dtype=torch.float32))
        assert value.dtype == torch.float32
        assert value.shape == ()


def test_skipped_step_of_integer_inputs_is_a_float() -> None:
    class Zero(Prior):
        def forward(self, *data: Any, **named: Any) -> torch.Tensor:
            return torch.zeros(())

        def takes(self, name: str) -> bool:
            return False

        def formula(self) -> str:
            return "Zero()"

    lazy = Lazy(Zero(), every=2)
    ids = torch.ones(2, 3, dtype=torch.long)
    assert [lazy(ids).dtype for _ in range(2)] == [torch.get_default_dtype()] * 2


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference"])
def test_looking_at_the_value_is_unweighted_and_not_counted(how: str) -> None:
    lazy, case, full = _make(3)
    lazy(case.inputs, target=0)
    block = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    lazy.train(how != "eval")
    with block[how]():
        values = [lazy(case.inputs, target=0).item() for _ in range(2)]
    # The same operations with and without a graph.
    assert values == pytest.approx([full, full], rel=1e-14)
    lazy.train()
    assert [lazy(case.inputs, target=0).item() for _ in range(3)] == [0, 0, 3 * full]


def test_counter_travels_in_the_state_dict() -> None:
    lazy, case, full = _make(3)
    lazy(case.inputs, target=0)
    resumed = Lazy(lazy.prior, every=3)
    resumed.load_state_dict(lazy.state_dict())
    assert [resumed(case.inputs, target=0).item() for _ in range(3)] == [0, 0, 3 * full]


def test_counters_are_no_buffers_and_are_asked_for() -> None:
    """DistributedDataParallel broadcasts buffers, which NCCL refuses on the CPU."""
    lazy, _, _ = _make(3)
    assert list(lazy.buffers()) == []
    assert set(lazy.state_dict()) == {"prior.stream._extra_state", "counter._extra_state"}
    with pytest.raises(
        RuntimeError, match=r"Missing key\(s\) in state_dict: .*counter\._extra_state"
    ):
        lazy.load_state_dict({})


def test_random_stream_moves_with_the_due_steps_only() -> None:
    case = mlp()
    prior = AttributionPrior(ExpectedGradients(case.model), l1, baselines=case.baselines)
    lazy = Lazy(prior, every=3)
    for _ in range(6):
        lazy(case.inputs, target=0)
    assert int(prior.stream) == 2


def test_step_that_raises_is_not_counted() -> None:
    lazy, case, full = _make(2)
    with pytest.raises(TypeError, match=r"found 'baselines'\. Leave it out"):
        lazy(case.inputs, case.inputs, target=0)
    assert lazy(case.inputs, target=0).item() == 2 * full


def test_formula_and_keywords_are_those_of_the_prior() -> None:
    lazy = _make(3)[0]
    assert repr(0.5 * lazy) == "0.5 * Lazy(AttributionPrior(Saliency, l2), every=3)"
    assert not lazy.takes("baselines")
    assert Lazy(AttributionPrior(ExpectedGradients(nn.ReLU()), l1), 2).takes("baselines")


@pytest.mark.parametrize("every", [0, -1, 1.0, True, None])
def test_bad_period_is_refused(every: Any) -> None:
    prior = _make(1)[0].prior
    text = rf"`every`: expected an integer of at least 1, found {every}\. Pass every=1"
    with pytest.raises(ValueError, match=text):
        Lazy(prior, every=every)


def test_what_is_no_prior_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`prior`: expected a prior, found function\. Pass an"):
        Lazy(l1, every=2)


def test_inputs_of_a_skipped_step_are_checked() -> None:
    lazy, case, _ = _make(2)
    lazy(case.inputs, target=0)
    with pytest.raises(ValueError, match=r"`inputs`: expected a non-empty batch .*, found shape"):
        lazy(case.inputs[:0], target=0)
