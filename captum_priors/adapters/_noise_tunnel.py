"""Averaging over noise, around what keeps its own graph."""

import copy
from typing import Any, ClassVar

from captum.attr import NoiseTunnel

from captum_priors.adapters._mode_adapters import ModeAdapter
from captum_priors.adapters._relevance import RELEVANCE_ADAPTERS


class DifferentiableNoiseTunnel(ModeAdapter, NoiseTunnel):
    """:class:`captum.attr.NoiseTunnel` with its graph.

    LRP needs a mode of its own, so it is its adapter that is averaged. It keeps the user's rules,
    which stock LRP takes away after the first internal batch.
    """

    _stock = NoiseTunnel
    _marks_modules: ClassVar[bool] = True
    attribution_method: Any

    def _run_stock(self, **given: Any) -> Any:
        worker, method = copy.copy(self), self.attribution_method
        adapter = RELEVANCE_ADAPTERS.get(type(method))
        if adapter is not None:
            worker.attribution_method = adapter.of(method, "double_backprop")
        return super(DifferentiableNoiseTunnel, worker)._run_stock(**given)


NOISE_TUNNEL_ADAPTERS: dict[type, type[ModeAdapter]] = {NoiseTunnel: DifferentiableNoiseTunnel}
