"""Every penalty and distance against its oracle and the laws that it states."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from captum_priors import shared
from captum_priors.distances import SoftTopK, cosine, mse, pearson, soft_spearman, ssim
from captum_priors.metrics import wrong_reason_rate
from captum_priors.penalties import (
    GraphLaplacian,
    alignment,
    background,
    energy_outside,
    entropy,
    gini,
    group_sparsity,
    l1,
    l2,
    outside,
    rationale,
    total_variation,
)
from captum_priors.penalties.annotation import resized
from tests import oracles
from tests.cases import rows

# Sums of a few hundred terms in another order differ by a few hundred float64 roundings (1e-16).
ROUNDING = 1e-12

_table = np.random.default_rng(0)


def _mask(*shape: int) -> Tensor:
    return torch.as_tensor(_table.integers(0, 2, shape), dtype=torch.float64)


def _weights(n: int) -> Tensor:
    half = np.triu(_table.random((n, n)) * _table.integers(0, 2, (n, n)), 1)
    return torch.as_tensor(half + half.T)


@dataclass(frozen=True)
class Row:
    """A penalty or a distance, what it is checked against, and what it promises."""

    name: str
    function: Callable[..., Tensor]
    oracle: Callable[..., Any]
    high: Callable[[float], float]
    """The largest value that attributions of at most some size can have."""
    low: float = 0.0
    degree: int | None = 0
    """Power of a positive factor on the attributions that the value has."""
    even: bool = True
    """Whether the sign of the attributions changes nothing."""
    shape: tuple[int, ...] = (4, 2, 3, 5)
    annotations: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] | None = None
    """The annotations as the oracle takes them, where that differs."""
    of_batch: bool = False
    joins: bool = False
    tolerance: float = ROUNDING
    sides: int = 1
    """How many maps it takes: two are compared."""
    ignores_each_scale: bool = False
    """Of a distance: whether a factor on one side changes nothing."""

    def draw(self, *, seed: int = 1) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(self.sides, *self.shape, generator=generator))

    def __call__(self, *maps: Any) -> Tensor:
        return self.function(*maps, **self.annotations)

    def expected(self, *maps: Tensor) -> Tensor:
        known = self.annotations if self.known is None else self.known
        plain = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in known.items()}
        return torch.as_tensor(self.oracle(*(m.numpy() for m in maps), **plain))


def _tv(
    name: str, shape: tuple[int, ...], places: tuple[int, ...], dim: Any = None, raw: bool = False
) -> Row:
    """``places`` are the axes that the oracle is told, ``dim`` is what the penalty is told."""
    n, p = len(places), math.prod(shape[d] for d in places)
    channels = [d for d in range(1, len(shape)) if d not in places]
    summed = math.prod(shape[d] for d in channels)

    def oracle(attributions: Any) -> Any:
        maps = attributions.transpose(0, *channels, *places)
        return oracles.total_variation(maps, spatial_dims=n, standardize=not raw)

    return Row(
        f"total_variation-{name}",
        partial(total_variation, dim=dim, standardize=not raw),
        oracle,
        # Each place has at most 2n neighbours, and half of each difference; standardised entries
        # have a mean size of at most 1.
        lambda size: 2 * n * p * (summed * size if raw else 1),
        degree=1 if raw else 0,
        shape=shape,
        # The floor of 1e-6 under the deviation s changes the result by 5e-13 / s^2.
        tolerance=1e-10,
    )


def _annotated(
    name: str, penalty: Any, oracle: Any, high: Any, given: Tensor, **promises: Any
) -> Row:
    known: dict[str, Any] = {"mask": given}
    kind = name.partition("-")[0]
    if kind in KINDS:
        known["kind"] = kind
    if oracle is oracles.alignment:
        known = {"given": given, "measure": name}
    return Row(
        name, penalty, oracle, high, annotations={"annotation": given}, known=known, **promises
    )


by_mse = partial(alignment, measure="mse")
WEIGHTS = _weights(30)
LABELS = torch.as_tensor(_table.permutation(np.arange(30) % 4))
GROUPS = [[i for i, label in enumerate(LABELS.tolist()) if label == g] for g in range(4)]
OVERLAPPING = [[0, 1, 2], [2, 3], [29]]
PIXELS, MAPS, WORDS = _mask(4, 2, 3, 5), _mask(4, 3, 5), _mask(4, 7, 1)
WANTED = torch.as_tensor(_table.standard_normal((4, 2, 3, 5)))
LARGEST = float(WANTED.abs().max())


def _energy_over_channels(attributions: Any, *, mask: Any) -> Any:
    """Channels are summed first where the annotation has none."""
    return oracles.energy_outside(attributions.sum(1), mask)


def _eps(size: float) -> float:
    """Nothing lies inside."""
    return -math.log(torch.finfo(torch.float64).eps)


KINDS = {
    "bce": lambda size: 2 * _eps(size) + 2,  # of one place that has all, and of one that has none
    "kl": _eps,
    "l1": lambda _: 2,
    "huber": lambda _: 1.5,
    "order": lambda _: 1,
}
RATIONALES = {kind: partial(rationale, kind=kind) for kind in KINDS}


def _rationale_of_words(attributions: Any, *, mask: Any, kind: str) -> Any:
    """An embedding's numbers are summed first where the annotation has one for each word."""
    return oracles.rationale(attributions.sum(2, keepdims=True), mask, kind)


def _squares(size: float) -> float:
    return 30 * size**2


def _one(size: float) -> float:
    return 1.0


PENALTIES = [
    _tv("length", (4, 9), (1,)),
    _tv("images", (4, 2, 3, 5), (2, 3)),
    _tv("volumes", (3, 2, 3, 4, 2), (2, 3, 4)),
    _tv("maps", (4, 3, 5), (1, 2), (1, 2)),
    _tv("channels-first", (4, 3, 9), (2,), -1),
    _tv("channels-last", (4, 9, 3), (1,), 1),
    _tv("images-channels-last", (4, 3, 5, 2), (1, 2), [1, 2]),
    _tv("raw-length", (4, 9), (1,), raw=True),
    _tv("raw-images", (4, 2, 3, 5), (2, 3), raw=True),
    _tv("raw-volumes", (3, 2, 3, 4, 2), (2, 3, 4), raw=True),
    Row("gini", gini, oracles.gini, lambda _: 0, -(1 - 1 / 30), of_batch=True, joins=True),
    Row(
        "graph",
        GraphLaplacian(WEIGHTS),
        oracles.graph_laplacian,
        lambda size: float(WEIGHTS.sum()) / 2 * size**2,
        degree=2,
        known={"adjacency": WEIGHTS},
        of_batch=True,
    ),
    Row("l1", l1, oracles.l1, lambda size: 30 * size, degree=1),
    Row("l2", l2, oracles.l2, _squares, degree=2),
    Row("entropy", entropy, oracles.entropy, lambda _: math.log(30)),
    Row(
        "groups-of-labels",
        group_sparsity,
        oracles.group_sparsity,
        lambda size: 30 * size,
        degree=1,
        annotations={"groups": LABELS},
        known={"groups": GROUPS},
    ),
    Row(
        "groups-of-indices",
        group_sparsity,
        oracles.group_sparsity,
        lambda size: 6 * size,
        degree=1,
        annotations={"groups": OVERLAPPING},
    ),
    _annotated("outside", outside, oracles.outside, _squares, PIXELS, degree=2),
    _annotated("energy", energy_outside, oracles.energy_outside, _one, PIXELS, even=False),
    _annotated("background", background, oracles.background, _eps, PIXELS),
    _annotated("background-maps", background, oracles.background, _eps, MAPS.unsqueeze(1)),
    _annotated("energy-maps", energy_outside, _energy_over_channels, _one, MAPS, even=False),
    *(
        _annotated(kind, RATIONALES[kind], oracles.rationale, high, PIXELS)
        for kind, high in KINDS.items()
    ),
    *(
        _annotated(
            f"{kind}-words",
            RATIONALES[kind],
            _rationale_of_words,
            KINDS[kind],
            WORDS,
            shape=(4, 7, 3),
        )
        for kind in ("kl", "order")
    ),
    _annotated("cosine", alignment, oracles.alignment, lambda _: 2, WANTED, even=False),
    _annotated(
        "mse",
        by_mse,
        oracles.alignment,
        lambda size: (size + LARGEST) ** 2,
        WANTED,
        degree=None,
        even=False,
    ),
]


def _distance(
    name: str, function: Any, oracle: Any, *, high: Any = lambda _: 2, **promises: Any
) -> Row:
    return Row(f"distance-{name}", function, oracle, high, sides=2, even=True, **promises)


def _ssim_over_channels(a: Any, b: Any) -> Any:
    return oracles.ssim(a.sum(1), b.sum(1))


SSIM_OF_MAPS = partial(ssim, dim=(1, 2))
DISTANCES = [
    _distance("mse", mse, oracles.mse, high=lambda size: 4 * size**2, degree=2),
    _distance("cosine", cosine, oracles.cosine, ignores_each_scale=True),
    _distance("pearson", pearson, oracles.pearson, ignores_each_scale=True),
    _distance(
        "soft-spearman",
        partial(soft_spearman, strength=3),
        partial(oracles.soft_spearman, strength=3),
        ignores_each_scale=True,
    ),
    # Variances as a difference of moments lose the digits that mean^2 / variance costs.
    _distance("ssim", ssim, _ssim_over_channels, shape=(3, 2, 9, 10), tolerance=1e-10),
    _distance("ssim-maps", SSIM_OF_MAPS, oracles.ssim, shape=(3, 8, 7), tolerance=1e-10),
    _distance("ssim-small", SSIM_OF_MAPS, oracles.ssim, shape=(3, 4, 3), tolerance=1e-10),
    _distance(
        "soft-top-3",
        SoftTopK(3, temperature=0.2),
        partial(oracles.soft_top_k_distance, k=3, temperature=0.2),
        high=lambda _: 1,
        ignores_each_scale=True,
    ),
]

every_function = pytest.mark.parametrize("row", rows([*PENALTIES, *DISTANCES]))
few = settings(max_examples=15, deadline=None, derandomize=True)


@every_function
def test_equals_its_oracle(row: Row) -> None:
    maps = row.draw()
    assert row(*maps).shape == (() if row.of_batch else (row.shape[0],))
    torch.testing.assert_close(row(*maps), row.expected(*maps), rtol=row.tolerance, atol=ROUNDING)


@every_function
def test_tuple_is_the_sum_of_its_tensors_or_joins_them(row: Row) -> None:
    first, second = row.draw(), tuple(3 * m for m in row.draw(seed=2))
    expected = row(*first) + row(*second)
    if row.joins:
        (a,), (b,) = first, second
        expected = row(torch.cat([a.flatten(1), b.flatten(1)], 1))
        assert not torch.allclose(expected, row(a) + row(b), rtol=0.1)
    found = row(*zip(first, second, strict=True))
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(row(*((m,) for m in first)), row(*first), rtol=0, atol=0)


def test_tuple_takes_a_tuple_of_annotations_and_one_option_for_all() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 2, 5)
    value = outside((a, b), annotation=(torch.ones(3, 4), torch.zeros(3, 2, 5)))
    torch.testing.assert_close(value, l2(b), rtol=ROUNDING, atol=0)
    labels = (torch.zeros(4), torch.arange(10))
    value = group_sparsity((a, b), groups=(labels[0], shared(labels[1])))
    expected = group_sparsity(a, groups=labels[0]) + l1(b)
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=0)
    # As many axes as tensors: still the axes of both.
    maps = (torch.randn(3, 4, 5), torch.randn(3, 6, 2))
    alone = [total_variation(m, dim=(1, 2)) for m in maps]
    torch.testing.assert_close(
        total_variation(maps, dim=(1, 2)), alone[0] + alone[1], rtol=ROUNDING, atol=0
    )


@every_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(row: Row, dtype: torch.dtype) -> None:
    maps = [m.to(dtype) for m in row.draw()]
    value = row(*maps)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, row(*(m.float() for m in maps)), rtol=0, atol=0)


@every_function
def test_gradient_is_the_derivative(row: Row) -> None:
    assert torch.autograd.gradcheck(row, tuple(m.clone().requires_grad_() for m in row.draw()))


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e-8])
def test_gradient_is_finite_at_and_near_zero(row: Row, dtype: torch.dtype, size: float) -> None:
    """Of what is compared, too, whether it is large, zero or the same."""
    first, *others = (m.to(dtype) for m in row.draw())
    small = size * first
    for other in ([m, 0 * m, small.clone()] for m in others) if others else [[None]]:
        for compared in other:
            maps = [m.clone().requires_grad_() for m in (small, compared) if m is not None]
            value = row(*maps)
            value.sum().backward()
            assert all(bool(t.isfinite().all()) for t in (value, *(m.grad for m in maps)))


def drawn(row: Row, data: st.DataObject) -> tuple[Tensor, ...]:
    entries = arrays(np.float64, row.shape, elements=st.floats(-1e3, 1e3, allow_subnormal=False))
    return tuple(torch.as_tensor(data.draw(entries)) for _ in range(row.sides))


@every_function
@few
@given(data=st.data())
def test_stays_in_its_range(row: Row, data: st.DataObject) -> None:
    maps = drawn(row, data)
    value, high = row(*maps), row.high(max(float(m.abs().max()) for m in maps))
    # Sums can pass their limit by a few roundings; SSIM loses digits as above.
    slack = ROUNDING if row.sides == 1 else 100 * row.tolerance
    assert float(value.min()) >= row.low - slack
    assert float(value.max()) <= high + slack * max(1, abs(high))


@every_function
@pytest.mark.parametrize("factor", [0.01, 1e4, -1.0])
def test_factor_on_all_that_is_given(row: Row, factor: float) -> None:
    maps = row.draw()
    found, value = row(*(factor * m for m in maps)), row(*maps)
    if factor < 0:
        assert torch.allclose(found, value, rtol=row.tolerance) == row.even
    elif row.degree is None:
        assert not any(torch.allclose(found, factor**d * value, rtol=0.01) for d in range(3))
    else:
        # The floor of 1e-6 under the deviation changes a map of deviation 1e-2 by 5e-9.
        expected = factor**row.degree * value
        torch.testing.assert_close(found, expected, rtol=max(row.tolerance, 1e-8), atol=ROUNDING)


@every_function
def test_examples_are_independent_and_in_order(row: Row) -> None:
    index = torch.tensor([2, 0, 1])
    annotations = {
        k: v[index] if k == "annotation" and len(v) == row.shape[0] else v
        for k, v in row.annotations.items()
    }
    maps = row.draw()
    value = row.function(*(m[index] for m in maps), **annotations)
    if row.of_batch:
        expected = row.function(*(m[:3] for m in maps), **annotations)  # whatever their order
    else:
        expected = row(*maps)[index]
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=ROUNDING)


@every_function
def test_what_is_not_a_number_stays_one(row: Row) -> None:
    """A loss of NaN is seen; a value of zero would hide it."""
    maps = row.draw()
    maps[-1].view(row.shape[0], -1)[1, 0] = math.nan
    others = [False] * (row.shape[0] - 2)
    assert row(*maps).isnan().tolist() == (True if row.of_batch else [False, True, *others])


every_distance = pytest.mark.parametrize("row", rows(DISTANCES))


@every_distance
@few
@given(data=st.data())
def test_distances_are_symmetric_and_zero_of_equal_maps(row: Row, data: st.DataObject) -> None:
    (a, b), slack = drawn(row, data), 100 * row.tolerance
    torch.testing.assert_close(row(b, a), row(a, b), rtol=slack, atol=slack)
    torch.testing.assert_close(row(a, a), torch.zeros(row.shape[0]), rtol=0, atol=slack)


@every_distance
@pytest.mark.parametrize("scale", [1e-6, 0.5, 1e6])
def test_scale_of_one_side(row: Row, scale: float) -> None:
    a, b = row.draw()
    same = torch.allclose(row(scale * a, b), row(a, b), rtol=row.tolerance, atol=0)
    assert same == row.ignores_each_scale


def test_values_at_the_ends() -> None:
    constant = torch.tensor([0.0, 0.25, -3.0]).reshape(3, 1, 1, 1).expand(3, 2, 4, 5)
    assert total_variation(constant).tolist() == [0, 0, 0]
    assert total_variation(torch.randn(3, 1)).tolist() == [0, 0, 0]
    assert gini(torch.zeros(2, 5)).item() == entropy(torch.eye(8)[:1]).item() == 0
    # Sums of p equal terms: p roundings.
    assert gini(torch.eye(5)[2:3]).item() == pytest.approx(-(1 - 1 / 5), abs=1e-15)
    assert gini(torch.ones(2, 5)).item() == pytest.approx(0, abs=1e-15)
    assert entropy(torch.ones(1, 8)).item() == pytest.approx(math.log(8), rel=1e-14)
    # -(log(1 - q) (1 - q) + q log q) for q = 1e-9, to the first order.
    small = entropy(torch.tensor([[1.0, 1e-9]])).item()
    assert small == pytest.approx(1e-9 * (1 - math.log(1e-9)), rel=1e-6)
    nothing = energy_outside(-torch.rand(2, 6), annotation=torch.zeros(2, 6))
    assert nothing.tolist() == [0, 0]  # no attribution is positive
    nothing = background(torch.zeros(2, 6), annotation=torch.zeros(2, 6))
    assert nothing.tolist() == [0, 0]
    everything = torch.rand(2, 6, dtype=torch.float32)
    # All of it outside: the precision is what is left.
    assert background(everything, annotation=torch.zeros(2, 6)).tolist() == pytest.approx(
        [-math.log(torch.finfo(torch.float32).eps)] * 2, rel=1e-2
    )
    # 2e5 is beyond float16, whose largest number is 65504.
    assert l1(torch.full((1, 2000), 100.0, dtype=torch.float16)).item() == 2e5


@pytest.mark.parametrize("takes", RATIONALES.values(), ids=RATIONALES.keys())
def test_rationale_at_its_ends(takes: Any) -> None:
    """Zero where evidence is spread as the rationale is, and where there is nothing to compare."""
    mask = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(takes(-3 * mask, annotation=mask), torch.zeros(2))
    phi = torch.tensor([[1.0, -2, 4, 2], [1, 2, 3, 4]])
    assert takes(phi, annotation=0 * mask).tolist() == [0, 0]
    assert takes(0 * phi, annotation=mask).tolist() == [0, 0]
    found, padding = takes(phi, annotation=mask), torch.zeros(2, 5)
    assert found[0] > 0
    assert (found[1] > 0) == (takes is not RATIONALES["order"])
    both = (torch.cat([each, padding], 1) for each in (phi, mask))
    torch.testing.assert_close(takes(next(both), annotation=next(both)), found)
    # All of the evidence elsewhere, in float32: the logarithm of the precision at most.
    worst = takes((1 - mask).float()[:, 1:], annotation=mask.float()[:, 1:])
    assert bool(worst.isfinite().all() & (worst >= 0.75).all())  # of Huber's squares


def test_standardized_total_variation_ignores_an_offset() -> None:
    phi = torch.randn(3, 2, 4, 5)
    # The offset costs one digit.
    torch.testing.assert_close(total_variation(phi + 7), total_variation(phi), rtol=1e-10, atol=0)


# Annotations: one rule for every function that takes one.

PHI = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(5))


def _as_hint(phi: Tensor, *, annotation: Any) -> Tensor:
    return by_mse(phi, annotation=resized(phi, annotation, "finite"))


def _as_grad_cam(phi: Tensor, *, annotation: Any) -> Tensor:
    return outside(phi, annotation=resized(phi, annotation, "mask"))


SUM_SHARED = [energy_outside, *RATIONALES.values()]
TAKE_MASKS = [outside, *SUM_SHARED, background, _as_grad_cam, wrong_reason_rate]
TAKE_MAPS = [alignment, by_mse, _as_hint]
takes_annotation = pytest.mark.parametrize(
    "takes",
    [*TAKE_MASKS, *TAKE_MAPS],
    ids=["outside", "energy", *KINDS, "background", "cam", "wrr", "cos", "mse", "hint"],
)


@takes_annotation
def test_annotation_has_the_attributions_dimensions_or_shares_them(takes: Any) -> None:
    maps = _mask(4, 6, 6)
    expected = takes(PHI, annotation=maps[:, None])
    for same in (maps, maps.bool(), maps.long(), maps[:, None].float()):
        torch.testing.assert_close(takes(PHI, annotation=same), expected, rtol=0, atol=0)
    for one in (maps[0], maps[:1]):  # for all examples; the second with its channel
        found = takes(PHI, annotation=shared(one))
        torch.testing.assert_close(found, takes(PHI, annotation=maps[:1].expand(4, 6, 6)))
    full = maps[:, None].expand_as(PHI)
    if takes not in SUM_SHARED:  # which sum channels that share their annotation
        torch.testing.assert_close(takes(PHI, annotation=full), expected, rtol=ROUNDING, atol=0)
    time = torch.randn(3, 7, 2)
    if takes not in (_as_hint, _as_grad_cam):  # which are for images
        steps = _mask(3, 7, 1)
        wide = steps.expand_as(time) if takes not in SUM_SHARED else steps
        torch.testing.assert_close(takes(time, annotation=steps), takes(time, annotation=wide))


@takes_annotation
@pytest.mark.parametrize(
    ("phi", "shape"),
    [
        (PHI, (6, 6)),
        (PHI, (1, 6, 6)),
        (PHI, (1, 2, 6, 6)),
        (PHI, (2, 6, 6)),
        (PHI, (3, 6, 6)),
        (PHI, (6,)),
        (PHI, ()),
        (PHI, (4, 3, 6, 6)),
        (PHI, (5, 6, 6)),
        (torch.ones(4, 6), (6,)),
        (torch.ones(4, 4), (4,)),
        (torch.ones(4, 6, 6), (4, 6)),
        (torch.ones(4, 6, 6), (6, 6)),
    ],
)
def test_annotation_of_another_shape_is_not_guessed(
    takes: Any, phi: Tensor, shape: tuple[int, ...]
) -> None:
    expected = r"`annotation`: expected one for each of the 4 examples, .* captum_priors\.shared"
    with pytest.raises(ValueError, match=expected):
        takes(phi, annotation=torch.ones(shape))
    with pytest.raises(ValueError, match="`annotation`: expected one for each"):
        takes(phi, annotation=shared(torch.ones(4, 3, *phi.shape[1:])))


@takes_annotation
def test_annotation_is_checked_place_by_place(takes: Any) -> None:
    bad = torch.ones(4, 6, 6)
    bad[0, 3, 2] = math.nan
    with pytest.raises(ValueError, match=r"`annotation`: .*, found annotation\[0, 3, 2\] = nan\."):
        takes(PHI, annotation=bad)
    with pytest.raises(TypeError, match=r"`annotation`: expected a tensor, found list\. Use torch"):
        takes(PHI, annotation=[[1.0]])
    bad[0, 3, 2] = 1
    bad[1, 2, 3], bad[1, 2, 4] = 255, -1  # their neighbours hide them from an average
    if takes in TAKE_MASKS:
        with pytest.raises(ValueError, match=r"found annotation\[1, 2, 3\] = 255\. "):
            takes(PHI, annotation=bad)
    else:
        assert bool(takes(PHI, annotation=bad).isfinite().all())


def test_annotation_is_averaged_to_the_size_of_a_map() -> None:
    given = torch.arange(4 * 4 * 4.0).reshape(4, 4, 4) / 64
    small = torch.zeros(4, 1, 2, 2)
    expected = given.reshape(4, 2, 2, 2, 2).mean((2, 4)).unsqueeze(1)
    for each in (given, given[:, None]):
        torch.testing.assert_close(resized(small, each, "mask"), expected)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
# torch warns once in a process that its CSR layout is in beta.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_graph_of_a_sparse_adjacency_is_that_of_the_dense(layout: torch.layout) -> None:
    phi = torch.randn(5, 30).requires_grad_()
    dense = GraphLaplacian(WEIGHTS)
    sparse = GraphLaplacian(WEIGHTS.to_sparse(layout=layout))
    for a, b in zip(dense.state_dict().values(), sparse.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    (expected,) = torch.autograd.grad(dense(phi), phi)
    (found,) = torch.autograd.grad(sparse(phi), phi)
    assert torch.equal(found, expected)


def test_graph_adds_repeated_entries_and_ignores_loops() -> None:
    where = torch.tensor([[0, 1, 0, 1, 2], [1, 0, 1, 0, 2]])
    weights = torch.tensor([1.0, 1.0, 2.0, 2.0, 9.0])
    adjacency = torch.sparse_coo_tensor(where, weights, (3, 3), check_invariants=True)
    phi = torch.tensor([[1.0, -3.0, 8.0]])
    assert GraphLaplacian(adjacency)(phi).item() == 3 * (1 - 3) ** 2
    assert GraphLaplacian(torch.zeros(3, 3))(phi).item() == 0


def test_graph_travels_in_the_state_dict_and_to_another_dtype() -> None:
    phi = torch.randn(5, 30)
    graph, other = GraphLaplacian(WEIGHTS), GraphLaplacian(2 * WEIGHTS)
    assert not torch.equal(other(phi), graph(phi))
    other.load_state_dict(graph.state_dict())
    assert torch.equal(other(phi), graph(phi))
    half = GraphLaplacian(WEIGHTS).half()
    assert (half.weights.dtype, half.edges.dtype) == (torch.float16, torch.int64)
    # The weights, and nothing else, are rounded.
    expected = GraphLaplacian(WEIGHTS.half().double())(phi)
    torch.testing.assert_close(half(phi), expected, rtol=ROUNDING, atol=0)


TWO = torch.ones(2, 3)
REFUSED: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (r"one batch size, found shapes \[\(2, 3\), \(1, 3\)\]", l2, ((TWO, TWO[:1]),), {}),
    *(
        (rf"`dim`: expected which of the {n - 1} .* Pass dim", total_variation, (each,), {})
        for n, each in ((3, TWO[None]), (6, TWO[None, None, None, None]))
    ),
    *(
        (
            f"`dim`: .* 1 to 1 .*, found {re.escape(repr(dim))}",
            total_variation,
            (TWO,),
            {"dim": dim},
        )
        for dim in (0, 2, -2, (1, 1), (), "1", 1.0, True)
    ),
    *(
        (f"`groups`: expected .*, found {found}", group_sparsity, (TWO,), {"groups": groups})
        for found, groups in {
            "2 labels, 0 of them": torch.tensor([0, 1]),
            "3 labels, 3 of them not finite": TWO[0] / 0,
            "no group": [],
            r"the group \[0, 3\]\. List": [[0], [0, 3]],
            r"the group \[-1\]\. List": [[0], [-1]],
            r"the group \[\]\. List": [[0], []],
            r"the group \[0.5\]\. List": [[0], [0.5]],
            r"the group 0\. List": [[0], 0],
        }.items()
    ),
    ("or a tuple of 2 .*, found a tuple of 1", outside, ((TWO, TWO),), {"annotation": (TWO,)}),
    (r"found annotation\[0, 0\] = inf", alignment, (TWO,), {"annotation": TWO / 0}),
    *(
        (rf"symmetric .*, found {found}\. .*\(W \+", GraphLaplacian, (torch.tensor(weights),), {})
        for found, weights in {
            r"W\[0, 1\] = 1 and W\[1, 0\] = 0": [[0.0, 1.0], [0.0, 0.0]],
            r"W\[0, 1\] = 1 and W\[1, 0\] = 2": [[0.0, 1.0], [2.0, 0.0]],
            r"W\[1, 1\] = -1 and W\[1, 1\] = -1": [[0.0, 0.0], [0.0, -1.0]],
            r"W\[0, 1\] = nan and W\[1, 0\] = nan": [[0.0, math.nan], [math.nan, 0.0]],
        }.items()
    ),
]


@pytest.mark.parametrize(("text", "function", "args", "options"), REFUSED)
def test_bad_input_gives_one_clear_error(
    text: str, function: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=text):
        function(*args, **options)
