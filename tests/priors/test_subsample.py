"""Subsample: some of the examples, with all that belongs to them."""

from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import AttributionPrior, ExpectedGradients, Subsample
from captum_priors.penalties import l1, l2
from tests.asserts import assert_same_numbers

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
        self.calls.append(
            {
                "inputs": inputs,
                "baselines": baselines,
                "target": target,
                "additional_forward_args": additional_forward_args,
            }
        )
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


def _call(recorder: Recorder, x: Any, fraction: float = 0.5, **call: Any) -> dict[str, Any]:
    Subsample(AttributionPrior(recorder, _marked), fraction)(x, **call)
    return recorder.calls[-1]


@pytest.mark.parametrize(
    ("fraction", "n"), [(0.01, 1), (0.25, 2), (0.5, 4), (0.9, 7), (1, 8), (1.0, 8)]
)
def test_takes_that_share_without_repetition(x: Tensor, fraction: float, n: int) -> None:
    rows = _rows_of(_call(Recorder(), x, fraction)["inputs"])
    assert len(rows) == n
    assert len(set(rows.tolist())) == n


def test_batch_of_one_is_taken(x: Tensor) -> None:
    assert len(_call(Recorder(), x[:1], 0.1)["inputs"]) == 1


def test_rows_are_drawn_anew_and_all_come_up(x: Tensor) -> None:
    recorder = Recorder()
    prior = Subsample(AttributionPrior(recorder, _marked), 0.25)
    for _ in range(40):
        prior(x)
    drawn = [tuple(_rows_of(call["inputs"]).tolist()) for call in recorder.calls]
    assert len(set(drawn)) > 20
    # A row stays out of 40 draws with probability .75^40 = 1e-5; the seed is fixed.
    assert {i for rows in drawn for i in rows} == set(range(N))


def test_mean_over_all_pairs_is_the_mean_of_the_batch(x: Tensor) -> None:
    values = x.square()
    prior = Subsample(AttributionPrior(Recorder(), _marked), 0.5)
    found = torch.stack([prior(values) for _ in range(400)])
    expected = values.sum(1).mean()
    # Four standard errors of the mean of the draws.
    assert abs(found.mean() - expected) < 4 * found.std() / 400**0.5
    assert found.std() > 0


def test_gradient_is_that_of_the_chosen_rows() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 3)
    seen = []

    def spy(attributions: Tensor) -> Tensor:
        seen.append(attributions)
        return l2(attributions)

    inner = AttributionPrior(Saliency(model), spy)
    value = Subsample(inner, 0.5)(x, target=1)
    every = AttributionPrior(Saliency(model), l2)
    whole = torch.stack([every(row.unsqueeze(0), target=1) for row in x])
    chosen = [int((whole - l2(a.unsqueeze(0))).abs().argmin()) for a in seen[0]]
    assert len(set(chosen)) == 4
    expected = every(x[chosen], target=1)
    assert_same_numbers(value, expected, ROUNDING)
    weight = model[0].weight
    (found,), (by_hand,) = (torch.autograd.grad(v, weight) for v in (value, expected))
    assert_same_numbers(found, by_hand, ROUNDING)


def test_per_example_values_follow_their_rows(x: Tensor) -> None:
    labels = torch.arange(N)
    call = _call(
        Recorder(),
        x,
        target=labels,
        additional_forward_args=(10 * x, "mode", 2.0, torch.ones(3)),
        annotation=x,
    )
    rows = _rows_of(call["inputs"])
    assert torch.equal(call["target"], rows)
    extra, mode, number, shared = call["additional_forward_args"]
    assert torch.equal(extra, 10 * x[rows])
    assert (mode, number) == ("mode", 2.0)
    assert torch.equal(shared, torch.ones(3))


def test_annotations_follow_their_rows(x: Tensor) -> None:
    recorder = Recorder()
    prior = Subsample(AttributionPrior(recorder, _marked), 0.5)
    value = prior(x, annotation=100 * x)
    expected = 300 * _rows_of(recorder.calls[-1]["inputs"]).double().mean()
    assert_same_numbers(value, expected, ROUNDING)


@pytest.mark.parametrize("target", [3, (1, 2), torch.tensor(2), None])
def test_target_for_all_examples_stays(x: Tensor, target: Any) -> None:
    found = _call(Recorder(), x, target=target)["target"]
    assert found is target


def test_tuple_target_as_long_as_the_batch_stays(x: Tensor) -> None:
    # In Captum's convention a tuple is the index of one output, whatever its length.
    assert _call(Recorder(), x[:2], target=(1, 0))["target"] == (1, 0)


@pytest.mark.parametrize("pairs", [False, True])
def test_target_list_follows_its_rows(x: Tensor, pairs: bool) -> None:
    target = [(i, 0) for i in range(N)] if pairs else list(range(N))
    call = _call(Recorder(), x, target=target)
    assert call["target"] == [target[i] for i in _rows_of(call["inputs"])]


@pytest.mark.parametrize("length", [2, 4, 9])
def test_target_that_does_not_fit_the_batch_is_refused(x: Tensor, length: int) -> None:
    # Also where it happens to fit the part: it cannot be known which rows were meant.
    with pytest.raises(ValueError, match=rf"`target`: expected one for each .*, found {length}"):
        _call(Recorder(), x, target=[0] * length)


def test_per_example_baselines_follow_their_rows(x: Tensor) -> None:
    call = _call(Recorder(), x, baselines=10 * x)
    assert torch.equal(call["baselines"], 10 * call["inputs"])
    call = _call(Recorder(), (x, x + 1), baselines=(10 * x, 0))
    assert torch.equal(call["baselines"][0], 10 * call["inputs"][0])
    assert call["baselines"][1] == 0
    single = torch.zeros(1, 3)
    assert torch.equal(_call(Recorder(), x, baselines=single)["baselines"], single)


def test_distribution_of_baselines_stays_whole(x: Tensor) -> None:
    call = _call(Recorder(draws_baselines=True), x, baselines=10 * x)
    assert torch.equal(call["baselines"], 10 * x)
    assert len(call["inputs"]) == 4


def test_each_term_of_a_formula_treats_baselines_its_own_way(x: Tensor) -> None:
    fixed, drawn, none = Recorder(), Recorder(draws_baselines=True), Saliency(nn.Linear(3, 1))
    prior = (
        2 * AttributionPrior(fixed, _marked)
        + 0.5 * AttributionPrior(drawn, _marked)
        + AttributionPrior(none, l1)
    )
    value = Subsample(prior, 0.5)(x, baselines=10 * x)
    rows = _rows_of(fixed.calls[0]["inputs"])
    assert torch.equal(_rows_of(drawn.calls[0]["inputs"]), rows)  # one part for all terms
    assert torch.equal(fixed.calls[0]["baselines"], 10 * x[rows])
    assert torch.equal(drawn.calls[0]["baselines"], 10 * x)
    expected = 2.5 * 3 * rows.double().mean() + none.forward_func.weight.abs().sum()
    assert_same_numbers(value, expected.detach(), ROUNDING)


def test_integrated_gradients_with_per_example_baselines() -> None:
    model, x, b = nn.Linear(3, 2), torch.randn(N, 3), torch.randn(N, 3)
    prior = AttributionPrior(IntegratedGradients(model), l1, n_steps=3)
    # f is linear: every example has |w (x - b)|; the part of size 1 is one of them.
    every = (model.weight[0] * (x - b)).abs().sum(1)
    value = Subsample(prior, 0.1)(x, b, target=0)
    # Captum's quadrature weights sum to 1 up to float32 rounding.
    assert float((every - value).abs().min().detach()) < 1e-6
    assert_same_numbers(Subsample(prior, 1.0)(x, b, target=0), every.mean(), 1e-6)


def test_expected_gradients_averages_over_the_whole_distribution() -> None:
    model, x, background = nn.Linear(3, 2), torch.randn(N, 3), torch.randn(N, 3)
    prior = AttributionPrior(ExpectedGradients(model), l1)
    every = (model.weight[0] * (x - background.mean(0))).abs().sum(1)
    value = Subsample(prior, 0.1)(x, background, target=0)
    assert float((every - value).abs().min().detach()) < ROUNDING


def test_formula_and_keywords_are_those_of_the_prior() -> None:
    prior = Subsample(AttributionPrior(Saliency(nn.ReLU()), l1), 0.25)
    assert repr(2 * prior) == "2 * Subsample(AttributionPrior(Saliency, l1), fraction=0.25)"
    assert not prior.takes("baselines")


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan"), True, "0.5", None])
def test_bad_fraction_is_refused(fraction: Any) -> None:
    prior = AttributionPrior(Saliency(nn.ReLU()), l1)
    with pytest.raises(
        ValueError, match=r"`fraction`: expected a number in \(0, 1\], found .*Pass"
    ):
        Subsample(prior, fraction)


def test_what_is_no_prior_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`prior`: expected a prior, found function\. Pass an"):
        Subsample(l1, 0.5)


def test_sum_over_examples_is_refused() -> None:
    total = AttributionPrior(Saliency(nn.ReLU()), l1, reduction="sum")
    text = (
        r"`prior`: expected terms that reduce by 'mean', found one that reduces by 'sum'.*Use red"
    )
    with pytest.raises(ValueError, match=text):
        Subsample(2 * total, 0.5)


def test_unknown_annotation_is_refused(x: Tensor) -> None:
    prior = Subsample(AttributionPrior(Recorder(), l1), 0.5)
    with pytest.raises(TypeError, match=r"expected .* takes, found 'annotation'"):
        prior(x, annotation=x)
    prior = Subsample(AttributionPrior(Recorder(), l1) + AttributionPrior(Recorder(), l2), 0.5)
    with pytest.raises(TypeError, match=r"expected .* takes, found 'annotation'"):
        prior(x, annotation=x)
