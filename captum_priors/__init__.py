"""Train PyTorch models on their own explanations.

An explainer says what a model looks at; this package lets you train on it. Make any supported
explainer :func:`differentiable`, or use :class:`ExpectedGradients`; put a penalty on what it says;
add the prior to the loss:

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from captum_priors import AttributionPrior, ExpectedGradients
    >>> from captum_priors.penalties import total_variation
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    >>> background = torch.randn(50, 1, 8, 8)
    >>> explainer = ExpectedGradients(model)
    >>> prior = 0.1 * AttributionPrior(explainer, total_variation, baselines=background)
    >>> loss = F.cross_entropy(model(x), y) + prior(x, target=y)
    >>> loss.backward()

Penalties live in :mod:`captum_priors.penalties`, distances in :mod:`captum_priors.distances`, the
papers' priors in :mod:`captum_priors.priors`, what keeps explanations from being manipulated in
:mod:`captum_priors.stability`, what manipulates them in :mod:`captum_priors.attacks`, scores in
:mod:`captum_priors.metrics`, the choice of a weight in :mod:`captum_priors.tuning`, and the
certificate in :mod:`captum_priors.testing`.
"""

from captum_priors._errors import NotDifferentiableError
from captum_priors._rows import shared
from captum_priors.adapters import AttnLRP, CaptumAdapter, ShapAdapter, differentiable
from captum_priors.attr import ExpectedGradients, LayerExpectedGradients
from captum_priors.integrations import check_synchronised
from captum_priors.priors import (
    AttributionPrior,
    Guarded,
    Lazy,
    Prior,
    StabilityPrior,
    Subsample,
    Term,
)

__all__ = [
    "AttnLRP",
    "AttributionPrior",
    "CaptumAdapter",
    "ExpectedGradients",
    "Guarded",
    "LayerExpectedGradients",
    "Lazy",
    "NotDifferentiableError",
    "Prior",
    "ShapAdapter",
    "StabilityPrior",
    "Subsample",
    "Term",
    "check_synchronised",
    "differentiable",
    "shared",
]

__version__ = "0.1.0"
