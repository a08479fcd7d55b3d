"""Keep a gradient that has gone wrong out of the parameters."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from captum_priors._checks import check_count
from captum_priors._engine._processes import any_process
from captum_priors._errors import expected_found, one_of
from captum_priors.priors._guarded import check_limit

logger = logging.getLogger(__name__)


class StepGuard:
    r"""Let an optimizer step only where the norm of the gradient is finite, and not too large.

    Whatever went wrong (the batch, the loss, a prior, or a prior's gradient where its value is
    finite), a step that is not right raises an error before parameters change, or is skipped: the
    gradients are dropped, so that parameters and the optimizer's state stay as they are, and the
    step is logged. All processes decide alike. Works by a hook of the optimizer, hence in every
    framework that calls it, with gradient accumulation (the step of all its micro-batches is
    skipped) and with closures. With a ``GradScaler``, steps that it skips by itself are not seen.

    A forward pass on a batch that is not finite also spoils the running statistics of BatchNorm for
    good: give the model, and a skipped step puts those of the last good one back.

    In Lightning, guard the optimizer in ``configure_optimizers``; in Hugging Face, in a callback's
    ``on_train_begin``, which receives the optimizer as an argument.

    Args:
        optimizer: The optimizer.
        on_nonfinite: ``"raise"`` or ``"skip"``.
        max_norm: Largest norm of the gradient that is allowed, if any. (Clipping scales larger ones
            down instead; a limit far above the usual norm catches explosions.)
        model: The model, for its statistics and the names of its parameters.
        patience: After so many skipped steps in a row, raise.

    Attributes:
        skipped: Number of skipped steps.

    Raises:
        FloatingPointError: By ``optimizer.step()``.

    Example:
        >>> import torch
        >>> from captum_priors.integrations import StepGuard
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> guard = StepGuard(optimizer, "skip", model=model)
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
        patience: int = 10,
    ) -> None:
        one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
        check_limit("max_norm", max_norm)
        check_count("patience", patience)
        # Lightning's and Accelerate's optimizers hold the one that steps.
        while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(
            optimizer, "optimizer"
        ):
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
        self.max_norm = max_norm
        self.patience = patience
        self.skipped = 0
        self._in_a_row = 0
        self._names: dict[Tensor, str] = {}
        if model is not None:
            self._names = {p: name for name, p in model.named_parameters()}
        self._statistics = [] if model is None else _statistics(model)
        self._good = [t.clone() for t in self._statistics]
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Let the optimizer step freely again."""
        self._handle.remove()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Check now, or after the closure that will compute the gradients."""
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._checked(optimizer, kwargs["closure"])}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._checked(optimizer, args[1]), *args[2:]), kwargs
        self._check(optimizer)
        return None

    def _checked(self, optimizer: Any, closure: Any) -> Any:
        def then_check() -> Any:
            result = closure()
            self._check(optimizer)
            return result

        return then_check

    def _check(self, optimizer: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            return  # a fused optimizer under a GradScaler, which skips by itself
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = _norm(parameters)
        wrong = ~norm.isfinite()
        if self.max_norm is not None:
            wrong = wrong | (norm > self.max_norm)
        if not any_process(wrong):
            self._in_a_row = 0
            self._good = [t.clone() for t in self._statistics]
            return
        message = self._message(norm, parameters)
        self._in_a_row += 1
        for statistic, good in zip(self._statistics, self._good, strict=True):
            statistic.copy_(good)
        if self.on_nonfinite == "raise":
            raise FloatingPointError(message)
        if self._in_a_row >= self.patience:
            raise FloatingPointError(f"{self._in_a_row} steps in a row were skipped. {message}")
        self.skipped += 1
        for parameter in parameters:
            parameter.grad = None
        logger.warning("Step skipped, %d so far. %s", self.skipped, message)

    def _message(self, norm: Tensor, parameters: list[Tensor]) -> str:
        limit = "" if self.max_norm is None else f" of at most {self.max_norm:g}"
        spoiled = [p for p in parameters if p.grad is not None and not _norm([p]).isfinite()]
        found = f"{norm.item():g}"
        if spoiled:
            first = self._names.get(spoiled[0], f"a parameter of shape {tuple(spoiled[0].shape)}")
            found += f", not finite for {len(spoiled)} of {len(parameters)} parameters ({first})"
        return expected_found(
            "norm of the gradient",
            f"a finite number{limit}",
            found,
            "Look at the batch and the terms of the loss; clip gradients or lower the learning "
            "rate if it grew.",
        )


def _statistics(model: nn.Module) -> list[Tensor]:
    """Running statistics, which a forward pass in train mode changes."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    buffers = [norm._buffers[name] for norm in norms for name in norm._buffers]
    return [buffer for buffer in buffers if buffer is not None]


@torch.no_grad()
def _norm(parameters: list[Tensor]) -> Tensor:
    """Norm of all gradients, whole where they are sharded."""
    grads = [p.grad for p in parameters if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
    if not dense:
        return torch.zeros(())
    if hasattr(nn.utils, "get_total_norm"):  # torch 2.6, in few kernels
        norm: Any = nn.utils.get_total_norm(dense)
    else:
        norm = torch.stack([torch.linalg.vector_norm(g).to(dense[0].device) for g in dense]).norm()
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole
