"""Subsample: some of the examples, with all that belongs to them."""

from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, Subsample
from captum_priors.penalties import l1, l2
from tests.asserts import assert_is, assert_same_numbers

# The same float64 operations on fewer rows.
ROUNDING = 1e-12
N = 8


class Recorder:
    """An explainer that keeps what it was called with; the attributions are the inputs."""

    def __init__(self, *, draws_baselines: bool = False) -> None:
        self.draws_baselines = draws_baselines
        self.calls: list[dict[str, Any]] = []

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Any:
        call = {"inputs": inputs, "baselines": baselines, "target": target}
        self.calls.append({**call, "additional_forward_args": additional_forward_args})
        return inputs


def _marked(attributions: Any, *, annotation: Any = None) -> Tensor:
    """A penalty that returns its annotation."""
    first = attributions[0] if isinstance(attributions, tuple) else attributions
    return first.sum(1) if annotation is None else annotation.sum(1)


@pytest.fixture
def x() -> Tensor:
    """Row i holds i, so that a row says where it comes from."""
    return torch.arange(float(N)).unsqueeze(1).repeat(1, 3)


def _rows_of(inputs: Tensor) -> Tensor:
    return inputs[:, 0].long()


def _call(x: Any, fraction: float = 0.5, *, draws: bool = False, **call: Any) -> dict[str, Any]:
    recorder = Recorder(draws_baselines=draws)
    Subsample(AttributionPrior(recorder, _marked), fraction)(x, **call)
    return recorder.calls[-1]


@pytest.mark.parametrize(("fraction", "n"), [(0.01, 1), (0.25, 2), (0.9, 7), (1, 8)])
def test_takes_that_share_without_repetition(x: Tensor, fraction: float, n: int) -> None:
    assert len(set(_rows_of(_call(x, fraction)["inputs"]).tolist())) == n
    assert len(_call(x[:1], fraction)["inputs"]) == 1


def test_mean_over_all_draws_is_the_mean_of_the_batch(x: Tensor) -> None:
    recorder = Recorder()
    prior = Subsample(AttributionPrior(recorder, _marked), 0.25)
    found = torch.stack([prior(x.square()) for _ in range(400)])
    # Four standard errors of the mean of the draws.
    assert abs(found.mean() - x.square().sum(1).mean()) < 4 * found.std() / 400**0.5
    drawn = {tuple(_rows_of(call["inputs"]).tolist()) for call in recorder.calls}
    assert len(drawn) > 40  # of 56 pairs in order


def test_value_and_gradient_are_those_of_the_chosen_rows() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 3)
    seen = []

    def spy(attributions: Tensor) -> Tensor:
        seen.append(attributions)
        return l2(attributions)

    value = Subsample(AttributionPrior(Saliency(model), spy), 0.5)(x, target=1)
    every = AttributionPrior(Saliency(model), l2)
    whole = torch.stack([every(row.unsqueeze(0), target=1) for row in x])
    chosen = [int((whole - l2(a.unsqueeze(0))).abs().argmin()) for a in seen[0]]
    assert len(set(chosen)) == 4
    assert_is(value, every(x[chosen], target=1), model, ROUNDING)


def test_per_example_values_follow_their_rows(x: Tensor) -> None:
    call = _call(
        (x, x + 1),
        target=torch.arange(N),
        additional_forward_args=(10 * x, "mode", 2.0, torch.ones(3)),
        annotation=x,
        baselines=(20 * x, 0),
    )
    first, second = call["inputs"]
    assert torch.equal(second, first + 1)
    assert torch.equal(call["target"], _rows_of(first))
    extra, mode, number, shared = call["additional_forward_args"]
    assert torch.equal(extra, 10 * first)
    assert (mode, number) == ("mode", 2.0)
    assert torch.equal(shared, torch.ones(3))
    assert torch.equal(call["baselines"][0], 20 * first)
    assert call["baselines"][1] == 0


@pytest.mark.parametrize("target", [3, (1, 2), torch.tensor(2), None, tuple(range(N))])
def test_target_for_all_examples_stays(x: Tensor, target: Any) -> None:
    """In Captum's convention a tuple is the index of one output, whatever its length."""
    assert _call(x, target=target)["target"] is target


@pytest.mark.parametrize("target", [[*range(N)], [(i, 0) for i in range(N)]])
def test_target_list_follows_its_rows(x: Tensor, target: Any) -> None:
    call = _call(x, target=target)
    assert call["target"] == [target[i] for i in _rows_of(call["inputs"])]


@pytest.mark.parametrize("length", [2, 4, 9])
def test_target_that_does_not_fit_the_batch_is_refused(x: Tensor, length: int) -> None:
    # Also where it happens to fit the part: it cannot be known which rows were meant.
    with pytest.raises(ValueError, match=rf"`target`: expected one for each .*, found {length}"):
        _call(x, target=[0] * length)


def test_distribution_of_baselines_stays_whole(x: Tensor) -> None:
    call = _call(x, draws=True, baselines=10 * x)
    assert torch.equal(call["baselines"], 10 * x)
    assert len(call["inputs"]) == 4
    single = torch.zeros(1, 3)
    assert torch.equal(_call(x, baselines=single)["baselines"], single)


def test_each_term_of_a_formula_treats_baselines_and_annotations_its_own_way(x: Tensor) -> None:
    fixed, drawn, none = Recorder(), Recorder(draws_baselines=True), Saliency(nn.Linear(3, 1))
    prior = (
        2 * AttributionPrior(fixed, _marked)
        + 0.5 * AttributionPrior(drawn, lambda a: a.sum(1))
        + AttributionPrior(none, l1)
    )
    value = Subsample(prior, 0.5)(x, baselines=10 * x, annotation=100 * x)
    rows = _rows_of(fixed.calls[0]["inputs"])
    assert torch.equal(_rows_of(drawn.calls[0]["inputs"]), rows)  # one part for all terms
    assert torch.equal(fixed.calls[0]["baselines"], 10 * x[rows])
    assert torch.equal(drawn.calls[0]["baselines"], 10 * x)
    expected = 200.5 * 3 * rows.double().mean() + none.forward_func.weight.abs().sum()
    assert_same_numbers(value, expected.detach(), ROUNDING)


@pytest.mark.parametrize("explainer", [IntegratedGradients, ExpectedGradients])
def test_baselines_of_explainers(explainer: Any) -> None:
    """Those of each example go with it, and those of a distribution are all averaged over."""
    model, x, b = nn.Linear(3, 2), torch.randn(N, 3), torch.randn(N, 3)
    prior = AttributionPrior(explainer(model), l1)
    # f is linear: every example has |w (x - b)|; the part of size 1 is one of them.
    b_of = b if explainer is IntegratedGradients else b.mean(0)
    every = (model.weight[0] * (x - b_of)).abs().sum(1)
    value = Subsample(prior, 0.1)(x, b, target=0)
    # Captum's quadrature weights sum to 1 up to float32 rounding.
    assert float((every - value).abs().min().detach()) < 1e-6


def test_sum_over_examples_is_refused() -> None:
    total = AttributionPrior(Saliency(nn.ReLU()), l1, reduction="sum")
    with pytest.raises(ValueError, match=r"reduce by 'mean', found one .* by 'sum'.*Use red"):
        Subsample(2 * total, 0.5)
