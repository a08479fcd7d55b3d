"""Move a map as far as possible, in any distance."""

from typing import Any

from torch import Tensor

from captum_priors._errors import expected_found
from captum_priors._types import Distance
from captum_priors.attacks._base import AttributionAttack, Maps


class DistanceAttack(AttributionAttack):
    r"""Move the map as far from the clean one as possible.

    .. math:: J = d\left(\Phi(\tilde x), \Phi(x)\right)

    The inner maximum of adversarial stability training: with the same distance in
    :class:`captum_priors.StabilityPrior` this is the robust attribution of Ivankay et al. 2021
    (FAR), there with one minus the correlation.

    Args:
        explainer: As in :class:`AttributionAttack`, like all options.
        distance: One of :mod:`captum_priors.distances`, or ``distance(attributions, other)`` of
            shape ``(batch,)``.
        options: Options of :class:`AttributionAttack`.

    Raises:
        TypeError: If ``distance`` is not a function.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_priors.attacks import DistanceAttack
        >>> from captum_priors.distances import mse
        >>> model, x = torch.nn.Linear(3, 1), torch.zeros(2, 3)
        >>> attack = DistanceAttack(InputXGradient(model), mse, radius=0.5, keep_prediction=False)
        >>> torch.allclose(attack.perturb(x).abs(), torch.full((2, 3), 0.5))
        True
    """

    def __init__(self, explainer: Any, distance: Distance, **options: Any) -> None:
        if not callable(distance):
            raise TypeError(
                expected_found(
                    "`distance`",
                    "a function of two attributions",
                    type(distance).__name__,
                    "Pass one of captum_priors.distances.",
                )
            )
        super().__init__(explainer, **options)
        self.distance = distance

    def objective(self, attributions: Maps, clean: Maps) -> Tensor:
        """Distance to the clean map."""
        if len(attributions) == 1:
            return self.distance(attributions[0], clean[0])
        return self.distance(attributions, clean)
