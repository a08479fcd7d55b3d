"""Scores of one attribution map, or of two of the same inputs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_priors import distances
from captum_priors._checks import count
from captum_priors._extras import extra
from captum_priors._types import TensorOrTuple
from captum_priors.penalties.annotation import fitted
from captum_priors.penalties.maths import (
    Axes,
    gini_coefficient,
    importance_rows,
    joined,
    pair_of,
    tensors_of,
)

Tensors = tuple[Tensor, ...]


def _compares(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Score checked maps without a graph; NaN where one of an example's is not finite."""

    @functools.wraps(function)
    @torch.no_grad()
    def wrapper(
        attributions: TensorOrTuple, other: TensorOrTuple, *args: Any, **options: Any
    ) -> Tensor:
        left, right = pair_of(attributions, other)
        return _nan_where(function(left, right, *args, **options), *left, *right)

    return wrapper


def _nan_where(values: Tensor, *maps: Tensor) -> Tensor:
    """Put NaN where a map that was scored holds a number that is not finite."""
    bad = torch.stack([~each.isfinite().flatten(1).all(1) for each in maps]).any(0)
    return values.masked_fill(bad, float("nan"))


@_compares
def top_k_intersection(
    attributions: Tensors, other: Tensors, k: int, *, dim: Axes = None
) -> Tensor:
    r"""Share of the ``k`` most important features that two maps have in common.

    .. math:: \frac{|\mathrm{top}_k(a) \cap \mathrm{top}_k(b)|}{k}

    (Ghorbani, Abid, Zou 2019.) Importance is the absolute attribution, summed over channels.
    Features that tie for the last of the ``k`` places share them in equal parts, and the
    intersection sums the smaller part of each feature: 1 for a map and itself, and ``k / p`` for a
    constant map and any other.

    Args:
        attributions: ``(batch, features)``, ``(batch, channels, height, width)``, ``(batch,
            channels, depth, height, width)``, or any other shape with ``dim``; or a tuple of them.
        other: The same shapes.
        k: Number of features, at most as many as there are.
        dim: The axes that are places; all others but the first are channels. As in
            :func:`captum_priors.penalties.total_variation`.

    Returns:
        Shape ``(batch,)``, in [0, 1]; NaN where a map is not finite.

    Raises:
        ValueError: If shapes differ, or ``k`` or ``dim`` does not fit.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import top_k_intersection
        >>> a, b = torch.tensor([[9.0, -8.0, 1.0, 0.0]]), torch.tensor([[9.0, 1.0, 8.0, 0.0]])
        >>> top_k_intersection(a, b, 2).item()
        0.5
    """
    left, right = (importance_rows(maps, dim) for maps in (attributions, other))
    count("k", k, most=left.shape[1])
    return torch.minimum(_membership(left, k), _membership(right, k)).sum(1) / k


def _membership(size: Tensor, k: int) -> Tensor:
    """Part of each feature in the top k: 1, 0, or an equal share among those that tie."""
    last = size.topk(k, dim=1).values[:, -1:]
    above, tied = (size > last).to(size.dtype), (size == last).to(size.dtype)
    places = k - above.sum(1, keepdim=True)
    return above + tied * places / tied.sum(1, keepdim=True).clamp_min(1)


@_compares
def spearman(attributions: Tensors, other: Tensors) -> Tensor:
    """Spearman's rank correlation of all entries: :func:`pearson` of ranks; ties have their mean.

    Returns:
        Shape ``(batch,)``, in [-1, 1]; as in :func:`pearson` for constant maps and NaN.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import spearman
        >>> a = torch.rand(2, 9)
        >>> torch.allclose(spearman(a, a.exp()), torch.ones(2))
        True
    """
    left, right = joined(attributions), joined(other)
    return (1 - distances.pearson(_ranks(left), _ranks(right))).to(left.dtype)


def _ranks(rows: Tensor) -> Tensor:
    """Twice the mean rank, less one, which correlations ignore: entries below and up to each."""
    rows = rows.contiguous()
    ordered = rows.sort(1).values
    below, up_to = (torch.searchsorted(ordered, rows, right=r) for r in (False, True))
    return (below + up_to).double()


@_compares
def kendall(attributions: Tensors, other: Tensors) -> Tensor:
    r"""Kendall's rank correlation :math:`\tau_b` of all entries, corrected for ties.

    .. math:: \tau_b = \frac{C - D}{\sqrt{(C + D + T_a)(C + D + T_b)}}

    with :math:`C` concordant and :math:`D` discordant pairs, and :math:`T` pairs that tie in one
    map alone. It is SciPy's, on the CPU (extra ``metrics``).

    Returns:
        Shape ``(batch,)``, in [-1, 1]; as in :func:`pearson` for constant maps and NaN.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import kendall
        >>> kendall(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 2.0]])).item()
        0.3333333432674408
    """
    tau = extra("scipy.stats", "metrics").kendalltau
    left, right = joined(attributions), joined(other)
    pairs = zip(left.cpu().numpy(), right.cpu().numpy(), strict=True)
    values = left.new_tensor([tau(a, b).statistic for a, b in pairs])
    are_constant = [(rows == rows[:, :1]).all(1) for rows in (left, right)]
    return torch.where(values.isnan(), torch.logical_and(*are_constant), values)


@_compares
def pearson(attributions: Tensors, other: Tensors) -> Tensor:
    """Correlation of all entries of two maps: 1 - :func:`captum_priors.distances.pearson`.

    The entries of a tuple are joined into one map; the distance sums over its tensors.

    Returns:
        Shape ``(batch,)``, in [-1, 1]; 1 for two constant maps, 0 for one, NaN where a map is not
        finite.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import pearson
        >>> a = torch.rand(2, 9)
        >>> torch.allclose(pearson(a, -2 * a + 1), -torch.ones(2))
        True
    """
    return 1 - distances.pearson(joined(attributions), joined(other))


@_compares
def ssim(attributions: Tensors, other: Tensors, *, dim: Axes = None, window: int = 7) -> Tensor:
    """Structural similarity, 1 - :func:`captum_priors.distances.ssim`; the mean over a tuple.

    Returns:
        Shape ``(batch,)``, in [-1, 1]; NaN where a map is not finite.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import ssim
        >>> a = torch.rand(2, 1, 9, 9)
        >>> torch.allclose(ssim(a, a), torch.ones(2))
        True
    """
    total = distances.ssim(attributions, other, dim=dim, window=window)
    return 1 - total / len(attributions)


@_compares
def mse(attributions: Tensors, other: Tensors) -> Tensor:
    """Mean squared difference of all entries: :func:`captum_priors.distances.mse`.

    The entries of a tuple are joined into one map; the distance sums over its tensors.

    Returns:
        Shape ``(batch,)``; NaN where a map is not finite.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import mse
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    return distances.mse(joined(attributions), joined(other))


@torch.no_grad()
def gini(attributions: TensorOrTuple) -> Tensor:
    """Gini coefficient of the absolute attributions of each example: how sparse its map is.

    :func:`captum_priors.penalties.gini` of one example, with the other sign.

    Returns:
        Shape ``(batch,)``, from 0 (all features matter equally, or none does) to
        ``1 - 1 / features``; NaN where a map is not finite.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import gini
        >>> gini(torch.eye(4)).tolist()
        [0.75, 0.75, 0.75, 0.75]
    """
    rows = joined(tensors_of(attributions))
    return _nan_where(gini_coefficient(rows.abs()), rows)


@torch.no_grad()
def wrong_reason_rate(
    attributions: TensorOrTuple, annotation: TensorOrTuple, *, threshold: float | None = None
) -> Tensor:
    r"""Share of the forbidden features that the map says matter.

    .. math:: \frac{|\{i : M_i = 0,\; h_i > t\}|}{|\{i : M_i = 0\}|}, \qquad
        h = \frac{\phi^+ - \min \phi^+}{\max \phi^+ - \min \phi^+}

    (Friedrich et al. 2023, WR: positive attributions of each example scaled to [0, 1] and compared
    with their mean over the data set.)

    Args:
        attributions: ``(batch, ...)``, or a tuple whose features count together.
        annotation: :math:`M`, 1 where evidence may lie and 0 where it may not, with the
            attributions' dimensions (:mod:`captum_priors.penalties` has the rule); or a tuple.
        threshold: :math:`t`; by default the mean of :math:`h` over the given examples.

    Returns:
        Shape ``(batch,)``, in [0, 1]; 0 for a map without positive attributions; NaN where nothing
        is forbidden or the map is not finite.

    Raises:
        ValueError: If the annotation does not fit or is not made of zeros and ones.

    Example:
        >>> import torch
        >>> from captum_priors.metrics import wrong_reason_rate
        >>> phi, allowed = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[1, 0, 0]])
        >>> wrong_reason_rate(phi, allowed).item()
        0.5
    """
    tensors = tensors_of(attributions)
    masks = annotation if isinstance(annotation, tuple) else (annotation,)
    pairs = zip(tensors, masks, strict=True)
    forbidden = joined(tuple(fitted(t, m, "binary").expand_as(t) for t, m in pairs)) == 0
    rows = joined(tensors)
    positive = rows.clamp_min(0)
    low, high = positive.aminmax(dim=1, keepdim=True)
    # A constant positive map says that everything matters: it is one throughout, not 0 / 0.
    constant = (high > 0).to(rows.dtype)
    scaled = torch.where(high > low, (positive - low) / (high - low), constant)
    finite = rows.isfinite().all(1)
    level = float(scaled[finite].mean()) if threshold is None else threshold
    # What all maps share lies at the mean, and matters if anything does.
    on = (scaled > level) | ((scaled == 1) & (level >= 1))
    # 0 / 0 where nothing is forbidden is NaN.
    return _nan_where((on & forbidden).sum(1) / forbidden.sum(1).to(rows.dtype), rows)
