"""Move the centre of mass of a map (Ghorbani, Abid, Zou 2019)."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._importance import importance
from captum_priors.attacks._base import AttributionAttack, Maps


class MassCenterAttack(AttributionAttack):
    r"""Move the centre of mass of the map as far as possible.

    .. math:: J = \lVert C(\tilde x) - C(x) \rVert^2, \qquad
        C(x) = \sum_p p\, |\phi_p(x)| \Big/ \sum_p |\phi_p(x)|

    with positions :math:`p` counted in pixels (Ghorbani, Abid, Zou 2019, mass-centre attack, whose
    norm is not squared: the square has a gradient where the centre has not moved yet). Tensors of
    a tuple count together.

    Args:
        explainer: As in :class:`AttributionAttack`, like all options.
        options: Options of :class:`AttributionAttack`.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_priors.attacks import MassCenterAttack
        >>> model, x = torch.nn.Linear(5, 1), torch.ones(1, 5)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> attack = MassCenterAttack(InputXGradient(model), radius=0.5, step_num=20, seed=0)
        >>> position = torch.arange(5.0)
        >>> moved = attack.perturb(x)  # the centre of five equal attributions is 2
        >>> abs((position * moved).sum() / moved.sum() - 2).item() > 0.5
        True
    """

    def __init__(self, explainer: Any, **options: Any) -> None:
        super().__init__(explainer, **options)

    def prepare(self, attributions: Maps) -> tuple[Tensor, ...]:
        """Return the centre of each tensor: ``(batch, spatial dimensions)``."""
        return tuple(self._centre(a) for a in attributions)

    def objective(self, attributions: Maps, clean: tuple[Tensor, ...]) -> Tensor:
        """Squared distance of the centres."""
        moved = self.prepare(attributions)
        return torch.stack(
            [(m - c).square().sum(1) for m, c in zip(moved, clean, strict=True)]
        ).sum(0)

    def _centre(self, attributions: Tensor) -> Tensor:
        mass = importance(attributions, self.spatial_dims)
        total = mass.flatten(1).sum(1)
        total = torch.where(total > 0, total, 1)
        coordinates = []
        for dim in range(1, mass.dim()):
            others = tuple(d for d in range(1, mass.dim()) if d != dim)
            along = mass.sum(others) if others else mass
            position = torch.arange(along.shape[1], dtype=mass.dtype, device=mass.device)
            coordinates.append((along * position).sum(1) / total)
        return torch.stack(coordinates, 1)
