"""Every distance against its oracle and the laws that it states."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from captum_priors.distances import SoftTopK, cosine, mse, pearson, soft_spearman, ssim
from tests import oracles
from tests.cases import rows

# Sums of a hundred terms in another order differ by a hundred float64 roundings (1e-16).
ROUNDING = 1e-12


def _soft_top_3(a: Any, b: Any) -> Any:
    return oracles.soft_top_k_distance(a, b, 3, 0.2)


def _ssim_over_channels(a: Any, b: Any) -> Any:
    return oracles.ssim(a.sum(1), b.sum(1))


@dataclass(frozen=True)
class Row:
    """A distance, what it is checked against, and what it promises."""

    name: str
    distance: Callable[..., Tensor]
    oracle: Callable[..., Any]
    shape: tuple[int, ...] = (4, 2, 3, 5)
    high: Callable[[float], float] = lambda _: 2
    """The largest distance of attributions of at most some size."""
    ignores_scale: bool = True
    """Whether one factor on both sides changes nothing."""
    ignores_each_scale: bool = False
    """Whether a factor on one side changes nothing."""
    tolerance: float = ROUNDING

    def draw(self, *, seed: int = 1) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, *self.shape, generator=generator)
        return a, b


MAPS = partial(ssim, dim=(1, 2))

DISTANCES = [
    Row("mse", mse, oracles.mse, high=lambda size: 4 * size**2, ignores_scale=False),
    Row("cosine", cosine, oracles.cosine, ignores_each_scale=True),
    Row("pearson", pearson, oracles.pearson, ignores_each_scale=True),
    Row(
        "soft-spearman",
        partial(soft_spearman, strength=3),
        partial(oracles.soft_spearman, strength=3),
        ignores_each_scale=True,
    ),
    # Variances as a difference of moments lose the digits that mean^2 / variance costs.
    Row("ssim", ssim, _ssim_over_channels, (3, 2, 9, 10), tolerance=1e-10),
    Row("ssim-maps", MAPS, oracles.ssim, (3, 8, 7), tolerance=1e-10),
    Row("ssim-small", MAPS, oracles.ssim, (3, 4, 3), tolerance=1e-10),
    Row(
        "soft-top-3",
        SoftTopK(3, temperature=0.2),
        _soft_top_3,
        high=lambda _: 1,
        ignores_each_scale=True,
    ),
]

every_distance = pytest.mark.parametrize("row", rows(DISTANCES))
few = settings(max_examples=15, deadline=None, derandomize=True)


@every_distance
def test_equals_its_oracle(row: Row) -> None:
    a, b = row.draw()
    expected = torch.as_tensor(row.oracle(a.numpy(), b.numpy()))
    assert row.distance(a, b).shape == (row.shape[0],)
    torch.testing.assert_close(row.distance(a, b), expected, rtol=row.tolerance, atol=ROUNDING)


@every_distance
def test_tuple_is_the_sum_of_its_tensors(row: Row) -> None:
    (a, b), (c, d) = row.draw(), row.draw(seed=2)
    value = row.distance((a, c), (b, d))
    expected = row.distance(a, b) + row.distance(c, d)
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=0)


@every_distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(row: Row, dtype: torch.dtype) -> None:
    a, b = (t.to(dtype) for t in row.draw())
    value = row.distance(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, row.distance(a.float(), b.float()), rtol=0, atol=0)


@every_distance
def test_gradient_is_the_derivative(row: Row) -> None:
    a, b = (t.clone().requires_grad_() for t in row.draw())
    assert torch.autograd.gradcheck(row.distance, (a, b))


@every_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e-10])
@pytest.mark.parametrize("other", ["random", "zero", "same"])
def test_gradient_is_finite_at_and_near_zero(
    row: Row, dtype: torch.dtype, size: float, other: str
) -> None:
    a, b = (t.to(dtype) for t in row.draw())
    a = (size * a).requires_grad_()
    b = {"random": b, "zero": torch.zeros_like(b), "same": a.detach().clone()}[other]
    b = b.requires_grad_()
    value = row.distance(a, b)
    value.sum().backward()
    for tensor in (value, a.grad, b.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


@every_distance
@few
@given(data=st.data())
def test_is_a_distance(row: Row, data: st.DataObject) -> None:
    entries = st.floats(-1e3, 1e3, allow_subnormal=False)
    a, b = (
        torch.as_tensor(data.draw(arrays(np.float64, row.shape, elements=entries))) for _ in "ab"
    )
    value = row.distance(a, b)
    # Normalised sums can pass their limit by a few roundings; SSIM loses digits as above.
    slack = 100 * row.tolerance
    assert float(value.min()) >= -slack
    high = row.high(max(float(a.abs().max()), float(b.abs().max())))
    assert float(value.max()) <= high + slack * max(1, high)
    torch.testing.assert_close(row.distance(b, a), value, rtol=slack, atol=slack)
    zero = torch.zeros(row.shape[0])
    torch.testing.assert_close(row.distance(a, a), zero, rtol=0, atol=slack)


@every_distance
@few
@given(scale=st.sampled_from([1e-6, 1e-3, 0.5, 30.0, 1e6]))
def test_scale(row: Row, scale: float) -> None:
    a, b = row.draw()
    same = row.distance(a, b)
    together, alone = row.distance(scale * a, scale * b), row.distance(scale * a, b)
    assert torch.allclose(together, same, rtol=row.tolerance, atol=0) == row.ignores_scale
    assert torch.allclose(alone, same, rtol=row.tolerance, atol=0) == row.ignores_each_scale


def test_cosine_of_opposite_and_zero_maps() -> None:
    a, zero = torch.randn(2, 6), torch.zeros(2, 6)
    # Unit vectors are off by a few roundings.
    torch.testing.assert_close(cosine(a, -a), torch.full((2,), 2.0), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(cosine(a, zero), torch.ones(2), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(cosine(zero, a), torch.ones(2), rtol=ROUNDING, atol=0)
    assert cosine(zero, zero).tolist() == [0, 0]


def test_cosine_of_nearly_equal_maps_keeps_its_digits() -> None:
    # The angle is 1e-9, the distance half its square: 1 - cos would round to zero.
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-9]])
    assert cosine(a, b).item() == pytest.approx(5e-19, rel=1e-6)


def test_pearson_ignores_offsets() -> None:
    a, b = torch.randn(2, 6), torch.randn(2, 6)
    # Adding 5 costs one digit of the deviations.
    torch.testing.assert_close(pearson(a + 5, 2 * b - 3), pearson(a, b), rtol=1e-11, atol=0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3])
def test_pearson_of_constant_maps_has_no_direction(constant: float) -> None:
    # The mean of seven times 0.1 or 0.7 is not the number itself: what is left is rounding.
    flat = torch.full((1, 7), constant, dtype=torch.float32)
    other = torch.full((1, 7), 0.7, dtype=torch.float32)
    assert pearson(flat, other).item() == 0
    varied = torch.randn(1, 7, dtype=torch.float32)
    # A float32 unit vector is off by a few 1e-7.
    assert pearson(flat, varied).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_soft_spearman_tends_to_spearmans_correlation(ties: bool) -> None:
    a, b = torch.randn(2, 4, 12)
    if ties:
        a, b = a.round(), b.round()
    expected = torch.as_tensor([1 - spearmanr(*pair).statistic for pair in zip(a, b, strict=True)])
    # The smallest gap is above 1e-4 standard deviations: tanh(50) is 1 to rounding.
    value = soft_spearman(a, b, strength=1e6)
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=0)
    nearer = [(soft_spearman(a, b, strength=s) - expected).abs().max() for s in (1, 10, 100)]
    assert nearer[0] > nearer[1] > nearer[2] > 0 or ties
    # tanh(z) is z up to its cube.
    torch.testing.assert_close(soft_spearman(a, b, strength=1e-4), pearson(a, b), rtol=1e-6, atol=0)


def test_soft_spearman_ignores_offsets_and_sees_order_alone() -> None:
    a, b = torch.randn(2, 3, 9)
    # Adding 5 costs one digit of the deviations.
    torch.testing.assert_close(
        soft_spearman(a + 5, 2 * b - 3), soft_spearman(a, b), rtol=1e-11, atol=0
    )
    flat = torch.full((3, 9), 0.3)
    assert soft_spearman(flat, flat + 0.4).tolist() == [0, 0, 0]
    torch.testing.assert_close(soft_spearman(a, flat), torch.ones(3), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(
        soft_spearman(a, -(a**3), strength=1e9), torch.full((3,), 2.0), rtol=ROUNDING, atol=0
    )


def test_ssim_is_that_of_torchmetrics() -> None:
    a, b = torch.rand(3, 1, 24, 20), torch.rand(3, 1, 24, 20)
    for i in range(3):
        x, y = a[i : i + 1], b[i : i + 1]
        both = torch.cat([x, y])
        _, theirs = structural_similarity_index_measure(
            x, y, data_range=float(both.max() - both.min()), return_full_image=True
        )
        # Theirs continues the maps by reflection; ours stays where the window of 11 fits. The same
        # float64 formula, but for second moments about zero.
        expected = theirs[..., 5:-5, 5:-5].mean()
        torch.testing.assert_close(1 - ssim(x, y, window=11)[0], expected, rtol=1e-9, atol=0)


def test_ssim_finds_maps_by_their_axes() -> None:
    a, b = torch.randn(2, 2, 3, 8, 9)
    expected = ssim(a.sum(1), b.sum(1), dim=(1, 2))
    for dim, order in ((None, (0, 1, 2, 3)), ((1, 2), (0, 2, 3, 1)), ((-3, 3), (0, 2, 1, 3))):
        found = ssim(a.permute(order), b.permute(order), dim=dim)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert not torch.allclose(ssim(a, b, window=3), ssim(a, b), rtol=0.01)
    torch.testing.assert_close(ssim(a, b, window=8), ssim(a, b), rtol=0, atol=0)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_soft_top_k_tends_to_the_intersection(k: int) -> None:
    # Distinct sizes 1 to 12, hence gaps of at least 1: memberships differ from 0 and 1 by e^-70.
    a = torch.stack([torch.randperm(12) + 1.0 for _ in range(5)])
    b = torch.stack([torch.randperm(12) + 1.0 for _ in range(5)])
    expected = torch.as_tensor(oracles.top_k_distance(a.numpy(), b.numpy(), k))
    value = SoftTopK(k, temperature=1e-3)(a, -b)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


def test_soft_top_k_says_its_settings() -> None:
    assert repr(SoftTopK(3, temperature=0.2)) == "SoftTopK(k=3, temperature=0.2)"


ONES = torch.ones(2, 3)
BAD_CALLS: dict[str, Callable[[], Any]] = {
    r"`other`: expected \(2, 3\) on cpu as in `attributions`, found \(2, 4\) on cpu\. Compare": (
        lambda: mse(ONES, torch.ones(2, 4))
    ),
    r"`other`: expected \(2, 3\) on cpu as .*, found \(2, 3\) on cpu, \(2, 3\) on cpu": lambda: (
        cosine((ONES,), (ONES, ONES))
    ),
    r"`attributions`: expected maps .*, found shape \(2, 3\)\. Use mse": lambda: ssim(ONES, ONES),
    r"`attributions`: expected maps .*, found shape \(2, 3, 1\), dim=1\. Use": lambda: ssim(
        ONES[..., None], ONES[..., None], dim=1
    ),
    r"`dim`: expected which of the 2 axes .*, found None .*\. Pass dim=\(1, 2\)": lambda: ssim(
        ONES[..., None], ONES[..., None]
    ),
    r"`window`: expected an integer of at least 1, found 0\.": lambda: ssim(ONES, ONES, window=0),
    r"`k`: expected an integer of at least 1, found 0\. Pass k=1": lambda: SoftTopK(0),
    r"`k`: expected .* at most 2, found 3\. Pass k=1": lambda: SoftTopK(3)(ONES, ONES),
    r"`strength`: expected a positive finite number, found 0\.": lambda: soft_spearman(
        ONES, ONES, strength=0
    ),
    r"`temperature`: expected a positive finite number, found nan\.": lambda: SoftTopK(
        1, temperature=math.nan
    ),
}


@pytest.mark.parametrize("text", BAD_CALLS)
def test_bad_input_gives_one_clear_error(text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        BAD_CALLS[text]()
