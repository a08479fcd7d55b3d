"""What the regularizers share: a model that is run, not an explainer that is asked."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._captum import as_tuple, forward_args, run_repeated
from captum_priors._checks import check_inputs, check_target
from captum_priors._engine._checkpointing import without_checkpointing
from captum_priors._engine._first_order import check_points
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._engine._modules import submodules_of
from captum_priors._engine._random import swapped_in
from captum_priors._engine._smooth import relu_as_softplus
from captum_priors._engine._still import held
from captum_priors._errors import expected_found, one_of
from captum_priors._types import Differentiation, TensorOrTuple
from captum_priors.priors._base import check_keywords
from captum_priors.priors._leaf_prior import LeafPrior, Reduction

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One batch, and the model as a function of points that repeat it."""

    forward_func: Any
    inputs: Tensors
    target: Any
    args: tuple[Any, ...]
    baselines: Any = None

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.inputs[0].shape[0]

    def output(self, points: Tensors) -> Tensor:
        """Return the target output at points that repeat the batch any number of times."""
        return run_repeated(self.forward_func, points, self.target, self.args, self.n)

    def outputs(self, points: Tensors) -> Tensor:
        """Return all outputs, shape (rows, outputs), in at least single precision."""
        outputs = run_repeated(self.forward_func, points, None, self.args, self.n)
        if outputs.dim() == 0 or outputs.shape[0] != points[0].shape[0]:
            raise ValueError(
                expected_found(
                    "`forward_func`",
                    f"outputs for each of the {points[0].shape[0]} rows, shape (rows, ...)",
                    f"shape {tuple(outputs.shape)}",
                    "Return the outputs of each example, unreduced.",
                )
            )
        return full_precision(outputs.reshape(len(outputs), -1))


class Regularizer(LeafPrior):
    """A prior on a model's function, which it runs while holding it still.

    The target is what the outputs are selected by, or the class labels, as each says.
    """

    def __init__(
        self, forward_func: Any, *, reduction: Reduction = "mean", smooth: float | None = None
    ) -> None:
        super().__init__(reduction=reduction, smooth=smooth)
        if not callable(forward_func):
            raise TypeError(
                expected_found(
                    "`forward_func`",
                    "a module, or a function that returns its outputs",
                    type(forward_func).__name__,
                    "Pass the model.",
                )
            )
        # Past nn.Module's registration: the model's parameters are not the prior's.
        self.__dict__["forward_func"] = forward_func

    forward_func: Any

    @leaves_inference_mode
    def forward(
        self,
        inputs: TensorOrTuple,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        **annotations: Any,
    ) -> Tensor:
        """Return the value on a batch, shape ``()``."""
        call = self._prepare(inputs, baselines, target, additional_forward_args, annotations)
        with self._running(self._seed_now()):
            scores = self._scores(call)
        return self._reduce(scores, call.n)

    def _prepare(
        self,
        inputs: TensorOrTuple,
        baselines: Any,
        target: Any,
        additional_forward_args: Any,
        annotations: dict[str, Any],
    ) -> Call:
        """Check a call before anything is computed or drawn."""
        check_inputs(inputs)
        tensors = as_tuple(inputs)
        check_points(tensors)
        check_target(target, tensors[0].shape[0])
        check_keywords(self, baselines, annotations)
        args = forward_args(additional_forward_args)
        call = Call(self.forward_func, tensors, target, args, baselines)
        self._check(call)
        return call

    @contextmanager
    def _running(self, seed: int) -> Iterator[None]:
        with swapped_in(seed), self._model_held(), torch.enable_grad():
            yield

    @abstractmethod
    def _scores(self, call: Call) -> Tensor:
        """Return one number for each example."""

    def _check(self, call: Call) -> None:
        """Refuse what this regularizer cannot take."""

    def _holders(self) -> tuple[Any, ...]:
        """Return what refers to the modules that run."""
        return (self.forward_func,)

    def differentiates_twice(self) -> bool:
        """Whether the backward pass may run through input gradients."""
        return not self._holds_again()

    def explained_modules(self) -> Sequence[nn.Module]:
        """Return every module that runs."""
        return submodules_of(*self._holders())

    @contextmanager
    def _model_held(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(held(self.explained_modules()))
            if self.smooth is not None:
                stack.enter_context(relu_as_softplus(self.smooth))
            if not self._holds_again():
                stack.enter_context(
                    without_checkpointing(
                        "the backward pass would run the model again when the prior no longer "
                        "holds it still. Run it without checkpointing for this prior."
                    )
                )
            yield

    def _holds_again(self) -> bool:
        """Whether all of the backward pass holds the model still again."""
        return False

    def takes(self, name: str) -> bool:
        """Whether a call may pass this keyword: there are none by default."""
        return False

    def formula(self) -> str:
        """Return the prior as it would be written."""
        options = {**self._options(), **self._shared_options()}
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{type(self).__name__}({shown})"

    def _options(self) -> dict[str, Any]:
        """Options that identify the regularizer in its formula."""
        return {}


class GradientRegularizer(Regularizer):
    """A regularizer whose value is made of input gradients."""

    def __init__(
        self,
        forward_func: Any,
        *,
        differentiation: Differentiation = "double_backprop",
        reduction: Reduction = "mean",
        smooth: float | None = None,
    ) -> None:
        super().__init__(forward_func, reduction=reduction, smooth=smooth)
        one_of("differentiation", differentiation, ("double_backprop", "finite_difference"))
        self.differentiation: Differentiation = differentiation

    def _holds_again(self) -> bool:
        return self.differentiation == "finite_difference"


def check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """Require a positive finite number, or zero where that is allowed."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (value >= 0 if zero else value > 0)
        or not value < float("inf")
    ):
        kind = "a finite number of at least 0" if zero else "a positive finite number"
        raise ValueError(
            expected_found(f"`{name}`", kind, repr(value), f"Pass for example {name}=0.1.")
        )
    return float(value)


def full_precision(tensor: Tensor) -> Tensor:
    """Raise half precision, in which sums over features overflow or stall."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def flat_rows(tensors: Tensors) -> Tensor:
    """All features of each example side by side, shape (rows, features)."""
    rows = [full_precision(t.reshape(t.shape[0], -1)) for t in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def square_norms(tensors: Tensors) -> Tensor:
    """Squared Euclidean norm of each example."""
    return flat_rows(tensors).square().sum(1)


def repeated(tensors: Tensors, times: int) -> Tensors:
    """Repeat the batch as a whole."""
    return tuple(torch.cat([t] * times) for t in tensors)
