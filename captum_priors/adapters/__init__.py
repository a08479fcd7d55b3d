"""Explainers of other packages, made differentiable."""

from captum_priors.adapters._captum_adapter import CaptumAdapter
from captum_priors.adapters._differentiable import differentiable

__all__ = ["CaptumAdapter", "differentiable"]
