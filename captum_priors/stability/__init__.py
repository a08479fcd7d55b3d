"""Stable explanations: what keeps attributions from moving when predictions do not.

An explanation is a derivative, so it can move where the model is curved, whatever its predictions
do. :func:`manipulability_bound` says how far at most. To lower it: :class:`smooth_activations`,
:func:`weight_decay_groups` and :class:`HessianPenalty` (Dombrowski et al.); :class:`ATEX`, which
matches predictions alone; :class:`R2ET`, which keeps the largest gradients the largest;
:class:`ActivationSensitivity` of single neurons; and the neighbours to compare them with. All that
return a number are priors: they add up and scale, and leave no trace in the training state.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from captum_priors.stability import HessianPenalty, JacobianRegularization
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> prior = 0.01 * HessianPenalty(model, smooth=10) + 0.1 * JacobianRegularization(model)
    >>> x, y = torch.randn(4, 3), torch.randint(2, (4,))
    >>> loss = F.cross_entropy(model(x), y) + prior(x, target=y)
    >>> loss.backward()
"""

from captum_priors.stability.bound import manipulability_bound
from captum_priors.stability.distillation import ATEX, SaliencyGuided
from captum_priors.stability.gradients import (
    CurvatureRegularization,
    InputGradientRegularization,
    JacobianRegularization,
    SmoothSurface,
)
from captum_priors.stability.hessian import HessianPenalty
from captum_priors.stability.ranking import R2ET
from captum_priors.stability.robust import AttributionAlignment, RobustAttribution
from captum_priors.stability.sensitivity import ActivationSensitivity
from captum_priors.stability.smooth import smooth_activations, weight_decay_groups

__all__ = [
    "ATEX",
    "R2ET",
    "ActivationSensitivity",
    "AttributionAlignment",
    "CurvatureRegularization",
    "HessianPenalty",
    "InputGradientRegularization",
    "JacobianRegularization",
    "RobustAttribution",
    "SaliencyGuided",
    "SmoothSurface",
    "manipulability_bound",
    "smooth_activations",
    "weight_decay_groups",
]
