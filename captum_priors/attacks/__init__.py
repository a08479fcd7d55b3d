"""Attacks on explanations: small changes of the input that move the map and keep the prediction.

Each is a :class:`captum.robust.Perturbation`, so it is also what
:class:`captum_priors.StabilityPrior` trains against. :class:`ManipulationAttack` aims at a given
map, :class:`TopKAttack` at the most important features, :class:`MassCenterAttack` at where the
importance lies, :class:`DistanceAttack` at any distance; :class:`RandomAttack` is the control.
:class:`AttributionAttack` is what they share, for attacks of your own.
"""

from captum_priors.attacks._base import AttributionAttack
from captum_priors.attacks._distance import DistanceAttack
from captum_priors.attacks._manipulation import ManipulationAttack
from captum_priors.attacks._mass_center import MassCenterAttack
from captum_priors.attacks._random import RandomAttack
from captum_priors.attacks._top_k import TopKAttack

__all__ = [
    "AttributionAttack",
    "DistanceAttack",
    "ManipulationAttack",
    "MassCenterAttack",
    "RandomAttack",
    "TopKAttack",
]
