"""Keep a prior that has gone wrong out of the loss."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from captum_priors._engine._processes import any_process
from captum_priors._engine._random import Counter
from captum_priors._errors import expected_found, one_of
from captum_priors.priors._base import Prior, check_prior

logger = logging.getLogger(__name__)


class Guarded(Prior):
    r"""A prior whose value is finite, and no larger than allowed, in each training step.

    A value that is not raises an error, or is replaced by a constant zero: the step goes without
    the prior, is logged, and counted in ``skips`` (part of the ``state_dict``). Zero times a value
    that is not finite would not do: its gradient is not finite either. Where one process of a
    distributed training skips, all do. Values that are only looked at are returned as they are.

    A finite value can have a gradient that is not, and the rest of the loss can fail, too: see
    :class:`captum_priors.integrations.StepGuard`.

    Args:
        prior: The prior.
        on_nonfinite: ``"raise"`` or ``"skip"``.
        max_value: Largest magnitude that is allowed, if any.

    Raises:
        FloatingPointError: By a call, if the value is not right and ``on_nonfinite="raise"``.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients, Guarded
        >>> from captum_priors.penalties import l1
        >>> x = torch.randn(4, 3)
        >>> prior = AttributionPrior(ExpectedGradients(torch.nn.Linear(3, 1)), l1, baselines=x)
        >>> guarded = Guarded(prior, "skip", max_value=1e3)
        >>> torch.equal(guarded(x), guarded.prior(x)), guarded(x * float("nan")).item()
        (False, 0.0)
        >>> int(guarded.skips)
        1
    """

    def __init__(
        self,
        prior: Prior,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        *,
        max_value: float | None = None,
    ) -> None:
        super().__init__()
        check_prior(prior)
        one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
        check_limit("max_value", max_value)
        self.prior = prior
        self.on_nonfinite = on_nonfinite
        self.max_value = max_value
        self.skips = Counter()

    def forward(self, inputs: Any, *data: Any, **named: Any) -> Tensor:
        """Return the value where it is right."""
        value: Tensor = self.prior(inputs, *data, **named)
        if not self.training_step():
            return value
        wrong = ~value.detach().isfinite()
        if self.max_value is not None:
            wrong = wrong | (value.detach().abs() > self.max_value)
        if not any_process(wrong):
            return value
        limit = "" if self.max_value is None else f" of at most {self.max_value:g}"
        message = expected_found(
            f"prior {self.prior!r}",
            f"a finite value{limit}",
            f"{value.item():g}" + ("" if wrong else " here, and another in another process"),
            "The inputs are not finite: look at the batch."
            if not _are_finite(inputs)
            else "Clip gradients, lower the weight or learning rate, or use on_nonfinite='skip'.",
        )
        if self.on_nonfinite == "raise":
            raise FloatingPointError(message)
        self.skips.advance()
        logger.warning("Step without a prior, %d so far. %s", int(self.skips), message)
        return torch.zeros_like(value, requires_grad=False)

    def takes(self, name: str) -> bool:
        """Whether the prior inside takes the keyword."""
        return self.prior.takes(name)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        limit = "" if self.max_value is None else f", max_value={self.max_value:g}"
        return f"Guarded({self.prior.formula()}, {self.on_nonfinite!r}{limit})"


def _are_finite(inputs: Any) -> bool:
    each = inputs if isinstance(inputs, tuple) else (inputs,)
    return all(t.isfinite().all() for t in each if isinstance(t, Tensor))


def check_limit(name: str, limit: Any) -> None:
    """Require a positive finite number, or none."""
    if limit is not None and (
        isinstance(limit, bool)
        or not isinstance(limit, (int, float))
        or not 0 < limit < float("inf")
    ):
        raise ValueError(
            expected_found(
                f"`{name}`",
                "a positive finite number",
                repr(limit),
                f"Pass for example {name}=1e3.",
            )
        )
