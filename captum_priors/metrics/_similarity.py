"""How alike two attributions of the same inputs are."""

import numpy as np
import torch
from torch import Tensor

from captum_priors import distances
from captum_priors._checks import check_count
from captum_priors._errors import expected_found
from captum_priors._extras import extra
from captum_priors._importance import check_spatial_dims, importance_rows
from captum_priors._types import TensorOrTuple
from captum_priors.metrics._rows import joined, nan_where, pair_of


def top_k_intersection(
    attributions: TensorOrTuple, other: TensorOrTuple, k: int, *, spatial_dims: int | None = None
) -> Tensor:
    r"""Share of the ``k`` most important features that two maps have in common.

    .. math:: \frac{|\mathrm{top}_k(a) \cap \mathrm{top}_k(b)|}{k}

    (Ghorbani, Abid, Zou 2019.) Importance is the absolute attribution, summed over
    channels. Features that tie for the last of the ``k`` places share them in equal parts, and
    the intersection sums the smaller part of each feature: 1 for a map and itself, and ``k / p``
    for a constant map and any other.

    Args:
        attributions: ``(batch, ...)``, or a tuple whose features count together.
        other: The same shapes.
        k: Number of features, at most as many as there are.
        spatial_dims: How many of the last dimensions are spatial; by default, dimension 1 counts
            as channels from four dimensions on.

    Returns:
        Shape ``(batch,)``, in [0, 1]; NaN where a map is not finite.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If shapes differ or ``k`` does not fit.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import top_k_intersection
        >>> a, b = torch.tensor([[9.0, -8.0, 1.0, 0.0]]), torch.tensor([[9.0, 1.0, 8.0, 0.0]])
        >>> top_k_intersection(a, b, 2).item()
        0.5
    """
    check_count("k", k)
    check_spatial_dims(spatial_dims)
    left, right = (importance_rows(t, spatial_dims) for t in pair_of(attributions, other))
    if k > left.shape[1]:
        raise ValueError(
            expected_found("`k`", f"at most the {left.shape[1]} features", str(k), "Lower k.")
        )
    shared = torch.minimum(_membership(left, k), _membership(right, k)).sum(1) / k
    return nan_where(shared, left, right)


def _membership(size: Tensor, k: int) -> Tensor:
    """Part of each feature in the top k: 1, 0, or an equal share among those that tie."""
    last = size.topk(k, dim=1).values[:, -1:]
    above, tied = size > last, size == last
    above, tied = above.to(size.dtype), tied.to(size.dtype)
    places = k - above.sum(1, keepdim=True)
    return above + tied * places / tied.sum(1, keepdim=True).clamp_min(1)


def spearman(attributions: TensorOrTuple, other: TensorOrTuple) -> Tensor:
    r"""Spearman's rank correlation of the entries of two maps; ties have their mean rank.

    Args:
        attributions: ``(batch, ...)``, or a tuple whose features count together.
        other: The same shapes.

    Returns:
        Shape ``(batch,)``, in [-1, 1]. Of two constant maps, 1; of one constant map and another, 0;
        NaN where a map is not finite.

    Raises:
        ImportError: Without the extra ``metrics`` (scipy).

    Example:
        >>> import torch
        >>> from captum_priors.metrics import spearman
        >>> a = torch.rand(2, 9)
        >>> torch.allclose(spearman(a, a.exp()), torch.ones(2))
        True
    """
    stats = extra("scipy.stats", "metrics")
    rows = [joined(t) for t in pair_of(attributions, other)]
    ranks = [
        torch.from_numpy(np.asarray(stats.rankdata(r.cpu().numpy(), axis=1), np.float64))
        for r in rows
    ]
    values = 1 - distances.pearson(*ranks)
    return nan_where(values.to(rows[0]), *rows)


def kendall(attributions: TensorOrTuple, other: TensorOrTuple) -> Tensor:
    r"""Kendall's rank correlation :math:`\tau_b` of the entries of two maps, corrected for ties.

    Args:
        attributions: ``(batch, ...)``, or a tuple whose features count together.
        other: The same shapes.

    Returns:
        Shape ``(batch,)``, in [-1, 1]. Of two constant maps, 1; of one constant map and another, 0;
        NaN where a map is not finite.

    Raises:
        ImportError: Without the extra ``metrics`` (scipy).

    Example:
        >>> import torch
        >>> from captum_priors.metrics import kendall
        >>> kendall(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]])).item()
        0.3333333432674408
    """
    stats = extra("scipy.stats", "metrics")
    rows = [joined(t) for t in pair_of(attributions, other)]
    values = []
    for a, b in zip(rows[0].cpu().numpy(), rows[1].cpu().numpy(), strict=True):
        constant = [bool((r == r[0]).all()) for r in (a, b)]
        if any(constant):
            values.append(float(all(constant)))
        else:
            values.append(float(stats.kendalltau(a, b).statistic))
    return nan_where(torch.tensor(values).to(rows[0]), *rows)


def pearson(attributions: TensorOrTuple, other: TensorOrTuple) -> Tensor:
    r"""Correlation of the entries of two maps: one minus :func:`captum_priors.distances.pearson`.

    Args:
        attributions: ``(batch, ...)``, or a tuple whose features count together.
        other: The same shapes.

    Returns:
        Shape ``(batch,)``, in [-1, 1]. Of two constant maps, 1; of one constant map and another, 0;
        NaN where a map is not finite.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import pearson
        >>> a = torch.rand(2, 9)
        >>> torch.allclose(pearson(a, -2 * a + 1), -torch.ones(2))
        True
    """
    left, right = (joined(t) for t in pair_of(attributions, other))
    return nan_where(1 - distances.pearson(left, right), left, right)


def ssim(attributions: TensorOrTuple, other: TensorOrTuple) -> Tensor:
    r"""Structural similarity of two maps: one minus :func:`captum_priors.distances.ssim`.

    Args:
        attributions: ``(batch, channels, height, width)`` or ``(batch, height, width)``, or a tuple
            of them, whose similarities are averaged.
        other: The same shapes.

    Returns:
        Shape ``(batch,)``, in [-1, 1]; 1 for two zero maps; NaN where a map is not finite.

    Raises:
        ValueError: If the attributions are not maps.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import ssim
        >>> a = torch.rand(2, 1, 9, 9)
        >>> torch.allclose(ssim(a, a), torch.ones(2))
        True
    """
    left, right = pair_of(attributions, other)
    each = [1 - distances.ssim(a, b) for a, b in zip(left, right, strict=True)]
    return nan_where(torch.stack(each).mean(0), *left, *right)


def mse(attributions: TensorOrTuple, other: TensorOrTuple) -> Tensor:
    r"""Mean squared difference of the entries of two maps.

    Args:
        attributions: ``(batch, ...)``, or a tuple whose features count together.
        other: The same shapes.

    Returns:
        Shape ``(batch,)``; NaN where a map is not finite.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import mse
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    left, right = (joined(t) for t in pair_of(attributions, other))
    return nan_where(distances.mse(left, right), left, right)
