"""Attribution methods of our own, in Captum's conventions.

:class:`ExpectedGradients` stands where :class:`captum.attr.GradientShap` stands, and can be trained
on; :class:`LayerExpectedGradients` does the same for embeddings and latent features.
"""

from captum_priors.attr._expected_gradients import ExpectedGradients
from captum_priors.attr._layer_expected_gradients import LayerExpectedGradients

__all__ = ["ExpectedGradients", "LayerExpectedGradients"]
