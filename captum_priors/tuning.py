"""How much of a prior: where to start looking for its weight, and its share while training."""

import inspect
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._checks import check_keywords, count, positive
from captum_priors._errors import refusal, type_of
from captum_priors.engine.random import STREAMS, GlobalState
from captum_priors.priors.base import Prior
from captum_priors.priors.combined import weighted_priors

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
        said = [
            f"{self.prior}: its gradient is {self.ratio:.3g} times the loss's (median of "
            f"{len(self.ratios)} batches, {min(self.ratios):.3g} to {max(self.ratios):.3g}).",
            f"Start with {self.weight:.3g} * {formula}, for a ratio of {self.target_ratio:g}.",
        ]
        return "\n".join([*said[: 2 if self.ratio else 1], *map(str, self.terms)])


def _pair(batch: Any) -> dict[str, Any]:
    """Return the keywords of a prior for a batch of pairs ``(x, y)``."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise refusal(
            TypeError,
            "batch",
            "a pair (inputs, target)",
            type_of(batch) + size,
            "Say what of it the prior is called with: prior_arguments=lambda batch: "
            "{'inputs': batch['x'], 'target': batch['y']}.",
        )
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
    A tenth leaves the loss its way and takes effect as it flattens. It is a start for a search.

    Ask after about an epoch without the prior: a network that knows nothing has large losses and
    flat maps. Of four priors that were swept, the proposal was within ten times the best weight for
    two; for a Hessian penalty it was far too small, where one asked before training was right.
    The model is measured in the mode that it is in, and nothing of it, of the prior or
    of any random stream is changed, the shuffling of a ``DataLoader`` included; the prior is
    evaluated as in evaluation, so that ``Lazy`` skips nothing. On several processes, or before
    ``torch.compile``, ask with the plain module, which has the same ratio. Under float16, whose
    small gradients vanish without a loss scaler, leave autocast out.

    Args:
        model: The model that is trained.
        loss: The training loss, without the prior, of a batch: shape ``()``.
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
    checked: list[tuple[str, Any, Any]] = [("model", model, nn.Module), ("prior", prior, Prior)]
    for name, value, kind in checked:
        if not isinstance(value, kind):
            remedy = "Pass the model, its loss and the prior, in this order."
            raise refusal(TypeError, f"`{name}`", f"a {kind.__name__}", type_of(value), remedy)
    parameters = _trained(model)
    terms = weighted_priors(prior)
    found: list[list[float]] = [[] for _ in terms]
    ratios: list[float] = []
    with _no_trace(model, prior, batches), torch.enable_grad():
        for i, batch in enumerate(islice(batches, n_batches)):
            arguments = prior_arguments(batch)  # first: it may take out what the model does not
            size = _size(_gradients(_loss_of(loss, batch), parameters), "loss", i)
            if not size:
                remedy = "Is it fitted already, or computed without the model's parameters?"
                raise refusal(ValueError, f"loss in batch {i}", "a gradient", "zero", remedy)
            total = [torch.zeros_like(p) for p in parameters]
            for (weight, term), each in zip(terms, found, strict=True):
                known = arguments if len(terms) == 1 else _known(prior, term, arguments)
                gradients = _gradients(term(**known), parameters)
                each.append(_size(gradients, f"prior {term!r}", i) / size)
                for t, g in zip(total, gradients, strict=True):
                    if g is not None:
                        t += weight * g
            ratios.append(_size(total, f"prior {prior!r}", i) / size)
    if not ratios:
        remedy = "Pass a DataLoader, or a list: an iterator is used up once."
        raise refusal(ValueError, "`batches`", "at least one batch", "none", remedy)
    if not statistics.median(ratios):
        raise refusal(
            ValueError,
            f"prior {prior!r}",
            "a gradient in the parameters that are trained",
            f"zero in {ratios.count(0)} of {len(ratios)} batches",
            "Is it a prior of this model, are the layers that it acts on frozen, is its weight 0, "
            "is nothing annotated, or is the network piecewise linear (pass smooth=30)?",
        )
    of_terms = (
        WeightReport(term.formula(), tuple(each), target_ratio)
        for (_, term), each in zip(terms, found, strict=True)
    )
    each_term = tuple(of_terms) if len(terms) > 1 else ()
    return WeightReport(prior.formula(), tuple(ratios), target_ratio, each_term)


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
        parameters = _trained(self.model)
        sizes = [_norm(_gradients(v, parameters, keep=True)) for v in (value, loss)]
        self.ratios[step] = sizes[0] / sizes[1] if sizes[1] else math.nan
        return self.ratios[step]


def _trained(model: nn.Module) -> list[Tensor]:
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        remedy = "Unfreeze what is trained."
        raise refusal(ValueError, "`model`", "parameters that are trained", "none", remedy)
    return parameters


def _loss_of(loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """Evaluate the loss, and refuse a criterion and what is no scalar with a graph."""
    try:
        inspect.signature(loss).bind(batch)
    except TypeError:
        value: Any = None
    except ValueError:  # a builtin has no signature
        value = loss(batch)
    else:
        value = loss(batch)
    found = type_of(loss if value is None else value)
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.requires_grad:
            return value
        found = f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
    raise refusal(
        TypeError,
        "`loss`",
        "a function of a batch that returns one number with a graph",
        found,
        "Write loss=lambda batch: F.cross_entropy(model(batch[0]), batch[1]).",
    )


def _known(prior: Prior, term: Prior, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a call goes to a term, as a sum does it."""
    always = {"inputs", "target", "additional_forward_args"}
    named = {k: v for k, v in arguments.items() if k not in always and v is not None}
    check_keywords(prior, None, named)
    return {k: v for k, v in arguments.items() if k in always or (k in named and term.takes(k))}


def _gradients(
    value: Tensor, parameters: Sequence[Tensor], *, keep: bool = False
) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=keep)


def _norm(gradients: Sequence[Tensor | None]) -> float:
    """Norm of all together, at least in single precision."""
    each = [g.detach().to_dense() for g in gradients if g is not None]
    return math.hypot(
        *[float(g.to(torch.promote_types(g.dtype, torch.float32)).norm()) for g in each]
    )


def _size(gradients: Sequence[Tensor | None], what: str, batch: int) -> float:
    size = _norm(gradients)
    if not math.isfinite(size):
        raise refusal(
            FloatingPointError,
            f"gradient of the {what} in batch {batch}",
            "a finite number",
            f"{size:g}",
            "Look at the batch; a float16 model needs float32 here.",
        )
    return size


@contextmanager
def _no_trace(model: nn.Module, prior: Prior, batches: Any) -> Iterator[None]:
    """Put back what running the model, looking at the prior and shuffling would change."""
    generator = getattr(batches, "generator", None)  # of a DataLoader
    if not isinstance(generator, torch.Generator):
        generator = torch.Generator()
    place, random = generator.get_state(), GlobalState.now(STREAMS)
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    # Not prior.eval(), which would reach a model that a prior of the user's has as its own.
    evaluated = [(m, m.training) for m in prior.modules() if isinstance(m, Prior)]
    try:
        for module, _ in evaluated:
            module.training = False
        yield
    finally:
        for module, mode in evaluated:
            module.training = mode
        with torch.no_grad():
            for owner, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(owner, name, buffer)
        random.restore()
        generator.set_state(place)
