r"""DeepExplainer: DeepLIFT's rescale rule against every background row.

A first pass keeps input :math:`x` and output :math:`y` of every nonlinear module, for the example
and for the background row :math:`b`. A second pass, on the background row, replaces each of these
modules by a function of the same value whose derivative is the multiplier

.. math:: m = (y - y_b) / (x - x_b),

so that one ordinary gradient yields what SHAP's backward hooks do, and keeps its graph: the
multipliers are functions of the parameters, too. Where :math:`x = x_b` the module's own derivative
takes the quotient's place, as in SHAP. Where windows of max-pooling overlap, SHAP writes shares of
one input over each other; here they add up.

Private: ``op_handler`` of shap.explainers._deep.deep_pytorch, its rule for each class (0.51.0).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors._captum import selected
from captum_priors._errors import expected_found
from captum_priors._rows import take
from captum_priors._types import Target
from captum_priors.adapters.shap.gradient import ModuleAdapter
from captum_priors.adapters.shap.model import imported
from captum_priors.engine import with_second_derivative

# As SHAP: differences of inputs below which its quotient is not taken, and its tolerance of sums.
_SAME, _SAME_POOLED, _ADDITIVE = 1e-6, 1e-7, 1e-2
# Pairs of an example and a background row that go through the model at once.
_PAIRS = 2048

_POOLS: dict[str, tuple[Callable[..., Any], int]] = {
    "MaxPool1d": (F.max_pool1d, 1),
    "MaxPool2d": (F.max_pool2d, 2),
    "MaxPool3d": (F.max_pool3d, 3),
}
Record = tuple[Tensor, Tensor]


class DeepAdapter(ModuleAdapter):
    """Two forward passes and a gradient; no hook and no attribute is left on the model."""

    draws = ()
    options = ("check_additivity",)

    def _phi(
        self, inputs: list[Tensor], targets: Sequence[Target], options: dict[str, Any]
    ) -> list[tuple[Tensor, ...]]:
        backgrounds = self._backgrounds()
        n, checks = len(inputs[0]), options.get("check_additivity", True)
        step = max(1, _PAIRS // len(backgrounds[0]))
        parts = []
        for start in range(0, n, step):
            some = slice(start, min(start + step, n))
            chosen = [take(target, some, n) for target in targets]
            parts.append(self._part([x[some] for x in inputs], backgrounds, chosen, checks))
        return [
            tuple(map(torch.cat, zip(*(part[i] for part in parts), strict=True)))
            for i in range(len(targets))
        ]

    def _part(
        self,
        inputs: list[Tensor],
        backgrounds: list[Tensor],
        targets: Sequence[Target],
        checks: bool,
    ) -> list[tuple[Tensor, ...]]:
        pair = (len(inputs[0]), len(backgrounds[0]))
        xs = [x.repeat_interleave(pair[1], 0) for x in inputs]
        bs = [b.repeat(pair[0], *[1] * (b.dim() - 1)) for b in backgrounds]
        found = []
        with torch.enable_grad():
            record = _Record(self.model, self.layer)
            with record.first_pass():
                both = self.model(*map(torch.cat, zip(xs, bs, strict=True)))
            points = tuple(b.detach().requires_grad_(b.is_floating_point()) for b in bs)
            with record.second_pass():
                outputs = self.model(*points)
            explained, deltas = points, [x - b for x, b in zip(xs, bs, strict=True)]
            if self.layer is not None:
                explained, deltas = record.reached, record.differences
            for target in targets:
                values, at_x, at_b = (
                    torch.stack([selected(o, target) for o in half.unflatten(0, pair).unbind(1)], 1)
                    if half.dim() > 1 and target is not None
                    else half.reshape(pair)
                    for half in (outputs, *both.chunk(2))
                )
                gradients = with_second_derivative(values.sum(), explained, allow_unused=True)
                each = [
                    (d * (0 if g is None else g)).double().unflatten(0, pair).mean(1)
                    for g, d in zip(gradients, deltas, strict=True)
                ]
                if checks:
                    total = torch.stack([p.flatten(1).sum(1) for p in each]).sum(0)
                    _check_sums(at_x[:, 0].double() - at_b.double().mean(1) - total)
                found.append(tuple(each))
        if torch.is_grad_enabled():
            return found
        return [tuple(p.detach() for p in each) for each in found]


def _check_sums(missing: Tensor) -> None:
    """SHAP's own check: operators that it does not know show in the sums."""
    worst = float(missing.detach().abs().max())
    if not worst < _ADDITIVE:
        raise AssertionError(
            expected_found(
                "DeepExplainer",
                "explanations that sum up to the model's output",
                f"a difference of {worst:.3g} where SHAP tolerates {_ADDITIVE}",
                "An operator of the model is not one of DeepExplainer's modules (a functional "
                "activation, say). Pass check_additivity=False to accept it.",
            )
        )


class _Record:
    """Inputs and outputs of the nonlinear modules, call by call."""

    def __init__(self, module: nn.Module, layer: nn.Module | None) -> None:
        handlers = imported("shap.explainers._deep.deep_pytorch").op_handler
        rules = {name: handler.__name__ for name, handler in handlers.items()}
        self._leaves = [
            leaf
            for leaf in module.modules()
            if not list(leaf.children())
            and rules.get(type(leaf).__name__) in ("nonlinear_1d", "maxpool")
        ]
        self._layer = layer
        self._seen: dict[nn.Module, list[Record]] = {}
        self.reached: tuple[Tensor, ...] = ()
        self.differences: list[Tensor] = []

    @contextmanager
    def _hooks(self, before: Any, after: Any, at_layer: Any) -> Iterator[None]:
        handles = [leaf.register_forward_pre_hook(before) for leaf in self._leaves]
        handles += [leaf.register_forward_hook(after) for leaf in self._leaves]
        if self._layer is not None:
            handles.append(self._layer.register_forward_pre_hook(at_layer, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Record the modules on examples and background rows, one half each."""
        inputs: list[Tensor] = []

        def before(leaf: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs.append(args[0])
            return (args[0].clone(), *args[1:])  # some work in place

        def after(leaf: nn.Module, args: Any, output: Tensor) -> None:
            self._seen.setdefault(leaf, []).append((inputs.pop(), output.clone()))

        def at_layer(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.differences = [torch.sub(*a.chunk(2)) for a in args]

        with self._hooks(before, after, at_layer):
            yield

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Give each module the derivative that the rescale rule asks for."""
        calls = {leaf: iter(seen) for leaf, seen in self._seen.items()}
        running: list[tuple[Tensor, Record]] = []

        def before(leaf: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, record = args[0], next(calls[leaf])
            running.append((x, record))
            if type(leaf).__name__ in _POOLS:
                return (x.detach(), *args[1:])
            return (torch.where(_same(record, _SAME), x, x.detach()), *args[1:])

        def after(leaf: nn.Module, args: Any, output: Tensor) -> Tensor:
            x, record = running.pop()
            change = _pooled if type(leaf).__name__ in _POOLS else _rescaled
            return output + change(leaf, record, x - x.detach())

        def at_layer(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.reached = tuple(
                a if a.requires_grad else a.detach().requires_grad_() for a in args
            )
            return self.reached

        with self._hooks(before, after, at_layer):
            yield


def _same(record: Record, threshold: float) -> Tensor:
    x, b = record[0].detach().chunk(2)
    return (x - b).abs() < threshold


def _rescaled(leaf: nn.Module, record: Record, change: Tensor) -> Tensor:
    dx, dy = (torch.sub(*both.chunk(2)) for both in record)
    same = _same(record, _SAME)
    # Twice where: the quotient that is not taken must have no NaN in its gradient.
    return torch.where(same, 0, dy / torch.where(same, 1, dx)) * change


def _pooled(leaf: Any, record: Record, change: Tensor) -> Tensor:
    """Send an output's difference to where the maxima lie, on either side of the larger one."""
    pool, n = _POOLS[type(leaf).__name__]
    window = (leaf.kernel_size, leaf.stride, leaf.padding, leaf.dilation, leaf.ceil_mode)
    _, places = pool(record[0].detach(), *window, return_indices=True)
    dx = torch.sub(*record[0].chunk(2)).flatten(-n)
    same = dx.detach().abs() < _SAME_POOLED
    relative = torch.where(same, 0, change.flatten(-n) / torch.where(same, 1, dx))
    (y, yb), (at, at_b) = record[1].chunk(2), places.chunk(2)
    larger = torch.maximum(y, yb)
    shares = ((larger - yb, at), (y - larger, at_b))
    return torch.stack(
        [s * relative.gather(-1, place.flatten(-n)).reshape(s.shape) for s, place in shares]
    ).sum(0)
