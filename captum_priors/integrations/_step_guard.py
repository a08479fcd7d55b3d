"""Keep a gradient that has gone wrong out of the parameters."""

import logging
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

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
        self._norms = [] if model is None else _norms(model)
        self._keep()
        if model is not None:
            if model not in _guards_of:
                _guards_of[model] = WeakSet()
                model.register_load_state_dict_post_hook(_after_loading)
            _guards_of[model].add(self)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _keep(self) -> None:
        """Take the statistics as they are now for good ones."""
        # Looked up anew: .to() and load_state_dict(assign=True) put other tensors in their place.
        self._good = [
            {name: b.clone() for name, b in norm._buffers.items() if b is not None}
            for norm in self._norms
        ]

    def remove(self) -> None:
        """Let the optimizer step freely again."""
        self._handle.remove()
        for guards in _guards_of.values():
            guards.discard(self)

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
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer under a GradScaler
        if found is not None and any_process(found > 0):
            return  # it skips by itself
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = _norm(parameters)
        if found is not None and getattr(optimizer, "grad_scale", None) is not None:
            norm = norm / optimizer.grad_scale.to(norm.device)
        wrong = ~norm.isfinite()
        if self.max_norm is not None:
            wrong = wrong | (norm > self.max_norm)
        if not any_process(wrong):
            self._in_a_row = 0
            self._keep()
            return
        message = self._message(norm, parameters)
        self._in_a_row += 1
        for module, good in zip(self._norms, self._good, strict=True):
            for name, value in good.items():
                module._buffers[name].copy_(value)
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


# Not in the hook itself: it is copied and pickled with the model.
_guards_of: WeakKeyDictionary[nn.Module, WeakSet[StepGuard]] = WeakKeyDictionary()


def _after_loading(model: nn.Module, keys: Any) -> None:
    """Statistics that were loaded are good ones."""
    for guard in _guards_of.get(model, ()):
        guard._keep()


def _norms(model: nn.Module) -> list[Any]:
    """Modules with running statistics, which a forward pass in train mode changes."""
    return [module for module in model.modules() if isinstance(module, _NormBase)]


@torch.no_grad()
def _norm(parameters: list[Tensor]) -> Tensor:
    """Norm of all gradients, whole where they are sharded."""
    grads = [p.grad for p in parameters if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
    if not dense:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    # Sharded tensors and whole ones do not go into one kernel; half precision overflows in a norm.
    alike: dict[Any, list[Tensor]] = {}
    for g in dense:
        alike.setdefault(getattr(g, "device_mesh", None), []).append(g)
    found = []
    for each in alike.values():
        norms = torch._foreach_norm(
            each, 2.0, dtype=torch.promote_types(each[0].dtype, torch.float32)
        )
        norm = torch.stack([n.to(norms[0].device) for n in norms]).norm()
        found.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    whole: Tensor = torch.stack([n.to(found[0].device) for n in found]).norm()
    return whole
