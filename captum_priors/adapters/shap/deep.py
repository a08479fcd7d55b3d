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
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors._errors import expected_found
from captum_priors._rows import take
from captum_priors._types import Target
from captum_priors.adapters.shap.adapter import output_index
from captum_priors.adapters.shap.gradient import ModuleAdapter, Tensors, capturing, detached
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
    """Two forward passes and a gradient."""

    mechanism = "rescale rule as derivative of stand-in activations"
    draws = ()
    options = ("check_additivity",)

    def _phi(
        self, inputs: Tensors, targets: Sequence[Target], options: dict[str, Any]
    ) -> list[Tensors]:
        n, parts, backgrounds = len(inputs[0]), [], self._backgrounds()
        for examples in torch.arange(n).split(max(1, _PAIRS // len(backgrounds[0]))):
            some = slice(int(examples[0]), int(examples[-1]) + 1)
            chosen = [take(target, some, n) for target in targets]
            x, checks = tuple(a[some] for a in inputs), options.get("check_additivity", True)
            parts.append(self._part(x, backgrounds, chosen, checks))
        each = zip(*parts, strict=True)  # the parts of each target
        return [tuple(map(torch.cat, zip(*found, strict=True))) for found in each]

    def _part(
        self, inputs: Tensors, backgrounds: Tensors, targets: Sequence[Target], checks: bool
    ) -> list[Tensors]:
        """Attributions of some examples, for each target."""
        pairs = (len(inputs[0]), len(backgrounds[0]))
        xs = [x.repeat_interleave(pairs[1], 0) for x in inputs]
        bs = [b.repeat(pairs[0], *[1] * (b.dim() - 1)) for b in backgrounds]
        record, reached, found = _Record(self.model), list[Tensors](), []
        with torch.enable_grad(), capturing(self.layer, reached):
            with record.first_pass():
                both = self.model(*map(torch.cat, zip(xs, bs, strict=True)))
            explained = tuple(b.detach().requires_grad_(b.is_floating_point()) for b in bs)
            with record.second_pass():
                outputs = self.model(*explained)
            deltas = [x - b for x, b in zip(xs, bs, strict=True)]
            if self.layer is not None:
                explained, deltas = reached[-1], [_difference(a) for a in reached[0]]
            at_x, at_b, outputs = (o.reshape(*pairs, -1) for o in (*both.chunk(2), outputs))
            for target in targets:
                index = output_index(target, pairs[0], outputs.shape[-1]).to(outputs.device)
                values, x, b = (
                    o[torch.arange(len(o)), :, index].double() for o in (outputs, at_x, at_b)
                )
                gradients = with_second_derivative(values.sum(), explained, allow_unused=True)
                phi = tuple(
                    (d * (0 if g is None else g)).double().unflatten(0, pairs).mean(1)
                    for g, d in zip(gradients, deltas, strict=True)
                )
                if checks:
                    _check_sum(x[:, 0] - b.mean(1) - sum(p.flatten(1).sum(1) for p in phi))
                found.append(phi)
        return list(map(detached, found))


def _check_sum(missing: Tensor) -> None:
    """Make SHAP's own check: operators that it does not know show in the sums."""
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

    def __init__(self, module: nn.Module) -> None:
        handlers = imported("shap.explainers._deep.deep_pytorch").op_handler
        kinds = [name for name, h in handlers.items() if h.__name__ in ("nonlinear_1d", "maxpool")]
        self._leaves = [m for m in module.modules() if type(m).__name__ in kinds]
        self._seen: dict[nn.Module, list[Record]] = {leaf: [] for leaf in self._leaves}

    @contextmanager
    def _hooks(self, before: Any, after: Any) -> Iterator[None]:
        with ExitStack() as hooks:
            for leaf in self._leaves:
                hooks.enter_context(leaf.register_forward_pre_hook(before))
                hooks.enter_context(leaf.register_forward_hook(after))
            yield

    def first_pass(self) -> Any:
        """Record the modules on examples and background rows, one half each."""
        inputs: list[Tensor] = []

        def before(leaf: nn.Module, args: Tensors) -> Tensors:
            inputs.append(args[0])
            return (args[0].clone(), *args[1:])  # some work in place

        def after(leaf: nn.Module, args: Any, output: Tensor) -> None:
            self._seen[leaf].append((inputs.pop(), output.clone()))

        return self._hooks(before, after)

    def second_pass(self) -> Any:
        """Give each module the derivative that the rescale rule asks for."""
        calls = {leaf: iter(seen) for leaf, seen in self._seen.items()}
        running: list[tuple[Tensor, Record]] = []

        def before(leaf: nn.Module, args: Tensors) -> Tensors:
            x, record = args[0], next(calls[leaf])
            running.append((x, record))
            own = _difference(record[0]).detach().abs() < _SAME
            own = own & (type(leaf).__name__ not in _POOLS)
            return (torch.where(own, x, x.detach()), *args[1:])

        def after(leaf: nn.Module, args: Any, output: Tensor) -> Tensor:
            x, record = running.pop()
            change = _pooled if type(leaf).__name__ in _POOLS else _rescaled
            return output + change(leaf, record, x - x.detach())

        return self._hooks(before, after)


def _difference(both: Tensor) -> Tensor:
    x, b = both.chunk(2)
    return x - b


def _rescaled(leaf: nn.Module, record: Record, change: Tensor) -> Tensor:
    dx, dy = map(_difference, record)
    return dy * _over(change, dx, _SAME)


def _over(change: Tensor, dx: Tensor, threshold: float) -> Tensor:
    """Divide, where the difference is not too small.

    Twice where: the quotient that is not taken must have no NaN in its gradient.
    """
    same = dx.detach().abs() < threshold
    return torch.where(same, 0, change / torch.where(same, 1, dx))


def _pooled(leaf: Any, record: Record, change: Tensor) -> Tensor:
    """Send an output's difference to where the maxima lie, on either side of the larger one."""
    pool, n = _POOLS[type(leaf).__name__]
    window = (leaf.kernel_size, leaf.stride, leaf.padding, leaf.dilation, leaf.ceil_mode)
    places = pool(record[0].detach(), *window, return_indices=True)[1].chunk(2)
    relative = _over(change, _difference(record[0]), _SAME_POOLED).flatten(-n)
    y, yb = record[1].chunk(2)
    larger = torch.maximum(y, yb)
    at, at_b = (relative.gather(-1, p.flatten(-n)).reshape(y.shape) for p in places)
    return (larger - yb) * at + (y - larger) * at_b
