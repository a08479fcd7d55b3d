"""Priors: scalars to add to a training loss.

:class:`AttributionPrior` penalises what an explainer says, :class:`StabilityPrior` how far it moves
when the input does. They add up and scale (``0.1 * a + b``); :class:`Lazy` and :class:`Subsample`
make them cheaper, and :class:`Guarded` keeps what has gone wrong out of the loss. The papers'
priors stand here under their own names.
"""

from captum_priors.priors._attribution_prior import AttributionPrior
from captum_priors.priors._base import Prior
from captum_priors.priors._guarded import Guarded
from captum_priors.priors._lazy import Lazy
from captum_priors.priors._named import (
    HINT,
    EnergyPrior,
    GraphPrior,
    PixelPrior,
    RightForTheRightReasons,
    RRRGradCAM,
    SparsityPrior,
)
from captum_priors.priors._stability_prior import StabilityPrior
from captum_priors.priors._subsample import Subsample

__all__ = [
    "HINT",
    "AttributionPrior",
    "EnergyPrior",
    "GraphPrior",
    "Guarded",
    "Lazy",
    "PixelPrior",
    "Prior",
    "RRRGradCAM",
    "RightForTheRightReasons",
    "SparsityPrior",
    "StabilityPrior",
    "Subsample",
]
