"""The attribution prior: an explainer and a penalty on what it says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_priors._errors import NotDifferentiableError, refusal, type_of
from captum_priors._probe import check_explainer, check_options
from captum_priors._rows import for_each, shared
from captum_priors._shown import shown, shown_value
from captum_priors._types import Penalty
from captum_priors.adapters import differentiable
from captum_priors.engine import current_processes, derive
from captum_priors.engine.model import BatchNorm
from captum_priors.engine.processes import is_distributed
from captum_priors.engine.random import STREAMS, GeneratorState
from captum_priors.outputs import SeveralOutputs, mean_of, outputs_of, taken
from captum_priors.priors.annotated import OF_EACH, Missing
from captum_priors.priors.base import Call, Reduction, Term

Parameters = Mapping[str, Parameter]
_OF_CALL = ("baselines", "target", "additional_forward_args")


class ExplainerPrior(Term):
    """A prior on what one explainer says; concrete priors say what they ask of it."""

    explainer: Any
    score: Callable[..., Any]
    _records: ClassVar[bool] = False
    _name_of_score: ClassVar[str] = "penalty"
    _module_of_score: ClassVar[str] = "penalties"
    _n_maps: ClassVar[int] = 1

    def __init__(self, explainer: Any, score: Any, options: dict[str, Any], **of_term: Any) -> None:
        if isinstance(explainer, type):
            check_explainer(explainer)
        if isinstance(score, type) or not callable(score):
            raise refusal(
                TypeError,
                f"`{self._name_of_score}`",
                "a function of attributions",
                type_of(score),
                f"Pass one of captum_priors.{self._module_of_score} or your own, with its options.",
            )
        explainer = differentiable(explainer)
        super().__init__(explainer, **of_term)
        self.__dict__["explainer"] = explainer
        self.takes_tensors = bool(getattr(explainer, "takes_tensors", True))
        # What an explainer from elsewhere draws from is not known.
        self.draws: Sequence[str] = ("torch", *getattr(explainer, "draws", STREAMS))
        self.replayed = self._way() != "double_backprop"
        _check_options(explainer, options)
        self.options, self.score = options, score
        # Names, not signatures, which cannot be copied or pickled along with the prior.
        taken, scored = parameters_of(explainer.attribute), parameters_of(score)
        self._taken, self._open, self._any = frozenset(taken), _is_open(taken), _is_open(scored)
        self._keywords = frozenset([*scored][self._n_maps :]) | (self._taken & {"baselines"})
        compared = f"what {shown(score)} compares the attributions with"
        needed = {
            p.name: (compared, OF_EACH)
            for p in scored.values()
            if p.kind is p.KEYWORD_ONLY and p.default is p.empty
        }
        if "baselines" in taken and taken["baselines"].default is Parameter.empty:
            needed["baselines"] = (
                f"the reference rows that {type(explainer).__name__} averages over",
                "when the prior is made or called: a few hundred training examples, or the batch "
                "itself, are common choices.",
            )
        self._needed = {name: said for name, said in needed.items() if name not in options}
        if isinstance(options.get("generator"), torch.Generator):
            self.generator_state = GeneratorState(options["generator"])

    def takes(self, name: str) -> bool:
        """Whether the explainer takes baselines; whether the score takes this annotation."""
        known = name in self._keywords or (self._open if name == "baselines" else self._any)
        return known or super().takes(name)

    @property
    def draws_baselines(self) -> bool:
        """Whether baselines are a distribution to draw from, rather than one for each example."""
        return bool(getattr(self.explainer, "draws_baselines", False))

    def _described(self) -> list[str]:
        options = [f"{k}={shown_value(v)}" for k, v in self.options.items()]
        return [shown(self.explainer), shown(self.score), *options]

    def _way(self) -> str:
        return str(getattr(self.explainer, "differentiation", "double_backprop"))

    def options_of(self, call: Call) -> dict[str, Any]:
        """Keywords of this call; Captum's positional orders differ from class to class."""
        options = dict(self.options)
        of_call = (call.baselines, call.target, call.args or None)
        for name, value in zip(_OF_CALL, of_call, strict=True):
            if value is None:
                continue
            if name not in self._taken and not self._open:
                remedy = f"{type(self.explainer).__name__}.attribute does not take it: omit it."
                raise refusal(TypeError, f"`{name}`", "none", type_of(value), remedy)
            options[name] = value
        generator = options.get("generator")
        if isinstance(generator, torch.Generator) and not self.training_step():
            options["generator"] = generator.clone_state()  # looking at a value moves nothing
        return options

    def _drawing(self, options: dict[str, Any], seed: int, call: Call) -> dict[str, Any]:
        """Options of a call of the explainer whose draws are those of a seed."""
        call.explaining.seed(seed)
        if "generator" in self._taken and "generator" not in options:
            return {**options, "generator": torch.Generator().manual_seed(seed)}
        return options

    def _scores_of_each(self, call: Call) -> Any:
        """Ask the explainer once, if it takes several outputs."""
        if not self._takes_several():
            return super()._scores_of_each(call)
        return self._scores(replace(call, target=outputs_of(self, call)))

    def _takes_several(self) -> bool:
        return bool(getattr(self.explainer, "takes_several_outputs", False))

    def _maps(self, attributions: Any, call: Call) -> Any:
        """Attributions as tensors; insist on a graph where there is one to have."""
        if hasattr(self.explainer, "tensors_of"):  # Captum's result object for language models
            attributions = self.explainer.tensors_of(attributions)
        if isinstance(attributions, list):  # one entry for each layer of a list
            attributions = tuple(t for entry in attributions for t in _each(entry))
        if torch.is_grad_enabled() and not _has_graph(attributions):
            modules = call.explaining.modules
            if any(p.requires_grad for m in modules for p in m.parameters(recurse=False)):
                raise refusal(
                    NotDifferentiableError,
                    "`explainer`",
                    "attributions with a graph to the model's trainable parameters",
                    f"none from {type(self.explainer).__name__}",
                    "Look for detach() or torch.no_grad() in its attribute, and certify it with "
                    "captum_priors.testing.check_differentiable.",
                )
        return attributions

    def _score(self, maps: tuple[Any, ...], call: Call) -> Any:
        """Score attributions, over all processes where it is the batch that is scored.

        Maps of several outputs are scored one output after another.
        """
        if isinstance(call.target, SeveralOutputs):
            alone = replace(call, target=None)
            each = (tuple(taken(m, k) for m in maps) for k in range(len(call.target)))
            return mean_of([self._score(maps_of_one, alone) for maps_of_one in each])
        # A perturbation may be what takes the others.
        said = {k: v for k, v in call.keywords().items() if self._any or k in self._keywords}
        scores = self.score(*maps, **said)
        detached = isinstance(scores, Tensor) and not scores.requires_grad and _has_graph(maps[0])
        if detached and scores.any():  # zeros: nothing in this batch that the penalty speaks of
            raise refusal(
                NotDifferentiableError,
                f"`{self._name_of_score}`",
                "a value with a graph to the attributions",
                f"none from {shown(self.score)}",
                "Look for detach(), item(), NumPy or torch.no_grad() in it.",
            )
        processes = current_processes() if is_distributed() else None
        if processes is None or not isinstance(scores, Tensor) or scores.dim() > 0:
            return scores
        n = len(_each(maps[0])[0])
        annotations = {
            name: value.value if isinstance(value, shared) else for_each(processes.whole, value, n)
            for name, value in call.annotations.items()
            if name in said
        }
        joined = [for_each(processes.whole, m, n) for m in maps]
        # One statistic: what the score draws is to be the same everywhere.
        call.explaining.seed(self.stream.next_seed(advance=False, rank=processes.size))
        return self.score(*joined, **annotations)


class AttributionPrior(ExplainerPrior):
    r"""Penalise the attributions of a model while it trains.

    .. math:: \theta = \arg\min_\theta \mathcal L(\theta; X, y) + \lambda\, \Omega(\Phi(\theta, X))

    (Erion et al. 2021): the prior is :math:`\Omega(\Phi)`, and :math:`\lambda` is
    written ``weight * prior``. The attribution pass runs with the model held still: evaluation
    mode, hence no dropout, put back afterwards.

    Args:
        explainer: An explainer that :func:`captum_priors.differentiable` takes.
        penalty: ``penalty(attributions, **annotations)`` of shape ``(batch,)`` or ``()``.
        smooth: Run the attribution pass with ReLU as Softplus of this steepness (30 is a good
            start), which gives hidden biases a gradient that double backpropagation through ReLU
            does not.
        reduction, batch_norm, missing, name: As in :class:`Term`.
        attribute_options: What else ``explainer.attribute`` is to be given at every call, such as
            ``baselines`` or ``n_samples``.

    Raises:
        NotDifferentiableError: If the explainer cannot be trained on.
        TypeError: If an option is not one of the explainer's.

    Example:
        >>> import torch
        >>> from captum_priors import AttributionPrior, ExpectedGradients
        >>> from captum_priors.penalties import l2
        >>> model = torch.nn.Linear(3, 1)
        >>> x, background = torch.randn(4, 3), torch.randn(9, 3)
        >>> prior = AttributionPrior(ExpectedGradients(model), l2, baselines=background)
        >>> expected = l2(model.weight * (x - background.mean(0))).mean()
        >>> torch.allclose(prior(x), expected, rtol=1e-4)
        True
    """

    def __init__(
        self,
        explainer: Any,
        penalty: Penalty,
        *,
        reduction: Reduction = "mean",
        smooth: float | None = None,
        batch_norm: BatchNorm = "batch",
        missing: Missing = "refuse",
        name: str | None = None,
        **attribute_options: Any,
    ) -> None:
        of_term = {"reduction": reduction, "smooth": smooth, "missing": missing, "name": name}
        super().__init__(explainer, penalty, attribute_options, batch_norm=batch_norm, **of_term)

    @property
    def penalty(self) -> Penalty:
        """The penalty."""
        return self.score

    def _scores(self, call: Call) -> Any:
        options = self._drawing(self.options_of(call), derive(call.seed, 0), call)
        found = self.explainer.attribute(call.given, **options)
        return self._score((self._maps(found, call),), call)


def _each(attributions: Any) -> tuple[Any, ...]:
    return attributions if isinstance(attributions, tuple) else (attributions,)


def _has_graph(attributions: Any) -> bool:
    if isinstance(attributions, Tensor):
        return attributions.requires_grad
    return any(isinstance(t, Tensor) and t.requires_grad for t in _each(attributions))


def parameters_of(function: Any) -> Parameters:
    """Parameters of a function or module; none where a builtin does not tell."""
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        return signature(called).parameters
    except ValueError:
        return {}


def _is_open(parameters: Parameters) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check_options(explainer: Any, options: dict[str, Any]) -> None:
    """Refuse options that an explainer does not take, or that are not for the constructor."""
    for name in ("inputs", "target", "additional_forward_args"):
        if name in options:
            when = "it when the prior is called"
            raise refusal(TypeError, f"`{name}`", when, "it at construction", "Move it.")
    if options.get("return_convergence_delta"):
        remedy = "Ask the explainer for the deltas."
        raise refusal(TypeError, "`return_convergence_delta`", "False", "True", remedy)
    check_options(explainer, options)
