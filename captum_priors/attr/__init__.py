"""Attribution methods of this package, with Captum's conventions."""

from captum_priors.attr.expected_gradients import ExpectedGradients
from captum_priors.attr.layers import LayerExpectedGradients

__all__ = ["ExpectedGradients", "LayerExpectedGradients"]
