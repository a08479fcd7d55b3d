"""Distances between the attributions of the same inputs, differentiable in both.

A distance maps two attributions ``(batch, ...)``, or two tuples of them, to ``(batch,)``: 0 for
equal ones, and symmetric. A tuple gives the sum over its tensors.
"""

from captum_priors.distances.distances import SoftTopK, cosine, mse, pearson, soft_spearman, ssim

__all__ = ["SoftTopK", "cosine", "mse", "pearson", "soft_spearman", "ssim"]
