"""Explainers of other packages, made differentiable."""

from captum_priors.adapters import (  # noqa: F401  # each adds its adapters to the table
    gradients,
    language,
    methods,
    relevance,
    rules,
    surrogates,
)
from captum_priors.adapters.captum import CaptumAdapter
from captum_priors.adapters.differentiable import differentiable
from captum_priors.adapters.relevance import AttnLRP
from captum_priors.adapters.shap import ShapAdapter

__all__ = ["AttnLRP", "CaptumAdapter", "ShapAdapter", "differentiable"]
