"""Push importance out of the top features (Ghorbani, Abid, Zou 2019)."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._checks import check_count
from captum_priors._errors import expected_found
from captum_priors._importance import importance_rows
from captum_priors.attacks._base import AttributionAttack, Maps


class TopKAttack(AttributionAttack):
    r"""Make the ``k`` most important features of the clean map unimportant.

    .. math:: J = -\sum_{i \in \mathrm{top}_k(x)} |\phi_i(\tilde x)| \Big/ \sum_i |\phi_i(\tilde x)|

    (Ghorbani, Abid, Zou 2019, top-k attack.) Points are ranked by how many of the ``k`` features
    stay among the top ``k``, which is the share that
    :func:`captum_priors.metrics.top_k_intersection` reports, and only then by :math:`J`.

    Args:
        explainer: As in :class:`AttributionAttack`, like all options.
        k: Number of features, fewer than there are.
        options: Options of :class:`AttributionAttack`.

    Raises:
        ValueError: If ``k`` is not positive, or not smaller than the number of features.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors.attacks import TopKAttack
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(),
        ...                             torch.nn.Linear(9, 2))
        >>> x = torch.rand(4, 6)
        >>> attacked = TopKAttack(Saliency(model), 2, radius=0.1, step_num=5).perturb(x)
        >>> torch.equal(model(attacked).argmax(1), model(x).argmax(1))
        True
        >>> bool(((attacked - x).abs() <= 0.1 + 1e-6).all())
        True
    """

    def __init__(self, explainer: Any, k: int, **options: Any) -> None:
        check_count("k", k)
        super().__init__(explainer, **options)
        self.k = k

    def prepare(self, attributions: Maps) -> Tensor:
        """Return a mask of the top features: ``(batch, features)``."""
        rows = importance_rows(attributions, self.spatial_dims)
        if rows.shape[1] <= self.k:
            raise ValueError(
                expected_found(
                    "`k`", f"fewer than the {rows.shape[1]} features", str(self.k), "Lower k."
                )
            )
        return torch.zeros_like(rows).scatter(1, rows.topk(self.k, dim=1).indices, 1.0)

    def objective(self, attributions: Maps, clean: Tensor) -> Tensor:
        """Minus the share of the clean map's top features."""
        rows = importance_rows(attributions, self.spatial_dims)
        total = rows.sum(1)
        return -(rows * clean).sum(1) / torch.where(total > 0, total, 1)

    def score(self, attributions: Maps, clean: Tensor) -> Tensor:
        """Minus the number of top features that stay, and less than one for their share."""
        rows = importance_rows(attributions, self.spatial_dims)
        stay = clean.gather(1, rows.topk(self.k, dim=1).indices).sum(1)
        return -stay + 0.5 * self.objective(attributions, clean)
