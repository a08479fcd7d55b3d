"""Stable explanations: what keeps attributions from moving when predictions do not."""

from captum_priors.stability._smooth_activations import smooth_activations

__all__ = ["smooth_activations"]
