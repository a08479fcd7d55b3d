"""Priors around a prior: evaluated on some steps, on some examples, or kept out of the loss."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from captum_priors import _checks
from captum_priors._captum import as_tuple
from captum_priors._checks import check_annotation, check_inputs, check_keywords, check_target
from captum_priors._errors import expected_found, one_of, refusal
from captum_priors._rows import for_each, take, take_each
from captum_priors._types import TensorOrTuple
from captum_priors.engine import Stream, any_process
from captum_priors.engine.processes import rank_of_draws
from captum_priors.engine.random import Counter
from captum_priors.priors.base import Prior, Term
from captum_priors.priors.batch_norm import part_of
from captum_priors.priors.combined import Wrapper, weighted_priors

logger = logging.getLogger(__name__)


class Lazy(Wrapper):
    r"""Evaluate a prior on every k-th training step, weighted by k, and skip the others.

    The average over k steps is that of the prior at a k-th of the cost. The step counter is part
    of the ``state_dict``. A skipped step returns a constant: add it to the loss as ever. Where no
    gradient is recorded, or after ``eval()``, the prior is evaluated unweighted and nothing is
    counted. (Karras et al. 2020 do the same with a gradient penalty.)

    Under gradient accumulation it counts micro-batches, not optimizer steps. All processes of a
    distributed training count alike.

    Args:
        prior: The prior.
        every: :math:`k \ge 1`.
        name: As in :class:`Prior`.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients, Lazy
        >>> from captum_priors.penalties import l1
        >>> x = torch.randn(4, 3)
        >>> prior = AttributionPrior(ExpectedGradients(torch.nn.Linear(3, 1)), l1, baselines=x)
        >>> lazy = Lazy(prior, every=3)
        >>> [lazy(x).item() > 0 for _ in range(6)]
        [True, False, False, True, False, False]
    """

    def __init__(self, prior: Prior, every: int, *, name: str | None = None) -> None:
        super().__init__(prior, name=name)
        self.every = _checks.count("every", every)
        self.counter = Counter()

    def forward(self, inputs: TensorOrTuple, *data: Any, **named: Any) -> Tensor:
        """Return the weighted value on every k-th step, and zero on the others."""
        training = self.training_step()
        if not training or int(self.counter) % self.every == 0:
            value: Tensor = self.prior(inputs, *data, **named)
            value = self.every * value if training else value
        else:
            like = torch.zeros(())
            if isinstance(inputs, (Tensor, tuple)):  # some explainers take prompts
                check_inputs(inputs)
                like = as_tuple(inputs)[0]
            dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
            value = torch.zeros((), dtype=dtype, device=like.device)
        if training:
            self.counter.advance()
        return value


class Subsample(Wrapper):
    r"""Evaluate a prior on a random part of the batch, drawn anew each time.

    The mean over the part estimates the mean over the batch without bias. Baselines that an
    explainer draws from stay whole; those that belong to the examples go with them.

    Args:
        prior: A prior that reduces by ``"mean"``.
        fraction: Share of the examples, in (0, 1]; at least one is taken.
        name: As in :class:`Prior`.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients, Subsample
        >>> seen = []
        >>> def count(attributions):
        ...     seen.append(len(attributions))
        ...     return attributions.abs().sum(1)
        >>> x = torch.randn(8, 3)
        >>> prior = AttributionPrior(ExpectedGradients(torch.nn.Linear(3, 1)), count, baselines=x)
        >>> _ = Subsample(prior, fraction=0.25)(x)
        >>> seen
        [2]
    """

    def __init__(self, prior: Prior, fraction: float, *, name: str | None = None) -> None:
        super().__init__(prior, name=name)
        self.fraction = _checks.fraction("fraction", fraction)
        if any(isinstance(m, Term) and m.reduction != "mean" for m in prior.modules()):
            raise refusal(
                ValueError,
                "`prior`",
                "terms that reduce by 'mean'",
                "one that reduces by 'sum', whose value scales with the number of examples",
                "Use reduction='mean' and fold the batch size into the weight.",
            )
        self.stream = Stream()

    def forward(
        self,
        inputs: TensorOrTuple,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        **annotations: Any,
    ) -> Tensor:
        """Return the value on a random part of the batch."""
        n = check_inputs(inputs)
        labels = any(getattr(term, "labels", False) for term in self.prior.modules())
        check_target(target, n, labels=labels)
        check_keywords(self, baselines, annotations)
        for name, value in annotations.items():
            check_annotation(name, value, n)
        training = self.training_step()
        seed = self.stream.next_seed(advance=training, rank=rank_of_draws() if training else 0)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        rows = order[: max(1, round(self.fraction * n))].to(as_tuple(inputs)[0].device)
        part = take_each(inputs, rows, n)
        every = {
            # A tuple is one index for all examples, not one entry for each.
            "target": target if isinstance(target, tuple) else take(target, rows, n),
            "additional_forward_args": take_each(additional_forward_args, rows, n),
        }
        some = {name: for_each(lambda t: t[rows], a, n) for name, a in annotations.items()}
        values = []
        with part_of(inputs, additional_forward_args):
            for weight, prior in weighted_priors(self.prior):
                draws = any(getattr(term, "draws_baselines", False) for term in prior.modules())
                given = {**some, "baselines": baselines if draws else take_each(baselines, rows, n)}
                known = {k: v for k, v in given.items() if v is not None and prior.takes(k)}
                values.append(weight * prior(part, **every, **known))
        return torch.stack(values).sum()


class Guarded(Wrapper):
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
        name: As in :class:`Prior`.

    Raises:
        FloatingPointError: By a call, if the value is not right and ``on_nonfinite="raise"``.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients, Guarded
        >>> from captum_priors.penalties import l1
        >>> x = torch.randn(4, 3)
        >>> prior = AttributionPrior(ExpectedGradients(torch.nn.Linear(3, 1)), l1, baselines=x)
        >>> guarded = Guarded(prior, "skip", max_value=1e3)
        >>> guarded(x).item() > 0, guarded(x * float("nan")).item()
        (True, 0.0)
        >>> int(guarded.skips)
        1
    """

    def __init__(
        self,
        prior: Prior,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        *,
        max_value: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(prior, name=name)
        one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.on_nonfinite = on_nonfinite
        self.max_value = None if max_value is None else _checks.positive("max_value", max_value)
        self.skips = Counter()

    def forward(self, inputs: Any, *data: Any, **named: Any) -> Tensor:
        """Return the value where it is right."""
        value: Tensor = self.prior(inputs, *data, **named)
        if not self.training_step():
            return value
        limit = float("inf") if self.max_value is None else self.max_value
        size = value.detach().abs()
        wrong = ~(size.isfinite() & (size <= limit))
        if not any_process(wrong):
            return value
        each = inputs if isinstance(inputs, tuple) else (inputs,)
        message = expected_found(
            f"prior {self.prior!r}",
            "a finite value" + ("" if self.max_value is None else f" of at most {limit:g}"),
            f"{value.item():g}" + ("" if wrong else " here, and another in another process"),
            "Clip gradients, lower the weight or learning rate, or use on_nonfinite='skip'."
            if all(t.isfinite().all() for t in each if isinstance(t, Tensor))
            else "The inputs are not finite: look at the batch.",
        )
        if self.on_nonfinite == "raise":
            raise FloatingPointError(message)
        self.skips.advance()
        logger.warning("Step without a prior, %d so far. %s", int(self.skips), message)
        return torch.zeros_like(value, requires_grad=False)
