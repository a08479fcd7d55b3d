"""Priors: scalars to add to a training loss.

:class:`AttributionPrior` penalises what an explainer says, :class:`StabilityPrior` how far it moves
when the input does. They add up and scale (``0.1 * a + b``); :class:`Lazy` and :class:`Subsample`
make them cheaper, and :class:`Guarded` keeps what has gone wrong out of the loss. The papers'
priors stand here under their own names.
"""

from captum_priors.priors.agreement import AgreementPrior
from captum_priors.priors.attribution import AttributionPrior
from captum_priors.priors.base import Call, Prior, Term
from captum_priors.priors.concept import ConceptPrior
from captum_priors.priors.erasure import Comprehensiveness, Sufficiency
from captum_priors.priors.named import (
    HINT,
    EnergyPrior,
    GraphPrior,
    PixelPrior,
    RightForTheRightReasons,
    RRRGradCAM,
    SparsityPrior,
)
from captum_priors.priors.right_reasons import RobustRightReasons
from captum_priors.priors.stability import StabilityPrior
from captum_priors.priors.wrappers import Guarded, Lazy, Subsample

__all__ = [
    "HINT",
    "AgreementPrior",
    "AttributionPrior",
    "Call",
    "Comprehensiveness",
    "ConceptPrior",
    "EnergyPrior",
    "GraphPrior",
    "Guarded",
    "Lazy",
    "PixelPrior",
    "Prior",
    "RRRGradCAM",
    "RightForTheRightReasons",
    "RobustRightReasons",
    "SparsityPrior",
    "StabilityPrior",
    "Subsample",
    "Sufficiency",
    "Term",
]
