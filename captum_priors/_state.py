"""Run something from one and the same state, and leave that state behind."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_priors.engine.model import current_pass
from captum_priors.engine.random import STREAMS, GlobalState


class _Kept:
    """Mode, buffers and counters of a module, and ``.grad``: it works on copies meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        counts = type(module).get_extra_state is not nn.Module.get_extra_state
        self.extra = [copy.deepcopy(module.get_extra_state())] if counts else []
        self.lend()

    def lend(self) -> None:
        self.put_back()
        for name, buffer in self.buffers.items():
            setattr(self.module, name, buffer.clone())

    def put_back(self) -> None:
        self.module.training = self.training
        for name, buffer in self.buffers.items():
            setattr(self.module, name, buffer)
        for extra in self.extra:
            self.module.set_extra_state(copy.deepcopy(extra))


@contextmanager
def one_state(
    modules: Iterable[nn.Module], tensors: Iterable[Tensor] = ()
) -> Iterator[Callable[[], None]]:
    """Leave the present state behind, and return to it whenever what this yields is called.

    It is that of the global generators, of the modules (those that run are noticed, too: their
    buffers, their mode and what they keep in ``get_extra_state``), and every ``.grad``.
    """
    generators, owner = GlobalState.now(STREAMS), threading.get_ident()
    kept: dict[nn.Module, _Kept] = {}
    grads: dict[Tensor, Tensor | None] = {}

    def keep(module: nn.Module, args: Any = None) -> None:
        # A pass that holds a module puts it back by itself.
        if threading.get_ident() == owner and module not in kept and current_pass() is None:
            kept.update({m: _Kept(m) for m in module.modules() if m not in kept})
            keep_grads(module.parameters())

    def keep_grads(tensors: Iterable[Tensor]) -> None:
        grads.update({t: t.grad for t in tensors if t.is_leaf and t not in grads})
        lend_grads()

    def lend_grads() -> None:
        for tensor, grad in grads.items():
            tensor.grad = None if grad is None else grad.clone()

    def return_to_it() -> None:
        generators.restore()
        for each in kept.values():
            each.lend()
        lend_grads()
        torch.clear_autocast_cache()  # which would hold what a parameter was

    handle = register_module_forward_pre_hook(keep)
    try:
        for module in modules:
            keep(module)
        keep_grads(tensors)
        yield return_to_it
    finally:
        handle.remove()
        return_to_it()
        for each in kept.values():
            each.put_back()
        for tensor, grad in grads.items():
            tensor.grad = grad
