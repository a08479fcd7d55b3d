"""Every penalty against its oracle and the laws that it states."""

import math
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

from captum_priors.penalties import (
    GraphLaplacian,
    alignment,
    energy_outside,
    entropy,
    gini,
    group_sparsity,
    l1,
    l2,
    outside,
    total_variation,
)
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
    """A penalty, what it is checked against, and what range it promises."""

    name: str
    penalty: Callable[..., Tensor]
    oracle: Callable[..., Any]
    shape: tuple[int, ...] = (4, 2, 3, 5)
    annotations: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] | None = None
    """The annotations as the oracle takes them, where that differs."""
    low: float = 0.0
    high: float = math.inf
    of_batch: bool = False
    tolerance: float = ROUNDING

    def draw(self, *, seed: int = 1) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))

    def __call__(self, attributions: Any) -> Tensor:
        return self.penalty(attributions, **self.annotations)

    def expected(self, attributions: Tensor) -> Tensor:
        known = self.annotations if self.known is None else self.known
        plain = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in known.items()}
        return torch.as_tensor(self.oracle(attributions.numpy(), **plain))


def _tv(name: str, shape: tuple[int, ...], n: int, **options: Any) -> Row:
    return Row(
        f"total_variation-{name}",
        partial(total_variation, **options),
        oracles.total_variation,
        shape,
        known={"spatial_dims": n, "standardize": options.get("standardize", True)},
        # The floor of 1e-6 under the deviation s changes the result by 5e-13 / s^2.
        tolerance=1e-10,
    )


def _annotated(
    name: str, penalty: Any, oracle: Any, given: Tensor, full: Tensor, **more: Any
) -> Row:
    key = "given" if penalty is alignment else "mask"
    options = {k: more.pop(k) for k in ("measure",) if k in more}
    return Row(
        name,
        partial(penalty, **options),
        oracle,
        annotations={"annotation": given},
        known={key: full, **options},
        **more,
    )


WEIGHTS = _weights(30)
LABELS = torch.as_tensor(_table.permutation(np.arange(30) % 4))
GROUPS = [[i for i, label in enumerate(LABELS.tolist()) if label == g] for g in range(4)]
OVERLAPPING = [[0, 1, 2], [2, 3], [29]]
PIXELS, MAPS, SHARED = _mask(4, 2, 3, 5), _mask(4, 3, 5), _mask(3, 5)
WANTED = torch.as_tensor(_table.standard_normal((4, 2, 3, 5)))


def _energy_over_channels(attributions: Any, *, mask: Any) -> Any:
    """Channels are summed first where the annotation has none."""
    return oracles.energy_outside(attributions.sum(1), mask)


PENALTIES = [
    _tv("1d", (4, 9), 1),
    _tv("1d-channels", (4, 3, 9), 1),
    _tv("2d", (4, 2, 3, 5), 2),
    _tv("2d-maps", (4, 3, 5), 2, spatial_dims=2),
    _tv("2d-as-1d", (4, 2, 3, 5), 1, spatial_dims=1),
    _tv("3d", (3, 2, 3, 4, 2), 3),
    _tv("1d-raw", (4, 9), 1, standardize=False),
    _tv("2d-raw", (4, 2, 3, 5), 2, standardize=False),
    _tv("3d-raw", (3, 2, 3, 4, 2), 3, standardize=False),
    Row("gini", gini, oracles.gini, low=-(1 - 1 / 30), high=0.0, of_batch=True),
    Row(
        "graph",
        GraphLaplacian(WEIGHTS),
        oracles.graph_laplacian,
        known={"adjacency": WEIGHTS},
        of_batch=True,
    ),
    Row("l1", l1, oracles.l1),
    Row("l2", l2, oracles.l2),
    Row("entropy", entropy, oracles.entropy, high=math.log(30)),
    Row(
        "groups-of-labels",
        group_sparsity,
        oracles.group_sparsity,
        annotations={"groups": LABELS},
        known={"groups": GROUPS},
    ),
    Row(
        "groups-of-indices",
        group_sparsity,
        oracles.group_sparsity,
        annotations={"groups": OVERLAPPING},
    ),
    _annotated("outside", outside, oracles.outside, PIXELS, PIXELS),
    _annotated("outside-maps", outside, oracles.outside, MAPS, MAPS[:, None]),
    _annotated("outside-shared", outside, oracles.outside, SHARED, SHARED),
    _annotated("outside-bool", outside, oracles.outside, MAPS.bool(), MAPS[:, None]),
    _annotated("energy", energy_outside, oracles.energy_outside, PIXELS, PIXELS, high=1.0),
    _annotated("energy-maps", energy_outside, _energy_over_channels, MAPS, MAPS, high=1.0),
    _annotated(
        "energy-one-channel", energy_outside, _energy_over_channels, MAPS[:, None], MAPS, high=1.0
    ),
    _annotated("energy-shared", energy_outside, _energy_over_channels, SHARED, SHARED, high=1.0),
    _annotated("cosine", alignment, oracles.alignment, WANTED, WANTED, high=2.0, measure="cosine"),
    _annotated("mse", alignment, oracles.alignment, WANTED, WANTED, measure="mse"),
    _annotated("mse-maps", alignment, oracles.alignment, MAPS, MAPS[:, None], measure="mse"),
]

every_penalty = pytest.mark.parametrize("row", rows(PENALTIES))
few = settings(max_examples=15, deadline=None, derandomize=True)


@every_penalty
def test_equals_its_oracle(row: Row) -> None:
    attributions = row.draw()
    expected = row.expected(attributions)
    assert row(attributions).shape == (() if row.of_batch else (row.shape[0],))
    torch.testing.assert_close(row(attributions), expected, rtol=row.tolerance, atol=ROUNDING)


@every_penalty
def test_tuple_is_the_sum_of_its_tensors(row: Row) -> None:
    a, b = row.draw(), row.draw(seed=2)
    torch.testing.assert_close(row((a, b)), row(a) + row(b), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(row((a,)), row(a), rtol=0, atol=0)


def test_tuple_takes_a_tuple_of_annotations() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 2, 5)
    m, n = torch.ones(3, 4), torch.zeros(3, 5)
    value = outside((a, b), annotation=(m, n))
    torch.testing.assert_close(value, l2(b), rtol=ROUNDING, atol=0)


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(row: Row, dtype: torch.dtype) -> None:
    attributions = row.draw().to(dtype)
    value = row(attributions)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, row(attributions.float()), rtol=0, atol=0)


def test_half_precision_sums_do_not_overflow() -> None:
    # 2e5 is beyond float16, whose largest number is 65504.
    assert l1(torch.full((1, 2000), 100.0, dtype=torch.float16)).item() == 2e5


@every_penalty
def test_gradient_is_the_derivative(row: Row) -> None:
    attributions = row.draw().requires_grad_()
    assert torch.autograd.gradcheck(row, attributions)


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e-8])
def test_gradient_is_finite_at_and_near_zero(row: Row, dtype: torch.dtype, size: float) -> None:
    attributions = (size * row.draw()).to(dtype).requires_grad_()
    value = row(attributions)
    value.sum().backward()
    assert value.isfinite().all()
    assert attributions.grad is not None
    assert attributions.grad.isfinite().all()


@every_penalty
@few
@given(data=st.data())
def test_stays_in_its_range(row: Row, data: st.DataObject) -> None:
    entries = st.floats(-1e3, 1e3, allow_subnormal=False)
    value = row(torch.as_tensor(data.draw(arrays(np.float64, row.shape, elements=entries))))
    # Normalised sums can pass their limit by a few roundings.
    assert float(value.min()) >= row.low - ROUNDING
    assert float(value.max()) <= row.high + ROUNDING


@every_penalty
@few
@given(order=st.permutations(range(3)))
def test_permuted_batch_permutes_the_result(row: Row, order: list[int]) -> None:
    index = torch.tensor(order)
    annotations = {
        k: v[:3][index] if isinstance(v, Tensor) and v.shape[0] == row.shape[0] else v
        for k, v in row.annotations.items()
    }
    small = {
        k: v[:3] if isinstance(v, Tensor) and v.shape[0] == row.shape[0] else v
        for k, v in row.annotations.items()
    }
    attributions = row.draw()[:3]
    before = row.penalty(attributions, **small)
    after = row.penalty(attributions[index], **annotations)
    expected = before if row.of_batch else before[index]
    torch.testing.assert_close(after, expected, rtol=ROUNDING, atol=ROUNDING)


@few
@given(scale=st.floats(1e-2, 1e4), sign=st.sampled_from([-1.0, 1.0]))
def test_standardized_total_variation_ignores_scale_and_offset(scale: float, sign: float) -> None:
    phi = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(3))
    moved = sign * scale * phi + 7.0
    # The floor of 1e-6 under the deviation changes a map of deviation 1e-2 by 5e-9.
    torch.testing.assert_close(total_variation(moved), total_variation(phi), rtol=1e-8, atol=0)


@few
@given(scale=st.floats(0, 1e4))
def test_raw_total_variation_is_homogeneous(scale: float) -> None:
    phi = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(3))
    raw = partial(total_variation, standardize=False)
    torch.testing.assert_close(raw(scale * phi), scale * raw(phi), rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("standardize", [True, False])
def test_total_variation_of_constant_maps_is_zero(standardize: bool) -> None:
    phi = torch.tensor([0.0, 0.25, -3.0]).reshape(3, 1, 1, 1).expand(3, 2, 4, 5)
    assert total_variation(phi, standardize=standardize).tolist() == [0, 0, 0]


def test_total_variation_of_one_position_is_zero() -> None:
    assert total_variation(torch.randn(3, 1)).tolist() == [0, 0, 0]


@few
@given(scale=st.floats(1e-100, 1e100))
def test_gini_ignores_scale(scale: float) -> None:
    phi = torch.randn(3, 7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(gini(scale * phi), gini(phi), rtol=ROUNDING, atol=0)


def test_gini_reaches_both_ends() -> None:
    # The fractions 1/p and the mean of ones are off by one rounding each.
    assert gini(torch.eye(5)[2:3]).item() == pytest.approx(-(1 - 1 / 5), abs=1e-15)
    assert gini(torch.ones(2, 5)).item() == pytest.approx(0, abs=1e-15)
    assert gini(torch.zeros(2, 5)).item() == 0


def test_entropy_reaches_both_ends() -> None:
    # log(p) by its sum of p equal terms: p roundings.
    assert entropy(torch.ones(1, 8)).item() == pytest.approx(math.log(8), rel=1e-14)
    assert entropy(torch.eye(8)[:1]).item() == 0


def test_energy_is_zero_where_no_attribution_is_positive() -> None:
    phi = -torch.rand(2, 6)
    assert energy_outside(phi, annotation=torch.zeros(2, 6)).tolist() == [0, 0]


def test_alignment_by_cosine_ignores_scale_and_by_mse_does_not() -> None:
    phi = torch.randn(2, 6)
    # torch's cosine of equal directions is off by a few roundings.
    torch.testing.assert_close(
        alignment(phi, annotation=3 * phi), torch.zeros(2), rtol=0, atol=ROUNDING
    )
    by_mse = alignment(phi, annotation=3 * phi, measure="mse")
    torch.testing.assert_close(by_mse, 4 * phi.square().mean(1), rtol=ROUNDING, atol=0)


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


def test_graph_is_the_quadratic_form_of_the_laplacian() -> None:
    phi = torch.randn(5, 30)
    laplacian = torch.diag(WEIGHTS.sum(1)) - WEIGHTS
    importance = phi.abs().mean(0)
    expected = importance @ laplacian @ importance
    # The quadratic form cancels terms some ten times larger than its value.
    torch.testing.assert_close(GraphLaplacian(WEIGHTS)(phi), expected, rtol=1e-11, atol=0)


def test_graph_travels_in_the_state_dict() -> None:
    phi = torch.randn(5, 30)
    graph, other = GraphLaplacian(WEIGHTS), GraphLaplacian(2 * WEIGHTS)
    assert not torch.equal(other(phi), graph(phi))
    other.load_state_dict(graph.state_dict())
    assert torch.equal(other(phi), graph(phi))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_graph_moves_to_another_dtype(dtype: torch.dtype) -> None:
    phi = torch.randn(5, 30)
    graph = GraphLaplacian(WEIGHTS).to(dtype)
    assert graph.weights.dtype == dtype
    assert graph.edges.dtype == torch.int64
    # The weights, and nothing else, are rounded to the dtype.
    expected = GraphLaplacian(WEIGHTS.to(dtype).double())(phi)
    torch.testing.assert_close(graph(phi), expected, rtol=ROUNDING, atol=0)


BAD_CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "no-tensor",
        lambda: l1([[1.0]]),
        TypeError,
        r"`attributions`: expected a tensor or a tuple of tensors, found list\. Pass what",
    ),
    (
        "no-features",
        lambda: l2(torch.ones(3)),
        ValueError,
        r"`attributions`: expected shape \(batch, \.\.\.\).*, found shape \(3,\)\. Unsqueeze",
    ),
    (
        "tv-4d",
        lambda: total_variation(torch.ones(1, 1, 2, 2, 2, 2)),
        ValueError,
        r"`attributions`: expected one to three spatial dimensions after the batch, found shape "
        r"\(1, 1, 2, 2, 2, 2\) .*Pass spatial_dims",
    ),
    (
        "tv-no-dims",
        lambda: total_variation(torch.ones(2, 3), spatial_dims=0),
        ValueError,
        r"`spatial_dims`: expected an integer of at least 1, found 0",
    ),
    (
        "tv-too-many-dims",
        lambda: total_variation(torch.ones(2, 3), spatial_dims=2),
        ValueError,
        r"expected one to three spatial dimensions.*found.*spatial_dims=2",
    ),
    (
        "groups-short",
        lambda: group_sparsity(torch.ones(2, 3), groups=torch.tensor([0, 1])),
        ValueError,
        r"`groups`: expected a label for each of the 3 features, found 2 labels\. Label",
    ),
    (
        "groups-out-of-range",
        lambda: group_sparsity(torch.ones(2, 3), groups=[[0, 3]]),
        ValueError,
        r"`groups`: expected non-empty groups of indices below 3, found \[\[0, 3\]\]\. List",
    ),
    (
        "groups-negative",
        lambda: group_sparsity(torch.ones(2, 3), groups=[[-1]]),
        ValueError,
        r"`groups`: expected non-empty groups of indices below 3, found \[\[-1\]\]\.",
    ),
    (
        "group-empty",
        lambda: group_sparsity(torch.ones(2, 3), groups=[[0], []]),
        ValueError,
        r"`groups`: expected non-empty groups",
    ),
    (
        "no-groups",
        lambda: group_sparsity(torch.ones(2, 3), groups=[]),
        ValueError,
        r"`groups`: expected .*, found",
    ),
    (
        "annotation-shape",
        lambda: outside(torch.ones(2, 3), annotation=torch.ones(2, 4)),
        ValueError,
        r"`annotation`: expected a shape that broadcasts to the attributions' \(2, 3\), found "
        r"\(2, 4\)\. Add the missing",
    ),
    (
        "annotation-type",
        lambda: outside(torch.ones(2, 3), annotation=[[1, 0, 0]] * 2),
        TypeError,
        r"`annotation`: expected a tensor, found list\. Use torch\.as_tensor",
    ),
    (
        "annotation-count",
        lambda: outside((torch.ones(2, 3), torch.ones(2, 3)), annotation=(torch.ones(2, 3),)),
        ValueError,
        r"`annotation`: expected .*, found",
    ),
    (
        "annotation-negative",
        lambda: outside(torch.ones(2, 3), annotation=-torch.ones(2, 3)),
        ValueError,
        r"`annotation`: expected values from 0 .* to 1 .*, found values from -1 to -1\. Scale",
    ),
    (
        "annotation-255",
        lambda: energy_outside(torch.ones(2, 3), annotation=torch.tensor([[0, 0, 255]])),
        ValueError,
        r"`annotation`: expected values from 0 .* to 1 .*, found values from 0 to 255",
    ),
    (
        "annotation-nan",
        lambda: outside(torch.ones(2, 3), annotation=torch.full((2, 3), math.nan)),
        ValueError,
        r"`annotation`: expected values from 0",
    ),
    (
        "energy-shape",
        lambda: energy_outside(torch.ones(2, 1, 3, 3), annotation=torch.ones(2, 4, 4)),
        ValueError,
        r"`annotation`: expected a shape that broadcasts .*, found",
    ),
    (
        "energy-type",
        lambda: energy_outside(torch.ones(2, 1, 3, 3), annotation=[[1.0]]),
        TypeError,
        r"`annotation`: expected a tensor, found list",
    ),
    (
        "energy-row",
        lambda: energy_outside(torch.ones(2, 1, 3, 3), annotation=torch.ones(4)),
        ValueError,
        r"`annotation`: expected a shape that broadcasts .*, found",
    ),
    (
        "alignment-measure",
        lambda: alignment(torch.ones(2, 3), annotation=torch.ones(2, 3), measure="dot"),
        ValueError,
        r"`measure`: expected one of 'cosine', 'mse', found 'dot'\. Pass one",
    ),
    (
        "alignment-shape",
        lambda: alignment(torch.ones(2, 3), annotation=torch.ones(5)),
        ValueError,
        r"`annotation`: expected a shape that broadcasts .*, found \(5,\)",
    ),
    (
        "graph-type",
        lambda: GraphLaplacian([[0.0]]),
        ValueError,
        r"`adjacency`: expected a square matrix \(features, features\), found list\. Pass the",
    ),
    (
        "graph-shape",
        lambda: GraphLaplacian(torch.ones(2, 3)),
        ValueError,
        r"`adjacency`: expected a square matrix .*, found \(2, 3\)",
    ),
    (
        "graph-one-way",
        lambda: GraphLaplacian(torch.tensor([[0.0, 1.0], [0.0, 0.0]])),
        ValueError,
        r"`adjacency`: expected a symmetric matrix without negative or NaN weights, found .*\(W \+",
    ),
    (
        "graph-unequal",
        lambda: GraphLaplacian(torch.tensor([[0.0, 1.0], [2.0, 0.0]])),
        ValueError,
        r"`adjacency`: expected a symmetric matrix",
    ),
    (
        "graph-negative",
        lambda: GraphLaplacian(-torch.ones(2, 2)),
        ValueError,
        r"`adjacency`: expected a symmetric matrix without negative",
    ),
    (
        "graph-nan",
        lambda: GraphLaplacian(torch.full((2, 2), math.nan)),
        ValueError,
        r"`adjacency`: expected a symmetric matrix without negative or NaN",
    ),
    (
        "graph-features",
        lambda: GraphLaplacian(torch.ones(2, 2))(torch.ones(4, 3)),
        ValueError,
        r"`attributions`: expected 2 features as in the adjacency, found 3\. Slice",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD_CALLS]
)
def test_bad_input_gives_one_clear_error(
    call: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()
