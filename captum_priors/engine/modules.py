"""The modules behind what is explained, and the kernels that they run on."""

import functools
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_priors.engine._torch import COMPILER

# Attributes in which explainers, and objects around a model, keep what they run.
_HOLDERS = ("forward_func", "model", "attribution_method", "attr_method", "explainer", "layer")


def modules_of(*holders: Any) -> tuple[nn.Module, ...]:
    """Return the root modules that are plainly there.

    A module, a bound method's, a partial's, and those that an object has as attributes, or in its
    ``forward_func``, ``model`` and the like. What another function hides shows when it runs: see
    :func:`run_modules`.
    """
    return plainly_in(holders)[0]


def submodules_of(*holders: Any) -> tuple[nn.Module, ...]:
    """Return every module below the roots that are plainly there, each once."""
    return tuple(dict.fromkeys(m for root in modules_of(*holders) for m in root.modules()))


def plainly_in(holders: Sequence[Any]) -> tuple[tuple[nn.Module, ...], bool]:
    """Root modules, and whether there are functions that may hide more."""
    roots: dict[nn.Module, None] = {}
    hidden, stack, seen = False, list(reversed(holders)), set[int]()
    while stack:
        holder = stack.pop()
        if holder is None or id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, nn.Module):
            roots[holder] = None
        elif isinstance(holder, functools.partial):
            stack.extend([holder.func, *holder.args, *holder.keywords.values()])
        elif isinstance(holder, types.MethodType):
            stack.append(holder.__self__)
        else:
            before = len(stack)
            for name, inside in reversed(getattr(holder, "__dict__", {}).items()):
                if inside is not None and (name in _HOLDERS or isinstance(inside, nn.Module)):
                    stack.append(inside)
            if len(stack) == before:
                hidden = hidden or callable(holder) or hasattr(holder, "attribute")
    return tuple(roots), hidden


@contextmanager
def run_modules() -> Iterator[list[nn.Module]]:
    """Collect the root modules that run in this thread in the block."""
    roots: list[nn.Module] = []
    known: set[nn.Module] = set()
    owner = threading.get_ident()

    def on_call(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == owner and module not in known:
            roots.append(module)
            known.update(module.modules())

    handle = register_module_forward_pre_hook(on_call)
    try:
        yield roots
    finally:
        handle.remove()


# ---- Kernels ---------------------------------------------------------------------------------


def enter_exact_kernels(stack: ExitStack, modules: Iterable[nn.Module]) -> None:
    """Compute the same functions by kernels that can be differentiated twice, until the stack ends.

    Which kernel computes a function is no part of the function: compiled modules run eagerly,
    attention in plain matrix products, recurrent modules on a GPU without cuDNN.
    """
    run_eagerly(stack)
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    if torch.cuda.is_initialized() and any(isinstance(m, nn.RNNBase) for m in modules):
        without_cudnn(stack)


def without_fast_path(stack: ExitStack) -> None:
    """Run encoders until the stack ends as they are trained: torch has a path without gradients.

    Where there is a padding mask it computes another function.
    """
    if torch.backends.mha.get_fastpath_enabled():
        stack.callback(torch.backends.mha.set_fastpath_enabled, True)
        torch.backends.mha.set_fastpath_enabled(False)


def without_cudnn(stack: ExitStack) -> None:
    """Run without cuDNN until the stack ends; its other flags are left alone."""
    stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
    torch.backends.cudnn.enabled = False


def run_eagerly(stack: ExitStack) -> None:
    """Run compiled modules as they were written, until the stack ends."""
    if COMPILER in sys.modules:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
