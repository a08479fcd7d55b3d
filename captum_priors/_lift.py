"""Where these functions were: they are in :mod:`captum_priors.penalties.maths`."""

from captum_priors.penalties.maths import cosine_distance, safe_norm

__all__ = ["cosine_distance", "safe_norm"]
