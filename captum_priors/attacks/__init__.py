"""Attacks on explanations: small changes of the input that move the map and keep the prediction.

Each is a :class:`captum.robust.Perturbation`, so it is also what
:class:`captum_priors.StabilityPrior` trains against. :class:`ManipulationAttack` aims at a given
map, :class:`TopKAttack` at the most important features, :class:`MassCenterAttack` at where the
importance lies, :class:`DistanceAttack` at any distance; :class:`RandomAttack` is the control.
:class:`AttributionAttack` is what they share, for attacks of your own.
"""

from captum_priors.attacks.attack import AttributionAttack
from captum_priors.attacks.objectives import (
    DistanceAttack,
    ManipulationAttack,
    MassCenterAttack,
    RandomAttack,
    TopKAttack,
)

__all__ = [
    "AttributionAttack",
    "DistanceAttack",
    "ManipulationAttack",
    "MassCenterAttack",
    "RandomAttack",
    "TopKAttack",
]
