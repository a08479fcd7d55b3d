"""Keep a gradient that is not finite out of the parameters."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from captum_priors._errors import expected_found, one_of

logger = logging.getLogger(__name__)


class StepGuard:
    r"""Let an optimizer step only where the norm of its gradient is finite.

    Torch's ``clip_grad_norm_(error_if_nonfinite=True)`` raises, too; this also skips (without
    gradients an optimizer leaves parameters and its own state alone), wherever a framework steps:
    in Lightning guard the optimizer in ``configure_optimizers``, in Hugging Face in a callback's
    ``on_train_begin``. Gradients that processes average are alike on all of them, and so is the
    decision. A ``GradScaler`` skips overflows itself; steps of a fused optimizer are left to it.

    Args:
        optimizer: The optimizer.
        on_nonfinite: ``"raise"`` or ``"skip"``.
        model: The model, if a forward pass on a bad batch may spoil its running statistics for
            good: those of the last good step are put back. Load a checkpoint before.

    Attributes:
        skipped: Number of skipped steps.

    Raises:
        FloatingPointError: By ``optimizer.step()``, before parameters change.

    Example:
        >>> import torch
        >>> from captum_priors.integrations import StepGuard
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> guard = StepGuard(optimizer, "skip")
        >>> before = model.weight.clone()
        >>> model(torch.full((2, 3), float("nan"))).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(model.weight, before), guard.skipped
        (True, 1)
    """

    def __init__(
        self,
        optimizer: Any,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        *,
        model: nn.Module | None = None,
    ) -> None:
        one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
        while hasattr(optimizer, "optimizer"):  # what Lightning and Accelerate put around it
            optimizer = optimizer.optimizer
        self.on_nonfinite, self.skipped = on_nonfinite, 0
        modules = [] if model is None else list(model.modules())
        self._normalising = [m for m in modules if getattr(m, "track_running_stats", False)]
        self._good = [buffer.clone() for buffer in self._statistics()]
        optimizer.register_step_pre_hook(self._before_step)

    def _statistics(self) -> list[Tensor]:
        return [buffer for module in self._normalising for buffer in module.buffers()]

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Check when the closure, if there is one, has computed the gradients."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)

        def then_check() -> Any:
            result = closure() if closure else None
            self._check(optimizer)
            return result

        return args[:1], {**kwargs, "closure": then_check}

    @torch.no_grad()
    def _check(self, optimizer: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm: Any = get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if abs(norm) < float("inf"):
            self._good = [buffer.clone() for buffer in self._statistics()]
            return
        for buffer, good in zip(self._statistics(), self._good, strict=True):
            buffer.copy_(good)
        message = expected_found(
            "norm of the gradient",
            "a finite number",
            f"{norm:g}",
            "Look at the batch and the terms of the loss.",
        )
        if self.on_nonfinite == "raise":
            raise FloatingPointError(message)
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        logger.warning("Step skipped, %d so far. %s", self.skipped, message)
