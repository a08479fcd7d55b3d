"""Penalties: pure, unreduced mathematics on attributions.

A penalty maps attributions ``(batch, ...)``, or a tuple of them, to one number for each example,
``(batch,)``, or to ``()`` where it is a statement about the batch (:func:`gini`,
:class:`GraphLaplacian`). A tuple gives the sum over its tensors; :func:`gini` counts the features
of all of them together. Any function of this form is a penalty too.

What a person says about the examples is a keyword argument that a prior passes on. Every
``annotation`` has one rule: an entry for each example, and the attributions' other dimensions, of
the same size or of size 1 where channels or places share it. From four dimensions on the channels
may be left out: ``(batch, height, width)`` for attributions ``(batch, channels, height, width)``.
Grad-CAM has one map for all channels, and priors on it take the mean of an annotation's channels.
What is one for the whole batch is ``captum_priors.shared(tensor)``, without the dimension of the
examples. Values are finite. In a tuple, None says nothing about that tensor, which then counts as
zero; which examples have an annotation is said to the prior, ``annotated=`` or ``missing="nan"``
(:class:`captum_priors.Term`).
"""

from captum_priors.penalties.annotation import (
    alignment,
    background,
    energy_outside,
    outside,
    rationale,
)
from captum_priors.penalties.penalties import (
    GraphLaplacian,
    entropy,
    gini,
    group_sparsity,
    l1,
    l2,
    total_variation,
)

__all__ = [
    "GraphLaplacian",
    "alignment",
    "background",
    "energy_outside",
    "entropy",
    "gini",
    "group_sparsity",
    "l1",
    "l2",
    "outside",
    "rationale",
    "total_variation",
]
