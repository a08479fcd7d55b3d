"""Norms, groups and entropy of attributions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_priors._errors import expected_found
from captum_priors._lift import flat, in_units_of_largest, lift_penalty, safe_norm


@lift_penalty
def l1(attributions: Tensor) -> Tensor:
    r"""Sum of absolute attributions, :math:`\sum_i |\phi_i|`.

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import l1
        >>> l1(torch.tensor([[1.0, -2.0]])).item()
        3.0
    """
    return flat(attributions).abs().sum(1)


@lift_penalty
def l2(attributions: Tensor) -> Tensor:
    r"""Sum of squared attributions, :math:`\sum_i \phi_i^2`.

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> import torch
        >>> from captum_priors.penalties import l2
        >>> l2(torch.tensor([[1.0, -2.0]])).item()
        5.0
    """
    return flat(attributions).square().sum(1)


@lift_penalty
def entropy(attributions: Tensor) -> Tensor:
    r"""Entropy of how the absolute attributions are shared out, in nats.

    .. math:: -\sum_i q_i \log q_i, \qquad q_i = |\phi_i| / \sum_j |\phi_j|

    From 0 (one feature has it all) to :math:`\log p` (all have the same).

    Args:
        attributions: ``(batch, ...)`` or a tuple of them.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> import math, torch
        >>> from captum_priors.penalties import entropy
        >>> math.isclose(entropy(torch.ones(1, 8)).item(), math.log(8), rel_tol=1e-6)
        True
    """
    size = in_units_of_largest(flat(attributions).abs(), 1)
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
        attributions: ``(batch, ...)``, flattened to features.
        groups: The group of each feature, an integer tensor with one entry for each; or the lists
            of feature indices of each group.

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
    rows = flat(attributions)
    if isinstance(groups, Tensor):
        labels = groups.flatten()
        if labels.numel() != rows.shape[1]:
            raise ValueError(
                expected_found(
                    "`groups`",
                    f"a label for each of the {rows.shape[1]} features",
                    f"{labels.numel()} labels",
                    "Label every feature.",
                )
            )
        members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    else:
        if any(not isinstance(g, (Tensor, list, tuple, range)) for g in groups):
            raise TypeError(
                expected_found(
                    "`groups`",
                    "a list of lists of feature indices, or an integer tensor of labels",
                    f"a {type(groups).__name__} of {type(groups[0]).__name__}",
                    "For one label for each feature pass torch.tensor(groups).",
                )
            )
        members = [torch.as_tensor(group, device=rows.device) for group in groups]
        if not members or any(
            m.numel() == 0 or m.is_floating_point() or not 0 <= m.min() <= m.max() < rows.shape[1]
            for m in members
        ):
            raise ValueError(
                expected_found(
                    "`groups`",
                    f"non-empty groups of indices below {rows.shape[1]}",
                    str(groups),
                    "List the features of each group.",
                )
            )
    norms = [m.numel() ** 0.5 * safe_norm(rows[:, m]) for m in members]
    return torch.stack(norms).sum(0)
