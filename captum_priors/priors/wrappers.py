"""Priors around a prior: evaluated on some steps, on some examples, or kept out of the loss."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from captum_priors import _checks
from captum_priors._captum import as_tuple
from captum_priors._checks import check_annotation, check_inputs, check_target
from captum_priors._errors import expected_found, one_of
from captum_priors._rows import shared, take, take_each
from captum_priors._types import TensorOrTuple
from captum_priors.engine import Stream, any_process
from captum_priors.engine.processes import rank_of_draws
from captum_priors.engine.random import Counter
from captum_priors.priors.base import Prior, Term, check_keywords, part_of
from captum_priors.priors.combined import SumPrior, WeightedPrior, Wrapper

logger = logging.getLogger(__name__)


class Lazy(Wrapper):
    r"""Evaluate a prior on every k-th training step, weighted by k, and skip the others.

    The average over k steps is that of the prior at a k-th of the cost. The step counter is part
    of the ``state_dict``. A skipped step returns a constant: add it to the loss as ever. Where no
    gradient is recorded, or after ``eval()``, the prior is evaluated unweighted and nothing is
    counted. (Karras et al. 2020 do the same with a gradient penalty.)

    Under gradient accumulation it counts micro-batches, not optimizer steps: the average is the
    same, the gradient more even (with four micro-batches and ``every=4`` one of each four is due),
    and it needs no framework to tell it. All processes of a distributed training count alike.

    Args:
        prior: The prior.
        every: :math:`k \ge 1`.

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

    def __init__(self, prior: Prior, every: int) -> None:
        super().__init__(prior)
        self.every = _checks.count("every", every)
        self.counter = Counter()

    def forward(self, inputs: TensorOrTuple, *data: Any, **named: Any) -> Tensor:
        """Return the weighted value on every k-th step, and zero on the others."""
        if not self.training_step():
            value: Tensor = self.prior(inputs, *data, **named)
            return value
        tensors = isinstance(inputs, (Tensor, tuple))  # some explainers take prompts
        if tensors:
            check_inputs(inputs)
        due = int(self.counter) % self.every == 0
        if due:
            value = self.every * self.prior(inputs, *data, **named)
        else:
            like = as_tuple(inputs)[0] if tensors else torch.zeros(())
            dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
            value = torch.zeros((), dtype=dtype, device=like.device)
        self.counter.advance()
        return value


class Subsample(Wrapper):
    r"""Evaluate a prior on a random part of the batch, drawn anew each time.

    The mean over the part estimates the mean over the batch without bias. Baselines that an
    explainer draws from stay whole; those that belong to the examples go with them.

    Args:
        prior: A prior that reduces by ``"mean"``.
        fraction: Share of the examples, in (0, 1]; at least one is taken.

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

    def __init__(self, prior: Prior, fraction: float) -> None:
        super().__init__(prior)
        self.fraction = _checks.fraction("fraction", fraction)
        if any(m.reduction != "mean" for m in _terms(prior)):
            raise ValueError(
                expected_found(
                    "`prior`",
                    "terms that reduce by 'mean'",
                    "one that reduces by 'sum', whose value scales with the number of examples",
                    "Use reduction='mean' and fold the batch size into the weight.",
                )
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
        check_inputs(inputs)
        like = as_tuple(inputs)[0]
        n = like.shape[0]
        check_target(target, n)
        check_keywords(self, baselines, annotations)
        for name, value in annotations.items():
            check_annotation(name, value, n)
        training = self.training_step()
        seed = self.stream.next_seed(advance=training, rank=rank_of_draws() if training else 0)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        rows = order[: max(1, round(self.fraction * n))].to(like.device)
        named = {k: v if isinstance(v, shared) else _taken(v, rows) for k, v in annotations.items()}
        # A target given as a tuple is one index for all examples, not one tuple entry for each.
        named["target"] = target if isinstance(target, tuple) else take(target, rows, n)
        named["additional_forward_args"] = take_each(additional_forward_args, rows, n)
        with part_of(inputs, additional_forward_args):
            return self._evaluate(self.prior, take_each(inputs, rows, n), baselines, rows, n, named)

    def _evaluate(
        self,
        prior: Prior,
        inputs: TensorOrTuple,
        baselines: Any,
        rows: Tensor,
        n: int,
        named: dict[str, Any],
    ) -> Tensor:
        """Descend to the terms: each knows whether its baselines go with the examples."""
        if isinstance(prior, WeightedPrior):
            inner = self._evaluate(prior.prior, inputs, baselines, rows, n, named)
            return prior.weight * inner
        if isinstance(prior, SumPrior):
            keep = ("target", "additional_forward_args")
            terms = [
                self._evaluate(
                    term,
                    inputs,
                    baselines if term.takes("baselines") else None,
                    rows,
                    n,
                    {k: v for k, v in named.items() if k in keep or term.takes(k)},
                )
                for term in prior.terms
            ]
            return torch.stack(terms).sum()
        if not any(getattr(term, "draws_baselines", False) for term in _terms(prior)):
            baselines = take_each(baselines, rows, n)
        value: Tensor = prior(inputs, baselines=baselines, **named)
        return value


def _terms(prior: Prior) -> list[Term]:
    return [module for module in prior.modules() if isinstance(module, Term)]


def _taken(annotation: Any, rows: Tensor) -> Any:
    """Some examples of an annotation that has an entry for each; numbers and words stay."""
    if isinstance(annotation, tuple):
        return tuple(_taken(each, rows) for each in annotation)
    return annotation[rows] if isinstance(annotation, Tensor) else annotation


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
    ) -> None:
        super().__init__(prior)
        one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.on_nonfinite = on_nonfinite
        self.max_value = None if max_value is None else _checks.positive("max_value", max_value)
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


def _are_finite(inputs: Any) -> bool:
    each = inputs if isinstance(inputs, tuple) else (inputs,)
    return all(t.isfinite().all() for t in each if isinstance(t, Tensor))
