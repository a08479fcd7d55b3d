"""Run a forward pass again, later, under the conditions that held the first time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from captum_priors._engine._modules import submodules_of
from captum_priors._engine._random import GlobalRandomState
from captum_priors._engine._smooth import Smoothing
from captum_priors._engine._still import ModuleState, claimed, held_modules

_AUTOCAST_DEVICES = ("cpu", "cuda")


class Conditions:
    """What decides the value of a forward pass besides its arguments and parameters.

    The backward pass of ``recompute`` and ``finite_difference`` runs the model again when the prior
    that held it still is long over; without this it would see another network.
    """

    def __init__(self, forward_func: Any) -> None:
        self.modules = submodules_of(forward_func)
        self._states: list[tuple[nn.Module, ModuleState]] = []
        self._random = GlobalRandomState.now()
        self._stochastic = False
        self._smoothing = Smoothing.now()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _AUTOCAST_DEVICES
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()

    def settle(self) -> bool:
        """Record what the forward pass showed, once it is over; say whether it drew numbers."""
        modules = {*self.modules, *held_modules()}
        self._states = [(module, ModuleState.of(module)) for module in modules]
        self._stochastic = self._random.moved()
        return self._stochastic

    @contextmanager
    def again(self) -> Iterator[None]:
        """Re-create the conditions, with gradients recorded."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self._stochastic:
                # Without taking turns: the backward pass of a GPU runs in a thread of its own, on
                # behalf of a thread that may be holding the turn.
                stack.callback(GlobalRandomState.now().restore)
                self._random.restore()
            stack.enter_context(claimed(self._states))
            stack.enter_context(self._smoothing.again())
            for device, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(
                        torch.autocast(
                            device, dtype=dtype, enabled=enabled, cache_enabled=self._autocast_cache
                        )
                    )
            yield
