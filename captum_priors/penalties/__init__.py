"""Penalties: pure, unreduced mathematics on attributions.

A penalty maps attributions ``(batch, ...)``, or a tuple of them, to one number for each example,
``(batch,)``, or to ``()`` where it is a statement about the batch (:func:`gini`,
:class:`GraphLaplacian`). What a person says about an example is a keyword argument
(``annotation=...``) that a prior passes on. Any function of this form is a penalty too.
"""

from captum_priors.penalties._annotated import alignment, energy_outside, outside
from captum_priors.penalties._gini import gini
from captum_priors.penalties._graph_laplacian import GraphLaplacian
from captum_priors.penalties._norms import entropy, group_sparsity, l1, l2
from captum_priors.penalties._total_variation import total_variation

__all__ = [
    "GraphLaplacian",
    "alignment",
    "energy_outside",
    "entropy",
    "gini",
    "group_sparsity",
    "l1",
    "l2",
    "outside",
    "total_variation",
]
