"""Run Captum's own code so that it keeps the graph that it throws away."""

import sys
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from captum_priors._captum import output_error
from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors.engine import with_second_derivative

_CAPTUM = ("captum.attr", "captum._utils")
# Frames between a caller and this mode that only pass a call on. A module of torch's is not among
# them: what happens inside the explained model keeps its meaning. (torch 2.13, Captum 0.8 and 0.9)
_PASS_ON = (
    "torch.overrides",
    "torch._tensor",
    "torch.autograd",
    "torch.autograd.grad_mode",
    "torch.nn.functional",
    "torch._jit_internal",
    "torch.utils._contextlib",
    "contextlib",
    __name__,
    f"{__package__}.relevance",
    f"{__package__}.rules",
)


def _caller() -> str:
    """Name of the module that made the call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _PASS_ON:
        if frame.f_code.co_name == "decorate_context":  # @torch.no_grad(): who is decorated?
            return str(getattr(frame.f_locals.get("func"), "__module__", ""))
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__"))


def calling_module(model: Any) -> Any:
    """Whose forward pass calls an activation; None where Captum does, of gradients."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _PASS_ON:
        frame = frame.f_back
    if frame is None or str(frame.f_globals.get("__name__")).startswith(_CAPTUM):
        return None
    return frame.f_locals.get("self", model)


class KeepGraph(TorchFunctionMode):
    """Rewrites the calls that Captum makes, and those alone, for one attribution.

    ``autograd.grad`` creates a graph, ``no_grad`` and ``detach`` do nothing, and tensor hooks live
    as long as the attribution: they would fire again when the result is differentiated.

    Args:
        explainer: Whose attribution it is.
        n_rows: Number of rows that are explained.
    """

    # What the calls are rewritten to, by the names of the methods below.
    _rewrites: ClassVar[dict[Any, str]] = {
        torch.autograd.grad: "_grad",
        Tensor.__getitem__: "_pick",
        Tensor.detach: "_detach",
        Tensor.register_hook: "_register_hook",
        torch._C._set_grad_enabled: "_set_grad_enabled",  # what no_grad arrives as
    }
    _only_in: ClassVar[dict[Any, str]] = {}  # in one module of Captum's, not in all

    def __init__(self, explainer: Any, n_rows: int) -> None:
        super().__init__()
        self.explainer, self.n_rows = explainer, n_rows
        self._handles: list[RemovableHandle] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = self._rewrites.get(func)
        if name is None or not _caller().startswith(self._only_in.get(func, _CAPTUM)):
            return func(*args, **kwargs)
        return getattr(self, name)(*args, **kwargs)

    def release(self) -> None:
        """Remove the hooks that the attribution set."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _grad(
        self, outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any
    ) -> tuple[Tensor, ...]:
        if options.get("is_grads_batched"):
            raise refusal(
                NotDifferentiableError,
                "`grad_kwargs`",
                "one vector for each output",
                "is_grads_batched=True",
                "Batches of vectors have no certified gradient: attribute for one at a time.",
            )
        points = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        if isinstance(outputs, tuple) and len(outputs) == 1 < min(self.n_rows, _rows(points[0])):
            raise output_error(outputs[0], self.n_rows)
        zeros = bool(options.get("materialize_grads"))
        gradients = with_second_derivative(
            outputs,
            inputs,
            cotangents=grad_outputs,
            allow_unused=zeros or bool(options.get("allow_unused")),
        )
        if not zeros:
            return gradients
        pairs = zip(gradients, points, strict=True)
        return tuple(torch.zeros_like(p) if g is None else g for g, p in pairs)

    def _pick(self, tensor: Tensor, index: Any) -> Tensor:
        if tensor.dim() == 0:  # Captum looks at the output of the first row
            raise output_error(tensor, self.n_rows)
        return tensor[index]

    def _detach(self, tensor: Tensor) -> Tensor:
        return tensor

    def _register_hook(self, tensor: Tensor, hook: Any) -> RemovableHandle:
        def inside(gradient: Tensor) -> Any:
            with self:  # set aside for autograd.grad, within which the hook runs
                return hook(gradient)

        self._handles.append(tensor.register_hook(inside))
        return self._handles[-1]

    def _set_grad_enabled(self, enabled: bool) -> None:
        if enabled:
            torch._C._set_grad_enabled(True)


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def functions(*names: str) -> frozenset[Any]:
    """Everything in torch of these names, and its in-place form."""
    each = [name + end for name in names for end in ("", "_")]
    owners = (F, torch, Tensor)
    return frozenset(getattr(o, n) for o in owners for n in each if hasattr(o, n))
