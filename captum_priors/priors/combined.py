"""Priors compose: sums and multiples, with the formula as their ``repr``."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_priors._checks import check_keywords
from captum_priors._errors import refusal, type_of
from captum_priors._shown import shown_options
from captum_priors._types import TensorOrTuple
from captum_priors.priors.base import Prior


def check_prior(prior: Any) -> None:
    """Require a prior."""
    if not isinstance(prior, Prior):
        remedy = "Pass an AttributionPrior, or a sum."
        raise refusal(TypeError, "`prior`", "a prior", type_of(prior), remedy)


class Wrapper(Prior):
    """A prior around another: it takes what that takes."""

    prior: Prior

    def __init__(self, prior: Prior, *, name: str | None = None) -> None:
        super().__init__(name=name)
        check_prior(prior)
        self.prior = prior

    def takes(self, name: str) -> bool:
        """Whether the prior inside takes the keyword."""
        return self.prior.takes(name)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        parts = [self.prior.formula(), *shown_options(self)]
        return f"{type(self).__name__}({', '.join(parts)})"


class WeightedPrior(Wrapper):
    """``weight * prior``; write it like that.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients
        >>> from captum_priors.penalties import l1
        >>> 2 * (0.5 * AttributionPrior(ExpectedGradients(torch.nn.Linear(3, 1)), l1))
        1 * AttributionPrior(ExpectedGradients, l1)
    """

    weight: float

    def __init__(self, weight: float, prior: Prior, *, name: str | None = None) -> None:
        if not abs(weight) < float("inf"):
            remedy = "Check where it comes from."
            raise refusal(ValueError, "`weight`", "a finite number", repr(weight), remedy)
        if isinstance(prior, WeightedPrior) and prior.name is None:
            weight, prior = weight * prior.weight, prior.prior
        super().__init__(prior, name=name)
        self.weight = weight

    def forward(self, *data: Any, **named: Any) -> Tensor:
        """Return the weighted value."""
        value: Tensor = self.weight * self.prior(*data, **named)
        return value

    def formula(self) -> str:
        """Return the prior as it would be written."""
        inner, weight = self.prior.formula(), repr(self.weight).removesuffix(".0")
        if self.name is not None:
            return f"WeightedPrior({weight}, {inner}, name={self.name!r})"
        plain = isinstance(self.prior, SumPrior) and self.prior.name is None
        return f"{weight} * ({inner})" if plain else f"{weight} * {inner}"


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

    def __init__(self, terms: Sequence[Prior], *, name: str | None = None) -> None:
        super().__init__(name=name)
        flat: list[Prior] = []
        for term in terms:
            plain = isinstance(term, SumPrior) and term.name is None
            flat += cast("SumPrior", term).terms if plain else [term]
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
        named = annotations if baselines is None else {"baselines": baselines, **annotations}
        every = {"target": target, "additional_forward_args": additional_forward_args}
        values = [
            term(inputs, **every, **{k: v for k, v in named.items() if term.takes(k)})
            for term in self.terms
        ]
        return torch.stack(values).sum()

    def takes(self, name: str) -> bool:
        """Whether any term takes the keyword."""
        return any(term.takes(name) for term in self.terms)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        terms = [term.formula() for term in self.terms]
        if self.name is not None:
            return f"SumPrior([{', '.join(terms)}], name={self.name!r})"
        return " + ".join(terms)


def weighted_priors(prior: Prior) -> list[tuple[float, Prior]]:
    """Return the priors that a formula adds up, each with its weight."""
    if isinstance(prior, WeightedPrior):
        return [(prior.weight * weight, inner) for weight, inner in weighted_priors(prior.prior)]
    if isinstance(prior, SumPrior):
        return [pair for term in prior.terms for pair in weighted_priors(term)]
    return [(1.0, prior)]


def add(prior: Prior, other: Any) -> Prior:
    """Return the sum of two priors; ``sum(priors)`` starts at 0."""
    if isinstance(other, (int, float)) and other == 0:
        return prior
    if isinstance(other, Prior):
        return SumPrior((prior, other))
    raise refusal(
        TypeError,
        f"{prior.formula()} +",
        "another prior",
        type_of(other),
        "Call the prior on a batch, prior(inputs, target=...), and add its value to the loss.",
    )


def multiply(prior: Prior, weight: Any) -> Prior:
    """Return a multiple of a prior."""
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        return WeightedPrior(float(weight), prior)
    raise refusal(
        TypeError,
        f"{prior.formula()} *",
        "a number",
        type_of(weight),
        "Write 0.1 * prior; a learned weight multiplies the value, w * prior(inputs).",
    )
