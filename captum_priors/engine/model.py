"""The door: everything that must hold while a model is explained, put back afterwards."""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_priors._errors import NotDifferentiableError
from captum_priors.engine._failures import cause_of
from captum_priors.engine._torch import Normalisation, out_of_inference
from captum_priors.engine.batch_norm import BATCH_NORMS, HeldStatistics
from captum_priors.engine.modules import (
    CHECKPOINTED,
    ReluMode,
    enter_exact_kernels,
    modules_of,
    plainly_in,
    run_eagerly,
    submodules_of,
    without_cudnn,
    without_fast_path,
)
from captum_priors.engine.processes import wrapped, wrapper_classes
from captum_priors.engine.random import GlobalState, seed_global

T = TypeVar("T")
BatchNorm = Literal["batch", "running"]

# Modules' flags and buffers belong to the process: passes in several threads take turns.
_turn = threading.RLock()
_thread = threading.local()


@dataclass
class Seen:
    """What earlier passes of one prior or explainer have found out."""

    before: bool = False  # a pass with gradients has been through
    judged: bool = False  # examples that influence each other have been looked for
    wrong_third: bool = False  # its gradients run through derivatives that torch gets wrong
    looked: bool = False  # what functions hide has run, with these layers of BatchNorm among it
    alone: bool = False  # a batch of one has had no statistics
    begins: bool = False  # the first rows that go through its model are the batch
    batch_norms: WeakSet[nn.Module] = field(default_factory=WeakSet)


_seen: WeakKeyDictionary[Any, Seen] = WeakKeyDictionary()


class AttributionPass:
    """Everything that holds while a model is explained; put back in reverse order, also on errors.

    The modules are in evaluation mode (recurrent ones that cuDNN may run lose their dropout
    instead, because it refuses their backward pass there), with copies of their buffers, because
    the next training step updates those in place under autograd's hands, and because some models
    update theirs in evaluation mode, too; :meth:`hold_statistics` has BatchNorm layers
    that train explained on those of a batch. Torch's global streams are put back;
    inference mode is left; kernels without a second derivative are replaced by those that have one;
    activation checkpointing is refused where the backward pass would find another model; failures
    on device, dtype or an empty batch are worded. One pass at a time holds models in a process.

    Args:
        explained: Explainers, models, functions. A module, bound method or ``functools.partial`` is
            held as a whole; what another function hides is held as soon as it runs.
        seed: Seeds the global streams for the length of the pass.
        streams: The global streams that are drawn from: ``"torch"``, ``"numpy"``, ``"python"``.
        smooth: Run ReLU as Softplus of this steepness.
        replayed: The backward pass holds the model again by itself (``recompute`` and
            ``finite_difference``), so activation checkpointing is harmless.
        exact: Replace kernels that have no second derivative.
        holds: Hold modules and streams; without, only inference mode, kernels and wording.
        batch_norm: ``"batch"`` if BatchNorm layers in training mode are to be explained on the
            statistics of a batch, which :meth:`hold_statistics` is then given.
        owner: Whose first pass is checked more closely; by default what is explained.
        given: The call's ``inputs``, ``target`` and ``baselines``, for the wording of failures.

    Raises:
        NotDifferentiableError: At a model that is checkpointed.

    Example:
        >>> import torch
        >>> from captum_priors.engine import AttributionPass
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
        >>> x = torch.randn(4, 3)
        >>> with AttributionPass(model):
        ...     torch.equal(model(x), model(x)), model.training
        (True, False)
        >>> model.training
        True
    """

    def __init__(
        self,
        *explained: Any,
        seed: int | None = None,
        streams: Sequence[str] = ("torch",),
        smooth: float | None = None,
        replayed: bool = False,
        exact: bool = True,
        holds: bool = True,
        batch_norm: BatchNorm = "running",
        owner: Any = None,
        given: dict[str, Any] | None = None,
    ) -> None:
        self.explained = explained
        self.streams = streams
        self.smooth = smooth
        self.exact = exact
        self.holds = holds
        self.batch_norm = batch_norm
        self.statistics: HeldStatistics | None = None  # of BatchNorm layers, once there are some
        self.left_inference = False
        self._beside = False
        self.modules: set[nn.Module] = set()
        self.seeded = 0 if seed is None else seed
        self._seeds, self._replayed, self._given = seed is not None, replayed, given or {}
        # Module, attribute, what it was, and the copy that stands in for it where that may go.
        self._undo: list[tuple[nn.Module, str, Any, Any]] = []
        if owner is None and explained and explained[0].__hash__ is not None:
            owner = explained[0]
        # Of the owner itself the pass keeps nothing: graphs whose gradient comes later keep it.
        self.seen = Seen() if owner is None else _seen.setdefault(owner, Seen())

    def __enter__(self) -> "AttributionPass":
        self._outer, self._thread = current_pass(), threading.get_ident()
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                self.left_inference = True
            without_fast_path(stack)
            if self.holds:
                self._hold(stack)
            else:
                for module in modules_of(*self.explained):
                    if isinstance(module, wrapper_classes()):
                        raise wrapped(module)
            if self.exact:
                look = not self.holds and torch.cuda.is_initialized()
                enter_exact_kernels(stack, submodules_of(*self.explained) if look else self.modules)
            if self.smooth is not None:
                stack.enter_context(ReluMode(self.smooth))
            if self.holds and not self._replayed and torch.is_grad_enabled():
                stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTED))
            _thread.current = self
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        _thread.current = self._outer
        self._stack.close()
        if error is None:
            self.seen.before = self.seen.before or torch.is_grad_enabled()
            self.seen.begins |= self.statistics is not None and self.statistics.begins
        elif type(error) is RuntimeError and str(error) == CHECKPOINTED:
            raise NotDifferentiableError(CHECKPOINTED) from error
        elif self._outer is None:
            cause = cause_of(error, submodules_of(*self.explained), self._given)
            if cause is not None:
                raise cause from error

    def seed(self, seed: int) -> None:
        """Seed the global streams again."""
        seed_global(seed, self.streams)

    def may_hold_statistics(self) -> bool:
        """Whether there are BatchNorm layers in training mode, or functions that may hide some."""
        if self.statistics is not None or not self._hidden or self.batch_norm == "running":
            return self.statistics is not None
        return not self.seen.looked or any(m.training for m in self.seen.batch_norms)

    def hold_statistics(
        self, run: Callable[[], T], model: Any = None, batch: tuple[Tensor, ...] = ()
    ) -> T | None:
        """Explain BatchNorm layers in training mode on the statistics of a batch, for all rows.

        Args:
            run: Runs the models on the batch.
            model: The model, if it is one: where the first rows that go through it were the batch
                in an earlier pass, they give the statistics.
            batch: The batch.

        Returns:
            What ``run`` returns, if it is run now.
        """
        if not self.exact:  # compiled modules would not see the statistics
            run_eagerly(self._stack)
        if self.statistics is None:
            self.statistics = HeldStatistics()
        self.seen.looked = True
        self._stack.callback(self.statistics.over.append, True)
        # Rows that are explained are constants, and those of one example have no statistics.
        looks = model is not None and len(batch[0]) > 1 and not any(x.requires_grad for x in batch)
        if looks and self.seen.begins:
            self.statistics.look(model, batch, run)
            self._stack.enter_context(self.statistics)
            return None
        found = self.statistics.record(run)
        if self.statistics.alone and not self.seen.alone:
            self.seen.alone = True
            warnings.warn(
                "A batch of one example has no statistics: BatchNorm layers in train mode are "
                "explained on their running statistics. Drop the last batch.",
                stacklevel=2,
            )
        if self.statistics.layers:
            self._stack.enter_context(self.statistics)
            if looks:
                self.statistics.look(model, batch, None)
        return found

    def _hold(self, stack: ExitStack) -> None:
        _turn.acquire()
        stack.callback(_turn.release)
        stack.callback(GlobalState.now(self.streams).restore)
        if self._seeds:
            self.seed(self.seeded)
        roots, self._hidden = plainly_in(self.explained)
        stack.callback(self._put_back)
        for root in roots:
            self._take(root)
        if self._hidden:
            stack.enter_context(self.watch())

    @contextmanager
    def watch(self, *, beside: bool = False) -> Iterator[None]:
        """Hold what runs; ``beside`` what is explained, models alone."""
        before, self._beside = self._beside, beside
        handle = register_module_forward_pre_hook(self._on_call)
        try:
            yield
        finally:
            handle.remove()
            self._beside = before

    def _on_call(self, module: nn.Module, args: Any) -> None:
        known = module in self.modules or threading.get_ident() != self._thread
        if not known and not (self._beside and next(module.parameters(), None) is None):
            self._take(module, runs=True)

    def _take(self, root: nn.Module, *, runs: bool = False) -> None:
        """Hold a module and all below it; on each by itself, because users override ``train``.

        One that ``runs`` may have been given its buffers for this run, by ``functional_call``,
        which takes them out again by itself.
        """
        # DataParallel alone exists without processes that were told of each other.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        wrappers = wrapper_classes() if distributed else nn.DataParallel
        stack = [root]
        while stack:
            module = stack.pop()
            if module in self.modules:
                continue
            if isinstance(module, wrappers):
                raise wrapped(module)
            self.modules.add(module)
            trains = module.training
            by_cudnn = False
            if isinstance(module, nn.RNNBase) and torch.cuda.is_initialized():
                by_cudnn = not self.exact
                if by_cudnn:
                    self._undo.append((module, "dropout", module.dropout, None))
                    module.dropout = 0.0
                elif current_pass() is self:
                    without_cudnn(self._stack)  # a function has hidden it until now
            others = isinstance(module, Normalisation) and not isinstance(module, BATCH_NORMS)
            if others and self.batch_norm == "batch":
                pass  # InstanceNorm trains on the statistics of each example by itself
            elif trains and not by_cudnn:
                self._undo.append((module, "training", True, None))
                own = vars(module)  # past nn.Module's search for parameters, where it can be
                if "training" in own:
                    own["training"] = False
                else:
                    module.training = False
            given = dict(module.named_buffers(recurse=False))
            for name, buffer in given.items():
                if not buffer.requires_grad:
                    copy = buffer.clone()
                    self._undo.append((module, name, buffer, copy if runs else None))
                    setattr(module, name, copy)
            if isinstance(module, BATCH_NORMS):
                self._take_batch_norm(module, trains, given.get("running_mean"))
            stack.extend(module.children())

    def _take_batch_norm(self, module: Any, trains: bool, mean: Tensor | None) -> None:
        self.seen.batch_norms.add(module)
        if self.batch_norm == "batch" and (trains or module.running_mean is None):
            if self.statistics is None:
                self.statistics = HeldStatistics()
            self.statistics.take(module, mean, self._undo, begun=current_pass() is self)

    def _put_back(self) -> None:
        for module, name, value, copy in reversed(self._undo):
            own = vars(module)
            if copy is not None and getattr(module, name, None) is not copy:
                continue
            if name in own:
                own[name] = value
            else:
                setattr(module, name, value)
        self._undo.clear()


current_pass: Callable[[], AttributionPass | None] = functools.partial(
    getattr, _thread, "current", None
)
"""Return the innermost pass of this thread."""


def call_beside(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function of the user's, such as a perturbation, which may run models of its own.

    A prior holds those as it does what is explained; what has no parameters stays as it is, because
    dropout or noise is then what is asked for.
    """
    current = current_pass()
    with nullcontext() if current is None or not current.holds else current.watch(beside=True):
        return function(*args, **kwargs)


@contextmanager
def resumed(earlier: AttributionPass | None) -> Iterator[None]:
    """Let the block count as part of an earlier pass, whose checks are done."""
    before = current_pass()
    _thread.current = earlier
    try:
        yield
    finally:
        _thread.current = before


def attribution_call(function: Callable[..., T]) -> Callable[..., T]:
    """Make a method ``attribute(self, inputs, ...)`` a pass of its own, or part of that around it.

    It holds nothing: asked directly, an explainer explains the model as it is.
    """

    @functools.wraps(function)
    def attribute(self: Any, *args: Any, **kwargs: Any) -> T:
        if current_pass() is not None:
            return function(self, *args, **kwargs)
        given = {"inputs": args[0] if args else None, **kwargs}
        way = getattr(self, "differentiation", "double_backprop")
        exact = torch.is_grad_enabled() and way != "finite_difference"
        with AttributionPass(self, holds=False, exact=exact, given=given) as explaining:
            if explaining.left_inference:
                args, kwargs = out_of_inference(args), out_of_inference(kwargs)
            return function(self, *args, **kwargs)

    return attribute
