r"""The arithmetic of SHAP's coalition explainers, :math:`\phi = W v`, as a matrix.

Each function reads :math:`W` off the coalitions that SHAP asked for, in their order. Permutation
and Partition touch few features with each coalition, so :math:`W` is sparse throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Weights:
    """Entries of a sparse matrix from coalition values to attributions."""

    n_rows: int
    rows: list[np.ndarray] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    entries: list[np.ndarray] = field(default_factory=list)

    def add(self, rows: Any, columns: Any, entries: Any) -> None:
        """Add entries at the given places."""
        rows, columns, entries = np.broadcast_arrays(rows, columns, entries)
        self.rows.append(rows.ravel())
        self.columns.append(columns.ravel())
        self.entries.append(entries.ravel())

    def matrix(self, n_columns: int, device: torch.device) -> Tensor:
        """Return the matrix in torch."""
        if not self.rows:
            indices, entries = np.zeros((2, 0), dtype=np.int64), np.zeros(0)
        else:
            indices = np.stack([np.concatenate(self.rows), np.concatenate(self.columns)])
            entries = np.concatenate(self.entries)
        return torch.sparse_coo_tensor(
            torch.as_tensor(indices.astype(np.int64)),
            torch.as_tensor(entries.astype(float)),
            (self.n_rows, n_columns),
            check_invariants=False,
        ).to(device)


def weigh(matrix: Tensor, values: Tensor) -> Tensor:
    """Return ``W v`` for values with or without an axis of outputs."""
    product: Tensor = torch.sparse.mm(matrix, values.reshape(len(values), -1))
    return product.reshape(matrix.shape[0], *values.shape[1:])


def permutation(n_features: int, passes: Sequence[np.ndarray]) -> Weights:
    """Each pass switches features on one by one and off again; each flip is a contribution."""
    weights = Weights(n_features)
    masks = np.stack(passes)
    feature = (masks[:, 1:] ^ masks[:, :-1]).argmax(2)
    on = np.take_along_axis(masks[:, 1:], feature[..., None], 2)[..., 0]
    share = np.where(on, 1.0, -1.0) / (2 * len(passes))
    places = np.arange(masks.shape[0] * masks.shape[1]).reshape(masks.shape[:2])
    weights.add(feature, places[:, 1:], share)
    weights.add(feature, places[:, :-1], -share)
    return weights


def exact(masks: np.ndarray, varying: np.ndarray) -> Weights:
    r"""Shapley values: :math:`\pm 1/(M\binom{M-1}{s})` for coalitions with and without."""
    size, share = _sizes(masks, varying)
    weights = Weights(masks.shape[1])
    columns = np.arange(len(masks))
    for feature in varying:
        inside = masks[:, feature]
        # share[s] for s others besides the feature
        entries = np.where(inside, share[size - 1], -share[np.minimum(size, len(share) - 1)])
        weights.add(feature, columns, entries)
    return weights


def exact_interactions(masks: np.ndarray, varying: np.ndarray) -> Weights:
    """Shapley-Taylor interactions, flattened ``(features * features, coalitions)``.

    The first ``len(varying)`` columns of the masks are read, whichever features vary: SHAP does so,
    and its numbers are kept. The diagonal holds the main effects.
    """
    n_features, n_varying = masks.shape[1], len(varying)
    size, share = _sizes(masks, varying)
    weights, columns = Weights(n_features**2), np.arange(len(masks))
    # share[s - 2] for both in the coalition, -share[s - 1] for one, share[s] for none; an index of
    # -1 is SHAP's, too, and never met with two features that vary.
    padded = np.concatenate([share, np.zeros(2)])
    for j in range(n_varying):
        for k in range(j + 1, n_varying):
            together = masks[:, j].astype(int) + masks[:, k]
            entries = np.where(together == 1, -1.0, 1.0) * padded[size - together]
            weights.add(j * n_features + k, columns, entries)
            weights.add(k * n_features + j, columns, entries)
    return weights


def _sizes(masks: np.ndarray, varying: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = len(varying)
    share = np.array([1 / (n * comb(n - 1, s)) for s in range(n)])
    return masks[:, varying].sum(1), share


def exact_partition(n_features: int, places: Sequence[Sequence[np.ndarray]]) -> Weights:
    """Owen values over all coalitions of a binary tree: mean difference of on and off."""
    weights = Weights(n_features)
    for feature, (off, on) in enumerate(places):
        weights.add(feature, on, 1 / len(on))
        weights.add(feature, off, -1 / len(off))
    return weights


def winter(
    names: Sequence[Any],
    numbers: dict[bytes, int],
    permutations: Sequence[tuple[Any, np.ndarray, float]],
) -> Weights:
    """Winter values: pairs of coalitions without and with a feature, each with its weight."""
    weights = Weights(len(names))
    place = {name: i for i, name in enumerate(names)}
    signs = (-1.0, 1.0) * (len(permutations) // 2)
    weights.add(
        [place[feature] for feature, _, _ in permutations],
        [numbers[mask.tobytes()] for _, mask, _ in permutations],
        [sign * weight for sign, (_, _, weight) in zip(signs, permutations, strict=True)],
    )
    return weights


@dataclass(frozen=True)
class _Node:
    """A cluster of the tree in one context: the numbers of the coalitions without and with it."""

    cluster: int
    without: int
    with_it: int
    weight: float


def partition(
    masks: np.ndarray, clustering: np.ndarray, mask_matrix: Any, fixed_context: int | None
) -> Weights:
    r"""Owen values of the tree as far as SHAP expanded it.

    Coalitions 0 and 1 are the empty and the full one; each pair that follows adds the left and the
    right child of one cluster to its context :math:`S`, so the context is what the pair shares and
    the cluster what it adds. What is not expanded shares its contribution among its features.
    """
    n_features = masks.shape[1]
    of_cluster: dict[int, list[tuple[Any, float]]] = {}

    def credit(cluster: int, number: int, weight: float) -> None:
        of_cluster.setdefault(cluster, []).append((number, weight))

    def key(without: np.ndarray, with_it: np.ndarray) -> bytes:
        return np.packbits(without).tobytes() + np.packbits(with_it).tobytes()

    root = 2 * n_features - 2
    waiting = {key(masks[0], masks[1]): _Node(root, 0, 1, 1.0)}
    for left_on in range(2, len(masks), 2):
        right_on = left_on + 1
        a, b = masks[left_on], masks[right_on]
        none, both = a & b, a | b
        node = waiting.pop(key(none, both))
        left, right = (int(child) for child in clustering[node.cluster - n_features, :2])
        weight = node.weight / 2 if fixed_context is None else node.weight
        if fixed_context is not None:  # the interaction stays with the cluster
            sign = node.weight if fixed_context == 0 else -node.weight
            for number, factor in (
                (node.with_it, sign),
                (left_on, -sign),
                (right_on, -sign),
                (node.without, sign),
            ):
                credit(node.cluster, number, factor)
        if fixed_context in (None, 0):
            waiting[key(none, a)] = _Node(left, node.without, left_on, weight)
            waiting[key(none, b)] = _Node(right, node.without, right_on, weight)
        if fixed_context in (None, 1):
            waiting[key(b, both)] = _Node(left, right_on, node.with_it, weight)
            waiting[key(a, both)] = _Node(right, left_on, node.with_it, weight)
    for node in waiting.values():
        credit(node.cluster, node.with_it, node.weight)
        credit(node.cluster, node.without, -node.weight)
    return _spread(n_features, of_cluster, mask_matrix)


def _spread(
    n_features: int, of_cluster: dict[int, list[tuple[int, float]]], mask_matrix: Any
) -> Weights:
    """Share what a cluster has among its features, a column of all clusters at a time."""
    clusters = sorted(of_cluster)
    columns, entries, rows = [], [], []
    for i, cluster in enumerate(clusters):
        for number, weight in of_cluster[cluster]:
            rows.append(i)
            columns.append(number)
            entries.append(weight)
    inside = mask_matrix[clusters].astype(float)
    size = np.asarray(inside.sum(1)).ravel()
    shares = inside.multiply(1 / size[:, None]).tocsr().T
    scipy_sparse = type(shares)
    n_columns = max(columns) + 1
    received = scipy_sparse((entries, (rows, columns)), shape=(len(clusters), n_columns))
    product = (shares @ received).tocoo()
    weights = Weights(n_features)
    weights.add(product.row, product.col, product.data)
    return weights
