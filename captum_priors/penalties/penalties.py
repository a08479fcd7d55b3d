"""The penalties, each a formula and its code."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._errors import refusal
from captum_priors._rows import shared
from captum_priors._types import TensorOrTuple
from captum_priors.penalties.maths import (
    Axes,
    axes_of,
    gini_coefficient,
    in_units_of_largest,
    join_penalty,
    lift_penalty,
    safe_norm,
    sum_channels,
    tensors_of,
)


@lift_penalty
def l1(attributions: Tensor) -> Tensor:
    r"""Sum of absolute attributions, :math:`\sum_i |\phi_i|`, of each example: ``(batch,)``.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import l1
        >>> l1(torch.tensor([[1.0, -2.0]])).item()
        3.0
    """
    return attributions.flatten(1).abs().sum(1)


@lift_penalty
def l2(attributions: Tensor) -> Tensor:
    r"""Sum of squared attributions, :math:`\sum_i \phi_i^2`, of each example: ``(batch,)``.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import l2
        >>> l2(torch.tensor([[1.0, -2.0]])).item()
        5.0
    """
    return attributions.flatten(1).square().sum(1)


@lift_penalty
def total_variation(attributions: Tensor, *, standardize: bool = True, dim: Axes = None) -> Tensor:
    r"""Sum of absolute differences between neighbouring attributions.

    .. math:: \Omega(\phi) = \sum_{i,j} |\phi_{i+1,j} - \phi_{i,j}| + |\phi_{i,j+1} - \phi_{i,j}|

    (Erion et al. 2021, pixel attribution prior; the anisotropic form.) Channels are summed first.
    Each map is divided by its standard deviation, without which the penalty can be made small by
    shrinking the attributions.

    Args:
        attributions: ``(batch, length)``, ``(batch, channels, height, width)``, ``(batch, channels,
            depth, height, width)``, or any other shape with ``dim``; or a tuple of them.
        standardize: Divide each map by its standard deviation.
        dim: The axes along which attributions are neighbours; all others but the first are
            channels. Three dimensions need it: ``(1, 2)`` for ``(batch, height, width)``, 2 for
            ``(batch, channels, length)``, 1 for ``(batch, length, channels)``.

    Returns:
        Shape ``(batch,)``.

    Raises:
        ValueError: If ``dim`` does not fit the shape, or is needed.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import total_variation
        >>> ramp = torch.arange(5.0).repeat(2, 1)
        >>> torch.equal(total_variation(ramp, standardize=False), torch.full((2,), 4.0))
        True
        >>> phi = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(total_variation(phi), total_variation(100 * phi), rtol=1e-4)
        True
    """
    axes = axes_of(attributions, dim)
    maps = sum_channels(attributions, axes)
    places = tuple(range(1, maps.dim()))
    if standardize:
        maps = in_units_of_largest(maps, places)
        variance = maps.var(dim=places, keepdim=True, unbiased=False)
        # Maps that vary by rounding alone are constant, not to be blown up to unit scale.
        maps = maps / (variance + (4 * torch.finfo(maps.dtype).eps) ** 2).sqrt()
    total = maps.new_zeros(len(maps))
    for place in places:
        total = total + maps.diff(dim=place).abs().flatten(1).sum(1)
    return total


@join_penalty
def gini(attributions: Tensor) -> Tensor:
    r"""Minus the Gini coefficient of the mean absolute attributions of a batch.

    .. math:: -G(\bar\phi) = -\frac{\sum_i (2i - p - 1)\, \bar\phi_{(i)}}{p \sum_i \bar\phi_i},
        \qquad \bar\phi_i = \tfrac1n \sum_\ell |\phi_i^\ell|

    with :math:`\bar\phi_{(1)} \le \dots \le \bar\phi_{(p)}`: between :math:`-(1 - 1/p)` (one
    feature matters) and 0 (all matter equally). A statement about the batch, in
    :math:`O(p \log p)`. Source: Erion et al. 2021, sparse attribution prior, whose printed formula
    is twice this; their code uses :math:`-G`.

    Args:
        attributions: ``(batch, ...)``, every entry a feature, or a tuple of them, whose features
            count together.

    Returns:
        Shape ``()``.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import gini
        >>> one_matters = torch.eye(4)[:1].repeat(6, 1)
        >>> gini(one_matters).item(), abs(gini(torch.ones(6, 4)).item())
        (-0.75, 0.0)
    """
    return -gini_coefficient(attributions.abs().mean(0, keepdim=True)).squeeze(0)


@lift_penalty
def entropy(attributions: Tensor) -> Tensor:
    r"""Entropy of how the absolute attributions are shared out, in nats.

    .. math:: -\sum_i q_i \log q_i, \qquad q_i = |\phi_i| / \sum_j |\phi_j|

    from 0 (one feature has it all) to :math:`\log p` (all have the same), of each example:
    ``(batch,)``.

    Example:
        >>> import math, torch
        >>> from captum_priors.penalties import entropy
        >>> math.isclose(entropy(torch.ones(1, 8)).item(), math.log(8), rel_tol=1e-6)
        True
    """
    size = in_units_of_largest(attributions.flatten(1).abs(), 1)
    shares = size / size.sum(1, keepdim=True).clamp_min(1)
    # q log q has an infinite slope at 0: shares below rounding contribute nothing either way.
    safe = shares.clamp_min(torch.finfo(size.dtype).eps)
    return -(shares * safe.log()).sum(1)


@lift_penalty
def group_sparsity(attributions: Tensor, *, groups: Sequence[Sequence[int]] | Tensor) -> Tensor:
    r"""Sum over groups of the norm of each group's attributions, as in the group lasso.

    .. math:: \sum_{\mathcal G} \sqrt{|\mathcal G|}\, \lVert \phi_{\mathcal G} \rVert_2

    (Yuan and Lin 2006, applied to attributions: whole groups go to zero.)

    Args:
        attributions: ``(batch, ...)``, flattened to features, or a tuple of them.
        groups: The group of each feature, an integer tensor with one entry for each; or the list of
            the feature indices of each group. A tuple has one of these for each tensor.

    Returns:
        Shape ``(batch,)``.

    Raises:
        ValueError: If the groups do not fit the features.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import group_sparsity
        >>> phi = torch.tensor([[3.0, 4.0, 0.0]])
        >>> groups = torch.tensor([0, 0, 1])
        >>> torch.allclose(group_sparsity(phi, groups=groups), torch.tensor([5 * 2**0.5]))
        True
    """
    rows = attributions.flatten(1)
    norms = [m.numel() ** 0.5 * safe_norm(rows[:, m]) for m in _members(groups, rows)]
    return torch.stack(norms).sum(0)


def _members(groups: Any, rows: Tensor) -> list[Tensor]:
    """Indices of the features of each group."""
    n = rows.shape[1]
    groups = groups.value if isinstance(groups, shared) else groups
    if isinstance(groups, Tensor):
        labels, known = groups.flatten(), int(groups.isfinite().sum())
        if labels.numel() != n or known != n:
            raise refusal(
                ValueError,
                "`groups`",
                f"a label for each of the {n} features",
                f"{labels.numel()} labels, {labels.numel() - known} of them not finite",
                "Label every feature.",
            )
        return [(labels == label).nonzero().flatten() for label in labels.unique()]
    members = [torch.as_tensor(group, device=rows.device) for group in groups]
    wrong = [
        m.tolist()
        for m in members
        if m.dim() != 1 or m.is_floating_point() or m.min() < 0 or m.max() >= n
    ]
    if wrong or not members:
        raise refusal(
            ValueError,
            "`groups`",
            f"an integer tensor of labels, or lists of feature indices below {n}",
            f"the group {wrong[0]}" if wrong else "no group",
            "List the features of each group; one label for each feature is torch.tensor(groups).",
        )
    return members


class GraphLaplacian(nn.Module):
    r"""Penalise features that a graph joins and whose mean absolute attributions differ.

    .. math:: \Omega = \sum_{i<j} W_{ij} (\bar\phi_i - \bar\phi_j)^2 = \bar\phi^\top L \bar\phi,
        \qquad \bar\phi_i = \tfrac1n \sum_\ell |\phi_i^\ell|, \quad L = D - W

    (Erion et al. 2021, graph attribution prior; the sum runs over unordered pairs.) The adjacency
    is a buffer: it moves with ``.to(device)`` and is kept in the ``state_dict``.

    Args:
        adjacency: Symmetric non-negative weights ``(features, features)``, dense or sparse.

    Raises:
        ValueError: If the adjacency is not a square symmetric non-negative matrix.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import GraphLaplacian
        >>> path = torch.tensor([[0., 1., 0.], [1., 0., 1.], [0., 1., 0.]])
        >>> phi = torch.tensor([[1., -3., 4.]])
        >>> GraphLaplacian(path)(phi).item()  # (1 - 3)^2 + (3 - 4)^2
        5.0
    """

    edges: Tensor
    weights: Tensor

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        is_tensor = isinstance(adjacency, Tensor)
        if not is_tensor or adjacency.dim() != 2 or adjacency.shape[0] != adjacency.shape[1]:
            raise refusal(
                ValueError,
                "`adjacency`",
                "a square matrix (features, features)",
                str(tuple(adjacency.shape)) if is_tensor else type(adjacency).__name__,
                "Pass the weight of the edge between every two features.",
            )
        weights = adjacency.to_sparse_coo().coalesce()
        _check_weights(weights)
        self.n_features = adjacency.shape[0]
        once = weights.indices()[0] < weights.indices()[1]
        self.register_buffer("edges", weights.indices()[:, once])
        self.register_buffer("weights", weights.values()[once])

    def forward(self, attributions: TensorOrTuple) -> Tensor:
        """Return the penalty of a batch ``(batch, features)``, or its sum over a tuple: ``()``."""
        return torch.stack([self._penalty(t) for t in tensors_of(attributions)]).sum(0)

    def _penalty(self, attributions: Tensor) -> Tensor:
        importance = attributions.flatten(1).abs().mean(0)
        if importance.numel() != self.n_features:
            raise refusal(
                ValueError,
                "`attributions`",
                f"{self.n_features} features as in the adjacency",
                str(importance.numel()),
                "Slice the attributions to the features of the graph.",
            )
        here, there = importance[self.edges]
        return torch.sum(self.weights.to(importance.dtype) * (here - there).square())

    def extra_repr(self) -> str:
        """Sizes for ``repr``."""
        return f"features={self.n_features}, edges={self.weights.numel()}"


def _check_weights(weights: Tensor) -> None:
    """Require weights that are not negative and the same in both directions."""
    gap = (weights - weights.t()).coalesce()
    rounding = 1e-5 * weights.values().abs().max() if weights.values().numel() else 0
    odd = torch.cat(
        [  # negated so that NaN counts
            weights.indices()[:, ~(weights.values() >= 0)],
            gap.indices()[:, ~(gap.values().abs() <= rounding)],
        ],
        1,
    )
    if odd.numel():
        i, j = odd[:, 0].tolist()
        here, there = weights[i, j].item(), weights[j, i].item()
        raise refusal(
            ValueError,
            "`adjacency`",
            "a symmetric matrix without negative or NaN weights",
            f"W[{i}, {j}] = {here:g} and W[{j}, {i}] = {there:g}",
            "Symmetrise it, for example with (W + W.T) / 2.",
        )
