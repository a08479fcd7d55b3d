"""Scores against SciPy, plain loops and closed forms, with ties and degenerate maps."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from captum_priors import ExpectedGradients, differentiable, distances, penalties, shared
from captum_priors.metrics import (
    ReportScore,
    gini,
    kendall,
    local_lipschitz,
    mse,
    pearson,
    spearman,
    ssim,
    top_k_intersection,
    wrong_reason_rate,
)
from tests import oracles
from tests.asserts import leaves_no_trace

TIGHT = {"rtol": 1e-9, "atol": 1e-9}  # the same float64 formula in another order


def top_3(a: Any, b: Any) -> Tensor:
    return top_k_intersection(a, b, 3)


PAIRS = [top_3, spearman, kendall, pearson, mse]


def _maps(ties: bool) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(5, 1, 6, 6), torch.randn(5, 1, 6, 6)
    return (a.round(), (a + b).round()) if ties else (a, a + b)


def test_rank_correlations_are_scipy_s_to_the_last_digits() -> None:
    for p in (2, 3, 17, 64, 100):
        a, b = torch.randn(6, p), torch.randn(6, p)
        a[:3], b[1:4] = a[:3].round(), b[1:4].round()  # ties in one map, in both, in none
        a[:, 0], b[:, -1] = 9, 9  # none is constant
        for metric, oracle in ((kendall, stats.kendalltau), (spearman, stats.spearmanr)):
            expected = [oracle(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
            torch.testing.assert_close(metric(a, b), torch.tensor(expected), rtol=0, atol=1e-13)


def test_pearson_mse_and_ssim_are_one_definition_with_the_distances() -> None:
    a, b = torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    c, d = torch.randn(3, 4), torch.randn(3, 4)
    joined = [torch.cat([m.flatten(1), v], 1) for m, v in ((a, c), (b, d))]
    for found, expected in (
        (pearson((a, c), (b, d)), 1 - distances.pearson(*joined)),
        (mse((a, c), (b, d)), distances.mse(*joined)),
        (ssim((a, b), (b, a)), 1 - distances.ssim(a, b)),  # the mean of two equal ones
        (ssim(a, b, dim=(1, 3), window=5), 1 - distances.ssim(a, b, dim=(1, 3), window=5)),
    ):
        torch.testing.assert_close(found, expected, **TIGHT)


def test_top_k_intersection_without_ties_is_that_of_sets() -> None:
    a, b = torch.randn(6, 20), torch.randn(6, 20)
    for k in (1, 5, 20):
        for i, found in enumerate(top_k_intersection(a, b, k).tolist()):
            tops = [set(t[i].abs().argsort(descending=True)[:k].tolist()) for t in (a, b)]
            assert found == pytest.approx(len(tops[0] & tops[1]) / k)


def test_top_k_shares_places_among_ties() -> None:
    constant, one = torch.ones(1, 10), torch.eye(10)[:1]
    assert top_k_intersection(constant, constant, 3).item() == pytest.approx(1)
    assert top_k_intersection(constant, torch.arange(10.0)[None], 3).item() == pytest.approx(0.3)
    # One place is sure, two are shared by nine.
    assert top_k_intersection(one, one, 3).item() == pytest.approx(1)
    # Against 3 others of which the tie holds 2/9 each.
    other = torch.tensor([[0.0] * 7 + [1.0, 2.0, 3.0]])
    assert top_k_intersection(one, other, 3).item() == pytest.approx(3 * (2 / 9) / 3)


def test_top_k_sums_channels_of_images() -> None:
    a = torch.zeros(1, 2, 1, 3)
    a[0, :, 0] = torch.tensor([[1.0, 0.0, 0.9], [1.0, 1.5, 0.0]])
    b = torch.tensor([[[[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]])
    assert top_k_intersection(a, b, 1).item() == 1
    assert top_k_intersection(a, b, 1, dim=(1, 2, 3)).item() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_pairs_are_symmetric_and_best_for_equal_maps(seed: int, ties: bool) -> None:
    torch.manual_seed(seed)
    a, b = _maps(ties)
    for metric in (*PAIRS, ssim):
        torch.testing.assert_close(metric(a, b), metric(b, a), **TIGHT)
        best = torch.zeros(5) if metric is mse else torch.ones(5)
        torch.testing.assert_close(metric(a, a), best, **TIGHT)
        assert bool((metric(a, b) <= 1 + 1e-9).all()) or metric is mse


@pytest.mark.parametrize("metric", [spearman, kendall, pearson])
def test_constant_and_zero_maps(metric: Any) -> None:
    zero, constant, other = torch.zeros(1, 6), torch.full((1, 6), 0.3), torch.randn(1, 6)
    assert metric(zero, constant).item() == 1
    assert metric(zero, other).item() == pytest.approx(0, abs=1e-12)
    assert metric(other, constant).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", [*PAIRS, ssim])
def test_what_is_not_finite_is_nan_and_stays_with_its_example(metric: Any) -> None:
    a, b = _maps(False)
    expected = metric(a, b)
    a[1, 0, 2, 2], b[3, 0, 0, 0] = float("nan"), float("inf")
    found = metric(a, b)
    assert found.isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(found[[0, 2, 4]], expected[[0, 2, 4]], **TIGHT)


@pytest.mark.parametrize("metric", PAIRS)
def test_features_of_a_tuple_count_together(metric: Any) -> None:
    a, b = torch.randn(4, 10), torch.randn(4, 10)
    parts = [(t[:, :6].reshape(4, 1, 2, 3), t[:, 6:]) for t in (a, b)]
    torch.testing.assert_close(metric(*parts), metric(a, b), **TIGHT)


@pytest.mark.parametrize("metric", [*PAIRS, ssim])
def test_takes_half_precision_and_gives_no_graph(metric: Any) -> None:
    a, b = (t.to(torch.bfloat16).requires_grad_() for t in _maps(False))
    found = metric(a, b)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, metric(a.detach().float(), b.detach().float()))


def test_gini_of_each_example() -> None:
    a = torch.randn(4, 3, 5)
    expected = [-float(oracles.gini(row[None].numpy())) for row in a]
    torch.testing.assert_close(gini(a), torch.tensor(expected), **TIGHT)
    # That of the penalty, tuples included.
    parts = (a[:, :2], a[:, 2])
    torch.testing.assert_close(gini(parts), gini(a), **TIGHT)
    for i in range(4):
        torch.testing.assert_close(-penalties.gini(tuple(t[i : i + 1] for t in parts)), gini(a)[i])
    assert gini(torch.zeros(2, 3)).tolist() == [0, 0]
    assert gini(torch.tensor([[1.0, float("nan")]])).isnan().all()


def test_wrong_reason_rate_by_hand() -> None:
    phi = torch.tensor([[0.0, 4.0, 1.0, -5.0], [2.0, 0.0, 0.0, 1.0], [-1.0, -2.0, -3.0, 0.0]])
    allowed = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    # Scaled: 0 1 .25 0 | 1 0 0 .5 | 0 0 0 0; their mean is 2.75 / 12 = .229.
    torch.testing.assert_close(
        wrong_reason_rate(phi, allowed), torch.tensor([2 / 3, 1 / 2, 0.0]), **TIGHT
    )
    torch.testing.assert_close(
        wrong_reason_rate(phi, allowed, threshold=0.3), torch.tensor([1 / 3, 1 / 2, 0.0]), **TIGHT
    )
    assert wrong_reason_rate(phi, shared(torch.ones(4))).isnan().all()
    parts = ((phi[:, :1], phi[:, 1:]), (allowed[:, :1], allowed[:, 1:]))
    torch.testing.assert_close(wrong_reason_rate(*parts), wrong_reason_rate(phi, allowed))
    # A map that is not finite is no part of the mean, which is .3 and not .15.
    broken = torch.tensor([[0.0, 5.0, 1.0, 0.0], [math.nan, 1.0, 2.0, 3.0]])
    found = wrong_reason_rate(broken, shared(torch.tensor([1, 0, 0, 0])))
    torch.testing.assert_close(found, torch.tensor([1 / 3, math.nan]), equal_nan=True)
    everywhere = torch.ones(2, 4)
    assert wrong_reason_rate(everywhere, shared(torch.tensor([1, 1, 0, 0]))).tolist() == [1, 1]


def test_local_lipschitz_of_a_quadratic() -> None:
    """The gradient of x'Ax / 2 changes by A d: at most the largest singular value."""
    matrix = torch.randn(3, 3)
    matrix = matrix + matrix.T

    def model(x: Tensor) -> Tensor:
        return ((x @ matrix) * x).sum(1) / 2

    explainer = differentiable(Saliency(model))
    found = local_lipschitz(explainer, torch.randn(4, 3), radius=0.2, n_samples=400, abs=False)
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    assert bool((found <= largest * (1 + 1e-9)).all())
    assert bool((found > 0.9 * largest).all())


class Noisy:
    """Twice the points, shifted by a draw; keeps where it was asked."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []

    def attribute(self, inputs: Tensor) -> Tensor:
        self.points.append(inputs)
        return 2 * inputs + torch.randn_like(inputs)


def test_local_lipschitz_uses_common_draws_on_both_sides_of_the_inputs() -> None:
    explainer, x = Noisy(), torch.zeros(4, 50)
    found = local_lipschitz(explainer, x, radius=0.1, n_samples=20)
    torch.testing.assert_close(found, torch.full((4,), 2.0), rtol=1e-9, atol=0)
    points = torch.stack(explainer.points[1:])
    assert float(points.min()) == pytest.approx(-0.1, rel=0.01)  # of 4000 draws
    assert float(points.max()) == pytest.approx(0.1, rel=0.01)


def test_local_lipschitz_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    x = torch.randn(5, 3)
    model(x).sum().backward()
    with leaves_no_trace(model, tensors=[x]):
        found = local_lipschitz(ExpectedGradients(model), x, radius=1e-3, baselines=x)
    # Expected gradients of an affine model are w (x - mu) for any references.
    weight = model[1].weight[0] / (model[0].running_var + model[0].eps).sqrt()
    assert bool((found <= float(weight.abs().max().detach()) * (1 + 1e-9)).all())


ONES = torch.ones(2, 3)
BAD: dict[str, Callable[[], Any]] = {
    r"`attributions`: expected shape": lambda: gini(torch.ones(3)),
    r"`dim`: expected which of the 2 axes": lambda: top_k_intersection(
        ONES[..., None], ONES[..., None], 1
    ),
    r"`annotation`: expected zeros and ones, found annotation\[2\] = 0.5\. Thresh": lambda: (
        wrong_reason_rate(ONES, shared(torch.tensor([0, 1, 0.5])))
    ),
    "`radius`: expected a positive": lambda: local_lipschitz(Noisy(), ONES, radius=0),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_gives_one_clear_error(text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        BAD[text]()


def test_what_needs_the_extra_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    for metric in (top_3, spearman, pearson, mse):
        assert metric(ONES, ONES).shape == (2,)
    for ask in (lambda: kendall(ONES, ONES), lambda: ReportScore.of(torch.ones(3), 0.95)):
        with pytest.raises(ImportError, match=r"'scipy'.*pip install 'captum_priors\[metrics\]'"):
            ask()
