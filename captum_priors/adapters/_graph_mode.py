"""Run Captum's own code so that it keeps the graph that it throws away."""

import sys
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from captum_priors.engine import with_second_derivative

_CAPTUM = ("captum.attr", "captum._utils")
_DEEP_LIFT = "captum.attr._core.deep_lift"
_LIME = "captum.attr._core.lime"
# DeepLift's default: differences below it count as none, and the gradient takes their place.
DEEP_LIFT_EPS = 1e-10
# Frames between a caller and this mode that only pass a call on. A module of torch's is not among
# them: what happens inside the explained model keeps its meaning.
_PASS_ON = (
    "torch.overrides",
    "torch._tensor",
    "torch.autograd",
    "torch.autograd.grad_mode",
    "torch.utils._contextlib",
    "contextlib",
    __name__,
    f"{__package__}._relevance",
)


def _caller() -> str:
    """Name of the module that made the call."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in _PASS_ON:
        if frame.f_code.co_name == "decorate_context":  # @torch.no_grad(): who is decorated?
            return str(getattr(frame.f_locals.get("func"), "__module__", ""))
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__"))


class KeepGraph(TorchFunctionMode):
    """Rewrites the calls that Captum makes, and those alone, for one attribution.

    ``autograd.grad`` creates a graph, ``no_grad`` and ``detach`` do nothing, and tensor hooks live
    as long as the attribution: they would fire again when the result is differentiated. DeepLift's
    quotients are kept from dividing by zero.
    """

    # What the calls are rewritten to, by the names of the methods below.
    _rewrites: ClassVar[dict[Any, str]] = {
        torch.autograd.grad: "_grad",
        Tensor.detach: "_detach",
        Tensor.register_hook: "_register_hook",
        Tensor.div: "_divide",  # what the operator arrives as
        Tensor.item: "_item",
        torch._C._set_grad_enabled: "_set_grad_enabled",
    }

    def __init__(self) -> None:
        super().__init__()
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
        if name is None or not _caller().startswith(_CAPTUM):
            return func(*args, **kwargs)
        return getattr(self, name)(*args, **kwargs)

    def release(self) -> None:
        """Remove the hooks that the attribution set."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _grad(self, outputs: Any, inputs: Any, **options: Any) -> Any:
        return with_second_derivative(
            outputs,
            inputs,
            cotangents=options.get("grad_outputs"),
            allow_unused=bool(options.get("allow_unused")),
        )

    def _detach(self, tensor: Tensor) -> Tensor:
        return tensor

    def _register_hook(self, tensor: Tensor, hook: Any) -> RemovableHandle:
        def inside(gradient: Tensor) -> Any:
            with self:  # set aside for autograd.grad, within which the hook runs
                return hook(gradient)

        self._handles.append(tensor.register_hook(inside))
        return self._handles[-1]

    def _divide(self, numerator: Any, denominator: Any) -> Any:
        if isinstance(denominator, Tensor) and _caller() == _DEEP_LIFT:
            # torch.where discards these quotients, and not the NaN in their gradients.
            denominator = torch.where(denominator.abs() < DEEP_LIFT_EPS, 1, denominator)
        return numerator / denominator

    def _item(self, tensor: Tensor) -> Any:
        # LIME spreads its coefficients one by one, as numbers.
        keep = tensor.requires_grad and _caller() == _LIME
        return tensor if keep else tensor.item()

    def _set_grad_enabled(self, enabled: bool) -> None:
        if enabled:
            torch._C._set_grad_enabled(True)
