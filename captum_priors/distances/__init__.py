"""Distances between the attributions of the same inputs, differentiable in both.

A distance maps two attributions ``(batch, ...)``, or two tuples of them, to ``(batch,)``: 0 for
equal ones, and symmetric.
"""

from captum_priors.distances._pointwise import cosine, mse, pearson
from captum_priors.distances._soft_top_k import SoftTopK
from captum_priors.distances._ssim import ssim

__all__ = ["SoftTopK", "cosine", "mse", "pearson", "ssim"]
