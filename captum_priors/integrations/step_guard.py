"""Keep a gradient that has gone wrong out of the parameters."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from captum_priors._checks import positive
from captum_priors._errors import expected_found, one_of

logger = logging.getLogger(__name__)


class StepGuard:
    r"""Let an optimizer step only where the norm of its gradient is finite, and not too large.

    A step that is not right raises before parameters change, or is skipped: without gradients an
    optimizer leaves parameters and its own state alone. Torch's
    ``clip_grad_norm_(error_if_nonfinite=True)`` raises, too; this also skips, wherever a framework
    steps (in Lightning, guard the optimizer in ``configure_optimizers``; in Hugging Face, in a
    callback's ``on_train_begin``), and puts running statistics back. Gradients that processes
    average are alike on all of them, and so is the decision. A ``GradScaler`` skips overflows
    itself; the steps of a fused optimizer are left to it.

    Args:
        optimizer: The optimizer.
        on_nonfinite: ``"raise"`` or ``"skip"``.
        max_norm: Largest norm that is allowed, if any, far above the usual one.
        model: The model, if a forward pass on a bad batch may spoil its running statistics for
            good: those of the last good step are put back. Load a checkpoint before.

    Attributes:
        skipped: Number of skipped steps.
        remove: Call it to let the optimizer step freely again.

    Raises:
        FloatingPointError: By ``optimizer.step()``.

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
        max_norm: float | None = None,
        model: nn.Module | None = None,
    ) -> None:
        one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
        if max_norm is not None:
            positive("max_norm", max_norm)
        while hasattr(optimizer, "optimizer"):  # what Lightning and Accelerate put around it
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                expected_found(
                    "`optimizer`",
                    "a torch.optim.Optimizer",
                    type(optimizer).__name__,
                    "Pass the one whose step() is called.",
                )
            )
        self.on_nonfinite = on_nonfinite
        self.max_norm = float("inf") if max_norm is None else max_norm
        self.skipped = 0
        modules = [] if model is None else list(model.modules())
        self._normalising = [m for m in modules if getattr(m, "track_running_stats", False)]
        self._good = [buffer.clone() for buffer in self._statistics()]
        self.remove = optimizer.register_step_pre_hook(self._before_step).remove

    def _statistics(self) -> list[Tensor]:
        return [buffer for module in self._normalising for buffer in module.buffers()]

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Check now, or after the closure that will compute the gradients."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._check(optimizer)
            return None

        def then_check() -> Any:
            result = closure()
            self._check(optimizer)
            return result

        return args[:1], {**kwargs, "closure": then_check}

    @torch.no_grad()
    def _check(self, optimizer: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        norm: Any = get_total_norm([g.coalesce().values() if g.is_sparse else g for g in grads])
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if norm <= self.max_norm and norm != float("inf"):
            self._good = [buffer.clone() for buffer in self._statistics()]
            return
        for buffer, good in zip(self._statistics(), self._good, strict=True):
            buffer.copy_(good)
        limit = "" if self.max_norm == float("inf") else f" of at most {self.max_norm:g}"
        message = expected_found(
            "norm of the gradient",
            f"a finite number{limit}",
            f"{norm:g}",
            "Look at the batch and the terms of the loss; clip gradients or lower the learning "
            "rate if it grew.",
        )
        if self.on_nonfinite == "raise":
            raise FloatingPointError(message)
        self.skipped += 1
        for parameter in parameters:
            parameter.grad = None
        logger.warning("Step skipped, %d so far. %s", self.skipped, message)
