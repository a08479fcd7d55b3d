"""Permuting the features of a layer, with a target."""

import copy
from typing import Any

from captum.attr import LayerFeaturePermutation
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._rows import Rows
from captum_priors.adapters._mode_adapters import ModeAdapter


class DifferentiableLayerFeaturePermutation(ModeAdapter, LayerFeaturePermutation):
    """:class:`captum.attr.LayerFeaturePermutation` with its graph, and with its target.

    Captum selects the target twice, of the outputs and of what it has selected, and fails. Here it
    is selected within the forward function.
    """

    _stock = LayerFeaturePermutation
    forward_func: Any

    def _run_stock(self, **given: Any) -> Any:
        target = given.pop("target", None)
        worker = copy.copy(self)
        if target is not None:
            n_rows = as_tuple(given["inputs"])[0].shape[0]

            def selected(*inputs: Any) -> Tensor:
                return Rows(self.forward_func, target, (), n_rows)(inputs)

            worker.forward_func = selected
        return super(DifferentiableLayerFeaturePermutation, worker)._run_stock(**given)


PERMUTATION_ADAPTERS: dict[type, type[ModeAdapter]] = {
    LayerFeaturePermutation: DifferentiableLayerFeaturePermutation
}
