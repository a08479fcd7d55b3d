"""How much of a prior: where to start looking for its weight, and its share while training."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._checks import check_number, count, positive
from captum_priors._errors import refusal, type_of
from captum_priors._state import one_state
from captum_priors.engine.random import GeneratorState
from captum_priors.priors.base import Prior
from captum_priors.priors.combined import check_prior, weighted_priors

__all__ = ["PriorLog", "WeightReport", "choose_weight"]


@dataclass(frozen=True)
class WeightReport:
    """What :func:`choose_weight` measured and proposes; ``str`` says it in words.

    Attributes:
        prior: The formula of the prior.
        ratios: Norm of the gradient of the prior over that of the loss, for each batch.
        target_ratio: What that ratio is to be.
        terms: For a sum, a report on each of its terms, without the weight that it has there.

    Example:
        >>> from captum_priors.tuning import WeightReport
        >>> print(WeightReport("PixelPrior", (20.0, 50.0, 40.0)))
        PixelPrior: its gradient is 40 times the loss's (median of 3 batches, 20 to 50).
        Start with 0.0025 * PixelPrior, for a ratio of 0.1.
    """

    prior: str
    ratios: tuple[float, ...]
    target_ratio: float = 0.1
    terms: tuple["WeightReport", ...] = ()

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def weight(self) -> float:
        """What to multiply the given prior by, ``report.weight * prior``; infinite if it is 0."""
        return self.target_ratio / self.ratio if self.ratio else math.inf

    def __str__(self) -> str:
        formula = f"({self.prior})" if " " in self.prior else self.prior
        lines = (
            f"{self.prior}: its gradient is {self.ratio:.3g} times the loss's (median of "
            f"{len(self.ratios)} batches, {min(self.ratios):.3g} to {max(self.ratios):.3g}).",
            f"Start with {self.weight:.3g} * {formula}, for a ratio of {self.target_ratio:g}.",
        )
        return "\n".join([*lines, *map(str, self.terms)])


def _pair(batch: Any) -> dict[str, Any]:
    """Return the keywords of a prior for a batch of pairs ``(x, y)``."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        remedy = (
            "Say what of it the prior is called with: prior_arguments=lambda batch: "
            "{'inputs': batch['x'], 'target': batch['y']}."
        )
        raise refusal(TypeError, "batch", "a pair (inputs, target)", type_of(batch), remedy)
    return {"inputs": batch[0], "target": batch[1]}


def choose_weight(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    prior: Prior,
    batches: Iterable[Any],
    *,
    prior_arguments: Callable[[Any], Mapping[str, Any]] = _pair,
    target_ratio: float = 0.1,
    n_batches: int = 8,
) -> WeightReport:
    r"""Compare the gradients of prior and loss, and propose a weight to start from.

    .. math:: \lambda = r \Big/ \operatorname{median}_b
        \frac{\lVert\nabla_\theta\, \mathrm{prior}(b)\rVert}{\lVert\nabla_\theta\, L(b)\rVert}

    over batches :math:`b`, for all parameters :math:`\theta` that are trained. With a ratio
    :math:`r < 1` a step against the sum still goes down the loss, whichever way the prior pulls:
    their inner product with :math:`\nabla L` is at least :math:`(1 - r) \lVert\nabla L\rVert^2`.
    It is a start for a search: of four priors that were swept, the proposal was within ten times
    the best weight for two.

    Ask after about an epoch without the prior: a network that knows nothing has large losses and
    flat maps. The model is measured in the mode that it is in, the prior as in evaluation, so that
    ``Lazy`` skips nothing. Nothing of them or of any random stream is changed, the shuffling of a
    ``DataLoader`` included. On several processes, or before ``torch.compile``, ask with the plain
    module, which has the same ratio; under float16 without autocast, whose small gradients vanish.

    Args:
        model: The model that is trained.
        loss: The training loss of a batch, without the prior, as in
            ``lambda batch: F.cross_entropy(model(batch[0]), batch[1])``.
        prior: The prior, or a sum of priors.
        batches: A ``DataLoader``, or any other batches, on the model's device.
        prior_arguments: The keywords of the prior for a batch, ``baselines`` and annotations
            included, as the training frameworks' integrations take it. By default batches are
            pairs ``(inputs, target)``.
        target_ratio: :math:`r`.
        n_batches: How many batches are looked at.

    Raises:
        ValueError: If prior or loss have no gradient, or there is no batch.
        FloatingPointError: If a gradient is not finite.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from captum_priors.stability import JacobianRegularization
        >>> from captum_priors.tuning import choose_weight
        >>> model = torch.nn.Linear(3, 2)
        >>> loader = torch.utils.data.DataLoader(
        ...     [(torch.randn(3), i % 2) for i in range(40)], batch_size=10, shuffle=True)
        >>> def loss(batch):
        ...     return F.cross_entropy(model(batch[0]), batch[1])
        >>> prior = JacobianRegularization(model, n_samples=None)  # |weights|²
        >>> report = choose_weight(model, loss, prior, loader)
        >>> again = choose_weight(model, loss, report.weight * prior, loader)
        >>> len(report.ratios), round(report.ratio * report.weight, 4), round(again.ratio, 4)
        (4, 0.1, 0.1)
    """
    positive("target_ratio", target_ratio)
    count("n_batches", n_batches)
    check_prior(prior)
    terms = [term for _, term in weighted_priors(prior)]
    asked = [prior, *(terms if len(terms) > 1 else ())]
    ratios: list[list[float]] = [[] for _ in asked]
    with one_state((model, prior, *_shuffles(batches))), torch.enable_grad():
        # Not prior.eval(), which would reach a model that a prior of the user's has as its own.
        for module in prior.modules():
            if isinstance(module, Prior):
                module.training = False
        for i, batch in enumerate(islice(batches, n_batches)):
            arguments = prior_arguments(batch)  # first: it may take out what the model does not
            value = check_number("`loss(batch)`", loss(batch))
            size = _finite(_gradient_norm(value, model), f"loss in batch {i}")
            if not size:
                remedy = "Is it fitted already, frozen, or computed without this model?"
                raise refusal(ValueError, f"loss in batch {i}", "a gradient", "zero", remedy)
            for each, found in zip(asked, ratios, strict=True):
                of_all = {"inputs", "target", "additional_forward_args"}
                named = {k: v for k, v in arguments.items() if k in of_all or each.takes(k)}
                value = each(**(arguments if each is prior else named))
                norm = _finite(_gradient_norm(value, model), f"prior {each!r} in batch {i}")
                found.append(norm / size)
    if not ratios[0]:
        remedy = "Pass a DataLoader, or a list: an iterator is used up once."
        raise refusal(ValueError, "`batches`", "at least one batch", "none", remedy)
    whole, *of_terms = (
        WeightReport(each.formula(), tuple(found), target_ratio)
        for each, found in zip(asked, ratios, strict=True)
    )
    if not whole.ratio:
        raise refusal(
            ValueError,
            f"prior {prior!r}",
            "a gradient in the parameters that are trained",
            f"zero in {whole.ratios.count(0)} of {len(whole.ratios)} batches",
            "Is it a prior of this model, are the layers that it acts on frozen, is its weight 0, "
            "is nothing annotated, or is the network piecewise linear (pass smooth=30)?",
        )
    return replace(whole, terms=tuple(of_terms))


class PriorLog:
    r"""The ratio of gradients during training, measured at every so many steps.

    :math:`\lVert\nabla \mathrm{prior}\rVert / \lVert\nabla L\rVert` grows as the loss flattens;
    where it stays above one, the prior leads. A measurement costs two more backward passes, so that
    100 steps with one cost about 2 % more; gradients of the parameters are not touched. Under
    ``Lazy`` a step that has a prior is waited for. Lightning's and Hugging Face's mixins do this,
    too, with ``log_gradients_every``.

    Args:
        model: The model that is trained, unwrapped.
        every: Steps from one measurement to the next.

    Attributes:
        ratios: What was measured, by step.

    Example:
        >>> import torch
        >>> from captum_priors.tuning import PriorLog
        >>> model = torch.nn.Linear(3, 1)
        >>> log = PriorLog(model, every=2)
        >>> for _ in range(3):
        ...     loss = model(torch.ones(1, 3)).sum()
        ...     value = 0.5 * loss
        ...     _ = log(loss, value)  # before backward
        ...     (loss + value).backward()
        >>> log.ratios
        {0: 0.5, 2: 0.5}
    """

    def __init__(self, model: nn.Module, every: int = 100) -> None:
        self.model, self.every = model, count("every", every)
        self.ratios: dict[int, float] = {}
        self._step = self._due = 0

    def __call__(self, loss: Tensor, value: Tensor) -> float | None:
        """Take a step's loss and value of the prior, apart; return the ratio if it was measured."""
        step, self._step = self._step, self._step + 1
        if step < self._due or not (loss.requires_grad and value.requires_grad):
            return None
        self._due = step + self.every
        with one_state((self.model,)):  # checkpointed parts run again, and move their statistics
            size = _gradient_norm(loss, self.model, keep=True)
            ratio = _gradient_norm(value, self.model, keep=True) / size if size else math.nan
        self.ratios[step] = ratio
        return ratio


def _shuffles(batches: Any) -> Iterator[GeneratorState]:
    """Find the generators of a DataLoader and of its samplers."""
    if isinstance(getattr(batches, "generator", None), torch.Generator):
        yield GeneratorState(batches.generator)
    for name in ("sampler", "batch_sampler"):
        if hasattr(batches, name):
            yield from _shuffles(getattr(batches, name))


def _gradient_norm(value: Tensor, model: nn.Module, *, keep: bool = False) -> float:
    """Norm of the gradient in all parameters that are trained, at least in single precision."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not (value.requires_grad and parameters):
        return 0.0
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=keep)
    each = [g.to_dense() for g in found if g is not None]
    return math.hypot(
        *[float(g.to(torch.promote_types(g.dtype, torch.float32)).norm()) for g in each]
    )


def _finite(size: float, what: str) -> float:
    if not math.isfinite(size):
        remedy = "Look at the batch; a float16 model needs float32 here."
        raise refusal(FloatingPointError, what, "a finite gradient", f"{size:g}", remedy)
    return size
