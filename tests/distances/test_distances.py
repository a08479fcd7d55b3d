"""Distances at their ends and limits; ``tests/penalties`` has their oracles and laws."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torchmetrics.functional.image import structural_similarity_index_measure

from captum_priors.distances import SoftTopK, cosine, mse, pearson, soft_spearman, ssim
from tests import oracles

# Sums of a hundred terms in another order differ by a hundred float64 roundings (1e-16).
ROUNDING = 1e-12


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


ONES = torch.ones(2, 3)
LONG = ONES[..., None]
BAD_CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    r"`other`: expected \(2, 3\) on cpu as in `attributions`, found \(2, 4\) on cpu\. Compare": (
        *(mse, (ONES, torch.ones(2, 4)), {}),
    ),
    r"`other`: expected \(2, 3\) on cpu as .*, found \(2, 3\) on cpu, \(2, 3\) on cpu": (
        *(cosine, ((ONES,), (ONES, ONES)), {}),
    ),
    r"`attributions`: expected maps .*, found shape \(2, 3\)\. Use mse": (ssim, (ONES, ONES), {}),
    r"`attributions`: expected maps .*, found .*, dim=1\.": (ssim, (LONG, LONG), {"dim": 1}),
    r"`dim`: expected .* 2 axes .* Pass dim=\(1, 2\)": (ssim, (LONG, LONG), {}),
    r"`window`: expected an integer of at least 1": (ssim, (ONES, ONES), {"window": 0}),
    r"`k`: expected an integer of at least 1, found 0\. Pass k=1": (SoftTopK, (0,), {}),
    r"`k`: expected .* at most 2, found 3\. Pass k=1": (SoftTopK(3), (ONES, ONES), {}),
    "`strength`: expected a positive": (soft_spearman, (ONES, ONES), {"strength": 0}),
    "`temperature`: expected a positive": (SoftTopK, (1,), {"temperature": math.nan}),
}


@pytest.mark.parametrize("text", BAD_CALLS)
def test_bad_input_gives_one_clear_error(text: str) -> None:
    function, args, options = BAD_CALLS[text]
    with pytest.raises((TypeError, ValueError), match=text):
        function(*args, **options)
