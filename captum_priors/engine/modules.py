"""The modules behind what is explained, and the kernels and ReLU that they run on."""

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from captum_priors._errors import NotDifferentiableError
from captum_priors.engine._torch import COMPILER, saved_tensors_hooks

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


# ---- ReLU ------------------------------------------------------------------------------------

_thread = threading.local()

CHECKPOINTED = (
    "expected a model without activation checkpointing (or other saved-tensor hooks), found some: "
    "in the backward pass its blocks would be run again with ReLU and in training mode, when the "
    "prior no longer holds it still. Use differentiation='recompute' or 'finite_difference' and no "
    "smoothing, or run the model without checkpointing for this prior."
)
_RELU = (F.relu, torch.relu, Tensor.relu)
_RELU_IN_PLACE = (torch.relu_, Tensor.relu_, F.relu_)


class _Relu(torch.autograd.Function):
    """ReLU by torch's own kernels, forward and backward, whose slope is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        output = x.relu()
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, output.detach(), 0)


class ReluMode(TorchFunctionMode):
    """ReLU as Softplus of some steepness, or (None) exactly, without a graph through zeros.

    Torch's own keeps a graph from its slope to what it was taken at, through which a second
    backward pass carries zeros through the whole model; the exact form has none, which saves a
    fifth of the time.
    """

    def __init__(self, beta: float | None) -> None:
        super().__init__()
        self.beta = beta

    def __enter__(self) -> Any:
        self._before = current_beta()
        if self.beta is not None:
            self._ban = torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTED)
            self._ban.__enter__()
        _thread.beta = self.beta
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch's

    def __exit__(self, *error: Any) -> None:
        _thread.beta = self._before
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's
        if self.beta is not None:
            self._ban.__exit__(*error)
            if error[0] is RuntimeError and str(error[1]) == CHECKPOINTED:
                raise NotDifferentiableError(CHECKPOINTED) from error[1]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        always = func in _RELU_IN_PLACE
        if (func in _RELU or always) and (
            self.beta is not None or saved_tensors_hooks(False) is None
        ):
            x = args[0] if args else kwargs["input"]
            in_place = always or (args[1] if len(args) > 1 else kwargs.get("inplace", False))
            if self.beta is None:
                try:
                    found = _Relu.apply(x)  # type: ignore[no-untyped-call]  # of torch
                except RuntimeError:  # inside of vmap, grad or jvp, for which torch's own will do
                    return func(*args, **kwargs)
            else:  # Softplus keeps its input for the way back
                found = F.softplus(x.clone() if in_place else x, beta=self.beta)
            return x.copy_(found) if in_place else found
        return func(*args, **kwargs)


current_beta: Callable[[], float | None] = functools.partial(getattr, _thread, "beta", None)
"""Return the Softplus steepness in force in this thread, or None."""
