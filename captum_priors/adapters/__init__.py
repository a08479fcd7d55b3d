"""Explainers of other packages, made differentiable."""

from captum_priors.adapters._captum_adapter import CaptumAdapter
from captum_priors.adapters._differentiable import differentiable
from captum_priors.adapters.shap import ShapAdapter

__all__ = ["CaptumAdapter", "ShapAdapter", "differentiable"]
