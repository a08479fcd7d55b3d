r"""BatchNorm in training mode, explained on the statistics of the batch that is explained.

What is trained is :math:`f(x_i; \mu(X), \sigma(X))` with the statistics of the batch :math:`X`.
Explained is that function with the statistics held: computed once, from the explained batch, with
their graph to the parameters, and used for every row that goes through the model, interpolated and
perturbed ones too. They are constants to the points: examples do not influence each other, and
chunks agree. Explaining on running statistics instead moves directions that the training loss,
under batch statistics, does not feel, faster than the running statistics follow.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_priors._errors import NotDifferentiableError, refusal

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The layers that train on statistics of the batch; SyncBatchNorm on those of all processes."""

T = TypeVar("T")
Statistics = tuple[Tensor, Tensor]  # mean and biased variance of each channel


@dataclass
class _Layer:
    name: str
    means: tuple[Tensor, ...]  # the buffers by which a call is known to be this layer's
    group: Any = None  # the processes whose rows make the batch, where there are several
    found: list[Statistics] = field(default_factory=list)  # one for each run in a forward pass
    leaves: list[Statistics] = field(default_factory=list)
    runs: int = 0


@dataclass(frozen=True)
class _First:
    """The batch, which the first rows that go through its model may be."""

    model: Any
    batch: tuple[Tensor, ...]
    run: Callable[[], Any] | None  # takes its statistics, where there are none yet
    graph: bool  # whether they are to have one

    def matches(self, model: Any, points: tuple[Any, ...]) -> bool:
        """Whether these are the rows of the batch, through its model, with the graph asked for."""
        can = model is self.model and (torch.is_grad_enabled() or not self.graph)
        return can and len(points) >= len(self.batch) and all(map(_equal, points, self.batch))


class HeldStatistics(TorchFunctionMode):
    """BatchNorm layers of a model on the statistics of one batch.

    Layers are in evaluation mode meanwhile, and known by the copy of their running mean that the
    pass has given them, or by that itself, where ``functional_call`` hands it in; what calls batch
    normalisation otherwise is let through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, _Layer] = {}
        self._sources: dict[int, Tensor] = {}
        self.recording = self._as_leaves = False
        self.alone: list[str] = []  # layers that have been given a single row
        self._first: _First | None = None
        self.begins = False  # the first rows have been seen to be the batch
        self.shared = False  # the forward pass that is explained is recorded, too, or was the last
        self.over: list[bool] = []  # empty while the points are differentiated by

    def take(
        self,
        module: Any,
        given: Tensor | None,
        undo: list[tuple[nn.Module, str, Any, Any]],
        *,
        begun: bool,
    ) -> None:
        """Hold this layer, whose running mean is a tensor of the pass's own.

        Args:
            module: The layer.
            given: The running mean that it had.
            undo: Where what is set on it is noted, as the pass does.
            begun: Whether points are being explained already.
        """
        if begun and not self.recording:
            raise unknown(type(module).__name__)
        if module.running_mean is None:  # layers are known by it
            for name in ("running_mean", "running_var"):
                undo.append((module, name, None, None))
                setattr(module, name, torch.full((module.num_features,), torch.nan))
        group = None
        if isinstance(module, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
            group = module.process_group or dist.group.WORLD
        means = (module.running_mean, *([] if given is None else [given]))
        layer = _Layer(type(module).__name__, means, group)
        self.layers.update({id(mean): layer for mean in means})

    def knows(self, buffer: Tensor) -> bool:
        """Whether the buffer is one that a held layer is known by."""
        return id(buffer) in self.layers

    def record(self, run: Callable[[], T]) -> T:
        """Take the statistics from a forward pass of the batch, and hold them from now on."""
        self.recording = True
        try:
            with self:
                found = run()
        finally:
            self.recording = False
        if self.alone:
            self.release()
        return found

    def look(self, model: Any, batch: tuple[Tensor, ...], run: Callable[[], Any] | None) -> None:
        """Look whether the first rows that go through the model are the batch.

        If nothing is recorded yet, they give the statistics; or else ``run`` does, before.
        """
        self._first = _First(model, batch, run, torch.is_grad_enabled())

    @contextmanager
    def on_rows(self, model: Any, points: tuple[Any, ...]) -> Iterator[None]:
        """Run a model on these rows."""
        for layer in self.layers.values():  # those that run more than once are told by their turn
            layer.runs = 0
        first, before = self._first, self.recording
        matches = first is not None and first.matches(model, points)
        self.shared = before and self.shared
        if matches and first is not None and first.run is not None:
            self._first, self.recording, self.shared = None, True, True
        else:
            self._settle()
        try:
            yield
        finally:
            self.recording = before
        whole = all(layer.runs == len(layer.found) for layer in self.layers.values())
        self.begins = self.begins or (matches and whole)

    @contextmanager
    def on_calls(self, model: Any, points: tuple[Any, ...]) -> Iterator[None]:
        """Let code that explains these rows run the model by itself."""
        if self._first is None or not self._first.matches(model, points):
            self._settle()  # before that code changes what the modules do
        if not isinstance(model, nn.Module):
            yield
            return
        running = ExitStack()
        handles = (
            model.register_forward_pre_hook(
                lambda _, args: running.enter_context(self.on_rows(model, args))
            ),
            model.register_forward_hook(lambda *_: running.close()),
        )
        try:
            yield
        finally:
            running.close()
            for handle in handles:
                handle.remove()

    def _settle(self) -> None:
        first, self._first = self._first, None
        if first is not None and first.run is not None:
            with torch.set_grad_enabled(first.graph):
                self.record(first.run)

    def release(self) -> None:
        """Hold no layer any more: they run on their running statistics."""
        self.layers.clear()

    @contextmanager
    def as_leaves(self) -> Iterator[None]:
        """Use the statistics as leaves, of which a gradient that comes later is taken."""
        before, self._as_leaves = self._as_leaves, True
        try:
            yield
        finally:
            self._as_leaves = before

    def source(self, leaf: Tensor) -> Tensor:
        """Return the statistic that a leaf stands for; other tensors are their own source."""
        return self._sources.get(id(leaf), leaf)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        layer = self._layer(args, kwargs) if func is F.batch_norm else None
        return func(*args, **kwargs) if layer is None else self._normalise(layer, *args, **kwargs)

    def _layer(self, args: Any, kwargs: dict[str, Any]) -> _Layer | None:
        mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
        return self.layers.get(id(mean))

    def _normalise(
        self,
        layer: _Layer,
        input: Tensor,  # noqa: A002  # torch's name
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not self.recording:
            self._settle()
        if self.recording:
            if len(input) == 1 and layer.group is None and not running_mean.isnan().all():
                self.alone.append(layer.name)
                return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
            self._keep(layer, _statistics(input, layer.group))
            mean, variance = layer.found[-1]
        else:
            mean, variance = self._held(layer)
        shape = (1, -1, *[1] * (input.dim() - 2))
        scale = (variance + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return (input * scale.reshape(shape) + shift.reshape(shape)).to(input.dtype)

    def _keep(self, layer: _Layer, found: Statistics) -> None:
        mean, variance = (s.detach().requires_grad_() for s in found)
        if self.shared:
            pairs = zip(found, (mean, variance), strict=True)
            found = tuple(_ConstantInPass.apply(*pair, self.over) for pair in pairs)  # type: ignore[no-untyped-call]  # torch's
        layer.found.append(found)
        layer.leaves.append((mean, variance))
        self._sources.update({id(mean): found[0], id(variance): found[1]})

    def _held(self, layer: _Layer) -> Statistics:
        if not layer.found:
            raise unknown(layer.name)
        at = layer.runs % len(layer.found)
        layer.runs += 1
        return (layer.leaves if self._as_leaves else layer.found)[at]


def unknown(name: str) -> NotDifferentiableError:
    """Word that a layer has no statistics of the explained batch."""
    return refusal(
        NotDifferentiableError,
        f"{name} in train mode",
        "a layer that runs when the explained function is given the batch, on whose statistics "
        "it is explained",
        "one that does not",
        "An explainer of your own says what it explains by its attribute forward_func. Or call "
        "eval() on this layer, or pass batch_norm='running' to the prior.",
    )


def _statistics(x: Tensor, group: Any) -> Statistics:
    """Mean and biased variance of each channel, of the rows of all processes in the group."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = [d for d in range(x.dim()) if d != 1]
    if group is None or dist.get_world_size(group) == 1:
        variance, mean = torch.var_mean(x, dims, correction=0)
        return mean, variance
    count = x.new_full((1,), x.numel() / x.shape[1])
    sums = _SumOverProcesses.apply(torch.cat([x.sum(dims), count]), group)  # type: ignore[no-untyped-call]  # torch's
    mean = sums[:-1] / sums[-1]
    centred = x - mean.reshape(1, -1, *[1] * (x.dim() - 2))
    squares = _SumOverProcesses.apply(centred.square().sum(dims), group)  # type: ignore[no-untyped-call]  # torch's
    return mean, squares / sums[-1].detach()


def _equal(point: Any, given: Tensor) -> bool:
    alike = isinstance(point, Tensor) and (point.shape, point.dtype) == (given.shape, given.dtype)
    return alike and torch.equal(point, given)


class _ConstantInPass(torch.autograd.Function):
    """A statistic of the explained points: constant to them, while they are differentiated by.

    Afterwards its own gradient is asked for, which goes to the parameters. Where gradients come
    later, it is seen to depend on its leaf.
    """

    @staticmethod
    def forward(ctx: Any, statistic: Tensor, leaf: Tensor, over: list[bool]) -> Tensor:
        ctx.over = over
        return statistic.view_as(statistic)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient if ctx.over else None, None, None


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _SumOverProcesses.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]  # torch's
