"""What a prior is, and the terms that say one number for each example."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from captum_priors import _checks
from captum_priors._captum import as_tuple, forward_func_of, output_error
from captum_priors._errors import one_of, refusal
from captum_priors._rows import Rows, check_selects, shared, tile
from captum_priors._shown import shown_options
from captum_priors._types import TensorOrTuple
from captum_priors.engine import AttributionPass, Stream, processes
from captum_priors.engine._torch import out_of_inference
from captum_priors.engine.model import BatchNorm, Seen
from captum_priors.outputs import SeveralOutputs, scores_of_each
from captum_priors.priors import annotated
from captum_priors.priors.annotated import Missing
from captum_priors.priors.batch_norm import compares, hold_statistics

Reduction = Literal["mean", "sum"]
Tensors = tuple[Tensor, ...]


class Prior(nn.Module, ABC):
    r"""A scalar to add to the training loss.

    ``prior(inputs, baselines, target, additional_forward_args, **annotations)`` returns shape
    ``()``. ``prior + prior``, ``c * prior`` and ``sum(priors)`` are priors again, and ``repr`` is
    the formula. A call leaves no trace in the training state: no gradient, flag, hook, statistic
    or random number of it changes.

    Subclass it for a value of your own: ``forward`` alone is needed. For one number for each
    example, subclass :class:`Term`.

    Args:
        name: What logs call it, in place of its class; ``prior.name`` may be set later.

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

    name: str | None = None

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__()
        _checks.check_name(name)
        self.name = name

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

    def takes(self, name: str) -> bool:
        """Whether a call may pass this keyword: ``baselines``, or the name of an annotation."""
        return name in inspect.signature(self.forward).parameters

    def formula(self) -> str:
        """Return the prior as it would be written."""
        return f"{type(self).__name__}({', '.join([*self._described(), *shown_options(self)])})"

    def _described(self) -> list[str]:
        """What the formula names before the options."""
        return []

    def training_step(self) -> bool:
        """Whether a call now is part of training, as opposed to looking at a value."""
        return self.training and torch.is_grad_enabled()

    def __add__(self, other: Any) -> "Prior":
        from captum_priors.priors.combined import add  # which makes a prior itself

        return add(self, other)

    __radd__ = __add__

    def __mul__(self, weight: Any) -> "Prior":
        from captum_priors.priors.combined import multiply  # which makes a prior itself

        return multiply(self, weight)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return self.formula()


@dataclass(frozen=True)
class Call:
    """One batch, and the model as a function of points that repeat it.

    ``inputs`` are copies, with their graph: whoever works in place on them harms nobody.

    Example:
        >>> import torch
        >>> from captum_priors.priors import Term
        >>> class MeanOutput(Term):
        ...     def _scores(self, call):
        ...         return call.output(call.inputs).reshape(call.n)
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(4, 3)
        >>> torch.allclose(MeanOutput(model)(x), model(x).mean())
        True
    """

    forward_func: Any
    given: Any  # the inputs as they were given: a tensor, a tuple, or what an explainer takes
    inputs: Tensors
    baselines: Any
    target: Any
    args: tuple[Any, ...]
    annotations: dict[str, Any]
    explaining: AttributionPass
    chosen: Tensor | None = None  # which of the examples given these are, where not all
    n_given: int = 0

    @property
    def seed(self) -> int:
        """Seed of this call; derive a child of it for each thing that draws."""
        return self.explaining.seeded

    def keywords(self) -> dict[str, Any]:
        """Return the annotations by name, each as its penalty takes it."""
        found = dict(self.annotations)
        for name, value in self.annotations.items():
            if isinstance(value, shared):
                found[name] = value.value
                if name == "annotation" and isinstance(value.value, Tensor):
                    found[name] = value.value.expand(self.n, *value.value.shape)
        return found

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.inputs[0].shape[0]

    def rows(self, points: Tensors, target: Any) -> Tensor:
        """Run the model at points that repeat the batch, after a look at whether it may be."""
        if points[0].shape[0] != self.n:
            self.refuse_coupled()
        return cast("Tensor", Rows(self.forward_func, target, self.args, self.n)(points))

    def refuse_coupled(self) -> None:
        """Refuse examples that influence each other, where points of theirs go through together."""
        Rows(self.forward_func, None, self.args, self.n).refuse_coupled(self.inputs)

    def output(self, points: Tensors) -> Tensor:
        """Return the target output, shape ``(rows,)``, at points that repeat the batch."""
        return self.rows(points, self.target)

    def outputs(self, points: Tensors, *, labels: bool = False) -> Tensor:
        """Return all outputs, shape ``(rows, outputs)``, in at least single precision.

        Nothing is selected, but a target has to be one of them; ``labels`` are left to the caller.
        """
        outputs = self.rows(points, None)
        if outputs.dim() == 0 or outputs.shape[0] != points[0].shape[0]:
            raise output_error(outputs, points[0].shape[0])
        if not labels and self.target is not None:
            check_selects(outputs, tile(self.target, len(outputs) // self.n, self.n))
        outputs = outputs.reshape(len(outputs), -1)
        return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


class Term(Prior):
    r"""A prior that is no combination of others: one number for each example, then reduced.

    A subclass implements ``_scores(call)``, shape ``(batch,)``, or ``()`` for a statement about the
    batch, which runs inside an :class:`captum_priors.engine.AttributionPass`. Its options are those
    of its signature, kept under their names; ``labels = True`` has the target checked as class
    labels.

    Args:
        explained: The model, function or explainer.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Run ReLU as Softplus of this steepness.
        batch_norm: What BatchNorm layers in training mode are explained on: the statistics of the
            ``"batch"``, held for every point and with their graph, which is the function that is
            trained; or ``"running"`` ones, as layers in evaluation mode always are.
        missing: ``"nan"`` if an ``annotation`` of NaN says that there is none: the example counts
            as zero, as those do that ``annotated``, ``(batch,)`` in the call, leaves out.
        name: As in :class:`Prior`.

    Example:
        >>> import torch
        >>> from captum_priors.engine import input_gradients
        >>> from captum_priors.priors import Term
        >>> class Slope(Term):
        ...     def _scores(self, call):
        ...         (g,) = input_gradients(call.output, call.inputs)
        ...         return g.square().sum(1)
        >>> model = torch.nn.Linear(3, 1)
        >>> value = 0.5 * Slope(model)
        >>> torch.allclose(value(torch.randn(4, 3)), model.weight.square().sum() / 2)
        True
    """

    labels: ClassVar[bool] = False
    takes_tensors: bool = True
    draws: Sequence[str] = ("torch",)
    replayed: bool = False
    forward_func: Any
    _needed: Mapping[str, tuple[str, str]] = {}  # in a call: what it says, and how to pass it
    _name_of_score: ClassVar[str] = "score"
    _records: ClassVar[bool] = True

    def __init__(
        self,
        explained: Any,
        *,
        reduction: Reduction = "mean",
        smooth: float | None = None,
        batch_norm: BatchNorm = "batch",
        missing: Missing = "refuse",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        one_of("missing", missing, ("refuse", "nan"))
        one_of("reduction", reduction, ("mean", "sum"))
        one_of("batch_norm", batch_norm, ("batch", "running"))
        self.reduction, self.batch_norm, self.missing = reduction, batch_norm, missing
        self.smooth = None if smooth is None else _checks.positive("smooth", smooth, example=30)
        # Past nn.Module's registration: the explained model's parameters are not the prior's.
        self.__dict__["forward_func"] = explained
        self.stream = Stream()
        self._told = False
        self.calls = 0  # on running statistics, until they are seen to differ from the batch's

    @abstractmethod
    def _scores(self, call: Call) -> Tensor:
        """Return one number for each example, or one for the batch."""

    def _scores_of_each(self, call: Call) -> Any:
        """Return the mean over several outputs of the scores of each."""
        return scores_of_each(self, call)

    def _explained(self) -> tuple[Any, ...]:
        """Return what refers to the modules that run."""
        return (self.forward_func,)

    def models(self) -> Sequence[Any]:
        """Return the functions of the inputs that are run, each once."""
        explained = [e for e in self._explained() if e is not None]
        models = [forward_func_of(e) if hasattr(e, "attribute") else e for e in explained]
        return [*{id(model): model for model in models if model is not None}.values()]

    def forward(
        self,
        inputs: TensorOrTuple,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        **annotations: Any,
    ) -> Tensor:
        """Return the value on a batch, shape ``()``."""
        evaluating = self.evaluating(
            inputs, baselines, target, additional_forward_args, annotations
        )
        with evaluating as call:
            if processes.is_distributed():
                self._check_spread(call)  # before a graph is built
            if call.chosen is not None and call.n == 0:
                call.explaining.seen = Seen()  # this was no first pass
                scores: Any = annotated.nothing(call.inputs)
            elif isinstance(target, SeveralOutputs):
                scores = self._scores_of_each(call)
            else:
                scores = self._scores(call)
        return self._reduce(scores, call)

    @contextmanager
    def evaluating(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        annotations: dict[str, Any] | None = None,
        *,
        advance: bool = True,
    ) -> Iterator[Call]:
        """Check a call, and hold the model for it; ``advance`` the stream if this is training."""
        annotations = annotations or {}
        self._check_call(inputs, baselines, target, annotations)
        rows = None
        if self.takes_tensors and ("annotated" in annotations or self.missing == "nan"):
            rows = annotated.annotated_rows(annotations, len(as_tuple(inputs)[0]), self.missing)
            annotations = {k: v for k, v in annotations.items() if k != "annotated"}
        training = self.training_step()
        rank = processes.rank_of_draws() if training and processes.is_distributed() else 0
        draw = self.stream.next_seed if advance else self.stream.peek
        explaining = AttributionPass(
            *self._explained(),
            owner=self,
            seed=draw(advance=training, rank=rank),
            streams=self.draws,
            smooth=self.smooth,
            replayed=self.replayed,
            exact=self._way() != "finite_difference",
            batch_norm="batch" if self.batch_norm == "batch" or compares(self) else "running",
            given={"inputs": inputs, "baselines": baselines, "target": target},
        )
        with explaining, torch.enable_grad() if self._records else nullcontext():
            args = additional_forward_args
            args = () if args is None else args if isinstance(args, tuple) else (args,)
            batch = (inputs, baselines, target, args, annotations)
            if explaining.left_inference:
                batch = out_of_inference(batch)
            if self.takes_tensors and explaining.may_hold_statistics():
                hold_statistics(self, explaining, (inputs, args))
            call = self._call(*batch, explaining)
            if rows is not None:  # after the statistics of the batch
                call = annotated.part(
                    call, rows, draws_baselines=getattr(self, "draws_baselines", False)
                )
            yield call

    def takes(self, name: str) -> bool:
        """Whether a call may pass this keyword; ``annotated`` goes with every annotation."""
        goes_with = name == "annotated" and self.takes_tensors and self._takes_annotation()
        return goes_with or name in self._needed

    def _takes_annotation(self) -> bool:
        """Whether something is said about the examples: nothing by default."""
        return bool(self._needed.keys() - {"baselines"}) or self.takes("annotation")

    def _way(self) -> str:
        """How gradients of input gradients are taken."""
        return str(getattr(self, "differentiation", "double_backprop"))

    def _check_call(
        self, inputs: Any, baselines: Any, target: Any, annotations: dict[str, Any]
    ) -> None:
        """Check a call before anything is drawn or computed."""
        _checks.check_keywords(self, baselines, annotations)
        given = {"baselines": baselines, **annotations}
        for name, (expected, how) in self._needed.items():
            if given.get(name) is None:
                raise refusal(TypeError, f"`{name}`", expected, "none", f"Pass {name}=..., {how}")
        if not self.takes_tensors:
            return
        n = _checks.check_inputs(inputs)
        _checks.check_target(target, n, labels=self.labels)
        if self.labels:
            _checks.check_labels(target)
        for name, value in annotations.items():
            _checks.check_annotation(name, value, n)
        if annotations.get("annotated") is not None:
            annotated.check_annotated(annotations["annotated"], n)

    def _call(
        self,
        inputs: Any,
        baselines: Any,
        target: Any,
        args: tuple[Any, ...],
        annotations: dict[str, Any],
        explaining: AttributionPass,
    ) -> Call:
        tensors: Tensors = ()
        if self.takes_tensors:
            several = isinstance(inputs, tuple)
            tensors = tuple([x.clone() for x in inputs]) if several else (inputs.clone(),)
            inputs = tensors if several else tensors[0]
        return Call(
            self.forward_func, inputs, tensors, baselines, target, args, annotations, explaining
        )

    def _reduce(self, scores: Any, call: Call) -> Tensor:
        """Reduce the scores of a batch; what is no batch of tensors has any number of rows."""
        batch = call.n if self.takes_tensors else None
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else None
        if shape is None or shape not in ((), (shape[:1] if batch is None else (batch,))):
            raise refusal(
                ValueError,
                f"`{self._name_of_score}`",
                f"a tensor of shape ({'n' if batch is None else batch},), or () for the batch",
                str(type(scores).__name__ if shape is None else shape),
                "Return one unreduced number for each example.",
            )
        if call.chosen is not None:
            scores = annotated.among_all(scores, call.chosen, call.n_given)
        reduced: Tensor = scores.mean() if self.reduction == "mean" else scores.sum()
        if not processes.is_distributed():
            return reduced
        self._check_spread(call)  # of modules that a function has hidden until now
        return processes.part_of_whole(
            reduced,
            tuple(call.explaining.modules),
            mean=self.reduction == "mean",
            of_batch=shape == (),
            training=self.training_step(),
        )

    def _check_spread(self, call: Call) -> None:
        modules = tuple(call.explaining.modules)
        if modules and not self._told and self.training_step():
            processes.refuse_spread_parameters(modules, twice=self._way() != "finite_difference")
            self._told = True
