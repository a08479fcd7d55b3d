"""Priors compose: sums and multiples, with the formula as their ``repr``."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_priors._errors import expected_found
from captum_priors._types import TensorOrTuple


class Prior(nn.Module, ABC):
    r"""A scalar to add to the training loss.

    ``prior(inputs, baselines, target, additional_forward_args, **annotations)`` returns shape
    ``()``. ``prior + prior``, ``c * prior`` and ``sum(priors)`` are priors again, and ``repr`` is
    the formula. A call leaves no trace in the training state: no gradient, flag, hook, statistic
    or random number of it changes.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients
        >>> from captum_priors.penalties import l1, l2
        >>> explainer = ExpectedGradients(torch.nn.Linear(3, 1))
        >>> prior = 0.1 * AttributionPrior(explainer, l1) + AttributionPrior(explainer, l2)
        >>> prior
        0.1 * AttributionPrior(ExpectedGradients, l1) + AttributionPrior(ExpectedGradients, l2)
        >>> x, background = torch.randn(4, 3), torch.randn(9, 3)
        >>> prior(x, background).shape
        torch.Size([])
    """

    @abstractmethod
    def forward(
        self,
        inputs: TensorOrTuple,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        **annotations: Any,
    ) -> Tensor:
        """Return the value of the prior on a batch, shape ``()``."""

    @abstractmethod
    def takes(self, name: str) -> bool:
        """Whether a call may pass this keyword: ``baselines``, or the name of an annotation."""

    @abstractmethod
    def formula(self) -> str:
        """Return the prior as it would be written."""

    def training_step(self) -> bool:
        """Whether a call now is part of training, as opposed to looking at a value."""
        return self.training and torch.is_grad_enabled()

    def __add__(self, other: Any) -> "Prior":
        if isinstance(other, (int, float)) and other == 0:
            return self  # the start of sum(priors)
        if not isinstance(other, Prior):
            raise self._not_a_number("+", other)
        return SumPrior((self, other))

    __radd__ = __add__

    def __mul__(self, weight: Any) -> "Prior":
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise self._not_a_number("*", weight)
        return WeightedPrior(float(weight), self)

    __rmul__ = __mul__

    def _not_a_number(self, sign: str, other: Any) -> TypeError:
        """Word the commonest slip: adding a prior to the loss without calling it."""
        return TypeError(
            expected_found(
                f"{self.formula()} {sign}",
                "another prior" if sign == "+" else "a number",
                type(other).__name__,
                "Call the prior on a batch, prior(inputs, target=...), and add its value to the "
                "loss."
                if sign == "+"
                else "Write 0.1 * prior; a learned weight multiplies the value, w * prior(inputs).",
            )
        )

    def __repr__(self) -> str:
        return self.formula()


class WeightedPrior(Prior):
    """``weight * prior``; write it like that.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients
        >>> from captum_priors.penalties import l1
        >>> 2 * (0.5 * AttributionPrior(ExpectedGradients(torch.nn.Linear(3, 1)), l1))
        1 * AttributionPrior(ExpectedGradients, l1)
    """

    weight: float
    prior: Prior

    def __init__(self, weight: float, prior: Prior) -> None:
        super().__init__()
        if not abs(weight) < float("inf"):
            raise ValueError(
                expected_found(
                    "`weight`", "a finite number", repr(weight), "Check where it comes from."
                )
            )
        if isinstance(prior, WeightedPrior):
            weight, prior = weight * prior.weight, prior.prior
        self.weight = weight
        self.prior = prior

    def forward(self, *data: Any, **named: Any) -> Tensor:
        """Return the weighted value."""
        value: Tensor = self.weight * self.prior(*data, **named)
        return value

    def takes(self, name: str) -> bool:
        """Whether the prior inside takes the keyword."""
        return self.prior.takes(name)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        inner = self.prior.formula()
        return f"{self.weight:g} * " + (f"({inner})" if isinstance(self.prior, SumPrior) else inner)


class SumPrior(Prior):
    """``prior + prior``; write it like that. Each term takes the keywords that it knows.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients
        >>> from captum_priors.penalties import l1, outside
        >>> explainer = ExpectedGradients(torch.nn.Linear(3, 1))
        >>> prior = sum([AttributionPrior(explainer, l1), AttributionPrior(explainer, outside)])
        >>> x, background = torch.randn(4, 3), torch.randn(9, 3)
        >>> prior(x, background, annotation=torch.ones(4, 3)).shape
        torch.Size([])
    """

    terms: Sequence[Prior]

    def __init__(self, terms: Sequence[Prior]) -> None:
        super().__init__()
        flat = [t for term in terms for t in (term.terms if isinstance(term, SumPrior) else [term])]
        self.terms = cast("Sequence[Prior]", nn.ModuleList(flat))

    def forward(
        self,
        inputs: TensorOrTuple,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        **annotations: Any,
    ) -> Tensor:
        """Return the sum of the terms' values."""
        check_keywords(self, baselines, annotations)
        shared = dict(annotations)
        if baselines is not None:
            shared["baselines"] = baselines
        values = [
            term(
                inputs,
                target=target,
                additional_forward_args=additional_forward_args,
                **{name: value for name, value in shared.items() if term.takes(name)},
            )
            for term in self.terms
        ]
        return torch.stack(values).sum()

    def takes(self, name: str) -> bool:
        """Whether any term takes the keyword."""
        return any(term.takes(name) for term in self.terms)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        return " + ".join(term.formula() for term in self.terms)


def check_prior(prior: Any) -> None:
    """Require a prior."""
    if not isinstance(prior, Prior):
        raise TypeError(
            expected_found(
                "`prior`", "a prior", type(prior).__name__, "Pass an AttributionPrior, or a sum."
            )
        )


def check_keywords(prior: Prior, baselines: Any, annotations: dict[str, Any]) -> None:
    """Refuse baselines or annotations that nobody would look at."""
    given = [*annotations] if baselines is None else ["baselines", *annotations]
    for name in given:
        if not prior.takes(name):
            raise TypeError(
                expected_found(
                    f"prior {prior!r}",
                    "keywords that a term of it takes",
                    repr(name),
                    "Leave it out, or use a penalty that declares it.",
                )
            )
