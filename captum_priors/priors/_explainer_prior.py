"""What attribution and stability priors share: explaining without leaving a trace."""

import functools
import inspect
import re
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_priors._captum import as_tuple
from captum_priors._checks import check_inputs, check_target
from captum_priors._engine._checkpointing import without_checkpointing
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._engine._mismatch import names_mismatch
from captum_priors._engine._modules import submodules_of
from captum_priors._engine._processes import current_processes
from captum_priors._engine._random import GeneratorState, seed_global, swapped_in
from captum_priors._engine._smooth import relu_as_softplus
from captum_priors._engine._still import held
from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors._probe import check_options
from captum_priors._rows import for_each
from captum_priors._types import TensorOrTuple
from captum_priors.adapters import differentiable
from captum_priors.priors._leaf_prior import LeafPrior, Reduction

_PASSED_AT_CALL = ("inputs", "target", "additional_forward_args")


class ExplainerPrior(LeafPrior):
    """A prior on what one explainer says; concrete priors say what they ask of it."""

    def __init__(
        self,
        explainer: Any,
        score: Any,
        *,
        reduction: Reduction,
        smooth: float | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(reduction=reduction, smooth=smooth)
        if isinstance(explainer, type):
            raise TypeError(
                expected_found(
                    "`explainer`",
                    "an explainer of a model",
                    f"the class {explainer.__name__}",
                    f"Pass {explainer.__name__}(model).",
                )
            )
        if isinstance(score, type) or not callable(score):
            is_class = isinstance(score, type)
            raise TypeError(
                expected_found(
                    f"`{self._score_name}`",
                    "a function of attributions",
                    f"the class {score.__name__}" if is_class else type(score).__name__,
                    f"Pass {score.__name__}(...), made with its options."
                    if is_class
                    else f"Pass one of captum_priors.{self._score_module}, or your own.",
                )
            )
        # Past nn.Module's registration: the explained model's parameters are not the prior's.
        self.__dict__["explainer"] = differentiable(explainer)
        self._check_options(options)
        self.options = options
        self.score = score
        if isinstance(options.get("generator"), torch.Generator):
            self.generator_state = GeneratorState(options["generator"])

    @property
    def _parameters_of_attribute(self) -> Any:
        # Not kept on the prior: signatures cannot be copied or pickled along with it.
        attribute = self.explainer.attribute
        if isinstance(attribute, types.MethodType):
            return dict(islice(_parameters_of_function(attribute.__func__).items(), 1, None))
        return inspect.signature(attribute).parameters

    explainer: Any
    _score_name = "penalty"
    _score_module = "penalties"

    @names_mismatch
    @leaves_inference_mode
    def forward(
        self,
        inputs: TensorOrTuple,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        **annotations: Any,
    ) -> Tensor:
        """Return the value of the prior on a batch, shape ``()``."""
        batch = None
        if self.takes_tensors:
            check_inputs(inputs)
            batch = as_tuple(inputs)[0].shape[0]
            check_target(target, batch)
        for name in annotations:
            if not self.takes(name):
                raise TypeError(
                    expected_found(
                        f"prior {self!r}",
                        f"annotations that {_name(self.score)} takes",
                        repr(name),
                        "Leave it out, or use a penalty that declares it.",
                    )
                )
        self._check_needed(annotations)
        call = self._call(baselines, target, additional_forward_args)
        seed = self._seed_now()
        with swapped_in(seed):
            scores = self._scores(inputs, call, annotations, seed)
        return self._reduce(scores, batch)

    def _check_needed(self, annotations: dict[str, Any]) -> None:
        for name, parameter in parameters_of(self.score).items():
            needed = (
                parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
            )
            if needed and name not in annotations:
                raise TypeError(
                    expected_found(
                        f"`{name}`",
                        f"what {_name(self.score)} compares the attributions with",
                        "none",
                        f"Call the prior with {name}=..., one entry for each example of the batch.",
                    )
                )

    def _scores(
        self, inputs: TensorOrTuple, call: dict[str, Any], annotations: dict[str, Any], seed: int
    ) -> Any:
        raise NotImplementedError

    @property
    def _differentiation(self) -> str:
        return str(getattr(self.explainer, "differentiation", "double_backprop"))

    def differentiates_twice(self) -> bool:
        """Whether the backward pass runs through input gradients."""
        return self._differentiation != "finite_difference"

    def explained_modules(self) -> Sequence[nn.Module]:
        """Return every module behind the explainer."""
        return submodules_of(self.explainer)

    def _score(self, maps: tuple[Any, ...], annotations: dict[str, Any]) -> Any:
        """Score attributions, over all processes where it is the batch that is scored."""
        scores = self.score(*maps, **annotations)
        self._check_graph(maps[0], scores)
        processes = current_processes()
        if processes is None or not isinstance(scores, Tensor) or scores.dim() > 0:
            return scores
        n = len(_each(maps[0])[0])
        whole = {k: for_each(processes.whole, v, n) for k, v in annotations.items()}
        joined = [for_each(processes.whole, m, n) for m in maps]
        # One statistic: what the score draws is to be the same everywhere.
        seed_global(self.stream.peek(advance=True, rank=processes.size))
        return self.score(*joined, **whole)

    @contextmanager
    def model_held(self) -> Iterator[None]:
        """Hold the explained model still, smoothed if so configured."""
        with ExitStack() as stack:
            stack.enter_context(held(self.explained_modules()))
            if self.smooth is not None:
                stack.enter_context(relu_as_softplus(self.smooth))
            yield

    def explain(self, inputs: TensorOrTuple, call: dict[str, Any]) -> Any:
        """Attribute with the model held, and insist on a graph where there is one to have."""
        with ExitStack() as stack:
            if self._differentiation == "double_backprop" and torch.is_grad_enabled():
                stack.enter_context(
                    without_checkpointing(
                        "double backpropagation would run the model again when the prior no longer "
                        "holds it still. Use differentiation='recompute' or 'finite_difference'."
                    )
                )
            attributions = self.explainer.attribute(inputs, **call)
        if hasattr(self.explainer, "tensors_of"):  # Captum's result object for language models
            attributions = self.explainer.tensors_of(attributions)
        if isinstance(attributions, list):  # one entry for each layer of a list
            attributions = tuple(t for entry in attributions for t in _each(entry))
        if torch.is_grad_enabled() and not any(
            isinstance(t, Tensor) and t.requires_grad for t in _each(attributions)
        ):
            trainable = [
                p for m in submodules_of(self.explainer) for p in m.parameters(recurse=False)
            ]
            if any(p.requires_grad for p in trainable):
                raise NotDifferentiableError(
                    expected_found(
                        "`explainer`",
                        "attributions with a graph to the model's trainable parameters",
                        f"none from {type(self.explainer).__name__}",
                        "Look for detach() or torch.no_grad() in its attribute, and certify it "
                        "with captum_priors.testing.check_differentiable.",
                    )
                )
        return attributions

    def _check_graph(self, attributions: Any, scores: Any) -> None:
        """Refuse a score that leaves nothing to train on of attributions that can be trained on."""
        tensors = [t for t in _each(attributions) if isinstance(t, Tensor)]
        if not isinstance(scores, Tensor) or scores.requires_grad or not scores.any():
            return  # zeros: nothing in this batch that the penalty speaks of
        fits = tuple(scores.shape) in {(), *(tuple(t.shape[:1]) for t in tensors)}
        if fits and any(t.requires_grad for t in tensors):
            raise NotDifferentiableError(
                expected_found(
                    f"`{self._score_name}`",
                    "a value with a graph to the attributions",
                    f"none from {_name(self.score)}",
                    "Look for detach(), item(), NumPy or torch.no_grad() in it.",
                )
            )

    @property
    def takes_tensors(self) -> bool:
        """Whether the explainer explains tensors, rather than a prompt or a data loader."""
        return bool(getattr(self.explainer, "takes_tensors", True))

    @property
    def draws_baselines(self) -> bool:
        """Whether baselines are a distribution to draw from, rather than one for each example."""
        return bool(getattr(self.explainer, "draws_baselines", False))

    def takes(self, name: str) -> bool:
        """Whether the explainer takes baselines, or the score this annotation."""
        if name == "baselines":
            return name in self._parameters_of_attribute or _is_open(self._parameters_of_attribute)
        parameters = parameters_of(self.score)
        maths = list(parameters)[: 1 if self._score_name == "penalty" else 2]
        return _is_open(parameters) or (name in parameters and name not in maths)

    def formula(self) -> str:
        """Return the prior as it would be written."""
        options = {**self.options, **self._shared_options()}
        shown = [f"{k}={v!r}" for k, v in options.items() if isinstance(v, (bool, int, float, str))]
        parts = [_name(self.explainer), *map(_name, self._described()), *shown]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _described(self) -> list[Any]:
        return [self.score]

    def _call(self, baselines: Any, target: Any, additional_forward_args: Any) -> dict[str, Any]:
        """Keywords of this call; Captum's positional orders differ from class to class."""
        call = dict(self.options)
        given = {
            "baselines": baselines,
            "target": target,
            "additional_forward_args": additional_forward_args,
        }
        parameters = self._parameters_of_attribute
        for name, value in given.items():
            if value is None:
                continue
            if name not in parameters and not _is_open(parameters):
                raise TypeError(
                    expected_found(
                        f"`{name}`",
                        "none",
                        type(value).__name__,
                        f"{type(self.explainer).__name__}.attribute does not take it: omit it.",
                    )
                )
            call[name] = value
        needed = parameters.get("baselines")
        if needed is not None and needed.default is needed.empty and "baselines" not in call:
            raise TypeError(
                expected_found(
                    "`baselines`",
                    f"the reference rows that {type(self.explainer).__name__} averages over",
                    "none",
                    "Pass baselines=... when the prior is made or when it is called; a few hundred "
                    "training examples, or the batch itself, are common choices.",
                )
            )
        return call

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in options:
            if name in _PASSED_AT_CALL:
                raise TypeError(
                    expected_found(
                        f"`{name}`", "it when the prior is called", "it at construction", "Move it."
                    )
                )
            if name == "return_convergence_delta":
                raise TypeError(
                    expected_found(
                        f"`{name}`",
                        "attributions alone",
                        "an option that returns more",
                        "Ask the explainer for the deltas.",
                    )
                )
        check_options(self.explainer, options)


def _each(attributions: Any) -> tuple[Any, ...]:
    return attributions if isinstance(attributions, tuple) else (attributions,)


# Signatures take as long as a layer of a small model. Weakly, because closures hold models.
_known_parameters: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _parameters_of_function(function: Any) -> Any:
    if function not in _known_parameters:
        # Without the values: a default may hold the model that holds the prior and this function,
        # and weak keys do not help against that.
        _known_parameters[function] = types.MappingProxyType(
            {
                name: p.replace(
                    annotation=p.empty, default=p.empty if p.default is p.empty else None
                )
                for name, p in inspect.signature(function).parameters.items()
            }
        )
    return _known_parameters[function]


def parameters_of(function: Any) -> Any:
    """Parameters of a function or module; none where a builtin does not tell."""
    if isinstance(function, types.FunctionType):
        return _parameters_of_function(function)
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        return inspect.signature(called).parameters
    except ValueError:
        return {}


def _is_open(parameters: Any) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _name(thing: Any) -> str:
    if isinstance(thing, functools.partial):
        options = [
            f"{k}={_shown(v)}" for k, v in thing.keywords.items() if not isinstance(v, Tensor)
        ]
        return f"{_name(thing.func)}({', '.join(options)})" if options else _name(thing.func)
    if isinstance(thing, nn.Module):
        return repr(thing)
    name = getattr(thing, "__name__", type(thing).__name__)
    return str(name).removeprefix("Differentiable")


def _shown(value: Any) -> str:
    """Value as it would be written, without addresses: another process has others."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
