r"""DeepExplainer: DeepLIFT's rescale rule against every background row.

The model runs once on three copies of each pair of an example and a background row: the example,
the row, and the row again. In the third, every nonlinear module becomes a function of the same
value whose derivative is the multiplier, of the inputs :math:`x` and outputs :math:`y` in the first
two,

.. math:: m = (y - y_b) / (x - x_b),

so that one ordinary gradient yields what SHAP's backward hooks do, and keeps its graph: the
multipliers are functions of the parameters, too. Where :math:`x = x_b` the module's own derivative
takes the quotient's place, as in SHAP. Where windows of max-pooling overlap, SHAP writes shares of
one input over each other; here they add up.

Private: ``op_handler`` of shap.explainers._deep.deep_pytorch, its rule for each class (0.51.0).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors._errors import refusal
from captum_priors._rows import Rows
from captum_priors._types import Target
from captum_priors.adapters.shap.adapter import Options, Tensors
from captum_priors.adapters.shap.gradient import ModuleAdapter, detached, differentiable_by
from captum_priors.adapters.shap.model import imported
from captum_priors.engine import check_rows, with_second_derivative

# As SHAP: differences of inputs below which its quotient is not taken, and its tolerance of sums.
_SAME, _SAME_POOLED, _ADDITIVE = 1e-6, 1e-7, 1e-2
# Pairs of an example and a background row that go through the model at once.
_PAIRS = 2048

_POOLS: dict[str, Callable[..., Any]] = {
    "MaxPool1d": F.max_pool1d,
    "MaxPool2d": F.max_pool2d,
    "MaxPool3d": F.max_pool3d,
}


class DeepAdapter(ModuleAdapter):
    """One forward pass and a gradient."""

    mechanism = "rescale rule as derivative of stand-in activations"
    draws = ()
    options = ("check_additivity",)

    def _phi(self, inputs: Tensors, targets: Sequence[Target], options: Options) -> list[Tensors]:
        n, found, backgrounds = len(inputs[0]), [], self._backgrounds()
        width = max(1, _PAIRS // len(backgrounds[0]))
        for target in targets:
            field, parts = Rows(self.model, target, (), n), []
            for some in (slice(i, min(i + width, n)) for i in range(0, n, width)):
                x, checks = tuple(a[some] for a in inputs), options.get("check_additivity", True)
                parts.append(self._part(field.of(some), x, backgrounds, checks))
            found.append(tuple(map(torch.cat, zip(*parts, strict=True))))
        return found

    def _part(self, field: Rows, inputs: Tensors, backgrounds: Tensors, checks: bool) -> Tensors:
        """Attributions of some examples."""
        pairs = (len(backgrounds[0]), field.n)
        thirds: list[Tensors] = []  # of each explained tensor: examples, backgrounds, these again
        for a, rows in zip(inputs, backgrounds, strict=True):
            x, b = a.repeat(pairs[0], *[1] * (a.dim() - 1)), rows.repeat_interleave(pairs[1], 0)
            thirds.append((x, b, b.detach().requires_grad_(b.is_floating_point())))

        def at_layer(_: nn.Module, args: Tensors) -> Tensors:
            parts = [a.chunk(3) for a in args]
            thirds[:] = [(x, b, differentiable_by(again)) for x, b, again in parts]
            return tuple(map(torch.cat, thirds))

        layer = (
            nullcontext() if self.layer is None else self.layer.register_forward_pre_hook(at_layer)
        )
        with torch.enable_grad(), layer, _rescaled_modules(self.model):
            outputs = field(tuple(map(torch.cat, thirds)))
            check_rows(outputs, 3 * pairs[0] * pairs[1])
            y, y_b, again = outputs.double().reshape(3, *pairs)
            explained = [third[2] for third in thirds]
            gradients = with_second_derivative(again.sum(), explained, allow_unused=True)
            phi = tuple(
                ((x - b) * (0 if g is None else g)).double().unflatten(0, pairs).mean(0)
                for g, (x, b, _) in zip(gradients, thirds, strict=True)
            )
        if checks:
            _check_sum(y[0] - y_b.mean(0) - sum(p.flatten(1).sum(1) for p in phi))
        return detached(phi)


def _check_sum(missing: Tensor) -> None:
    """Make SHAP's own check: operators that it does not know show in the sums."""
    worst = float(missing.detach().abs().max())
    if not worst < _ADDITIVE:
        raise refusal(
            AssertionError,
            "DeepExplainer",
            "explanations that sum up to the model's output",
            f"a difference of {worst:.3g} where SHAP tolerates {_ADDITIVE}",
            "Give functional activations modules; or accept it with check_additivity=False.",
        )


@contextmanager
def _rescaled_modules(model: nn.Module) -> Iterator[None]:
    """Give each nonlinear module, on the last third of its rows, the rule's derivative."""
    handlers = imported("shap.explainers._deep.deep_pytorch").op_handler
    kinds = [name for name, h in handlers.items() if h.__name__ in ("nonlinear_1d", "maxpool")]
    running: list[Tensors] = []

    def before(leaf: nn.Module, args: Tensors) -> Tensors:
        x, b, again = args[0].chunk(3)
        running.append((x, b, again))
        own = ((x - b).detach().abs() < _SAME) & (type(leaf).__name__ not in _POOLS)
        return (torch.cat([x, b, torch.where(own, again, again.detach())]), *args[1:])

    def after(leaf: nn.Module, args: Any, output: Tensor) -> Tensor:
        (x, b, again), (y, y_b, same) = running.pop(), output.chunk(3)
        change = again - again.detach()
        if type(leaf).__name__ in _POOLS:
            change = _pooled(leaf, (x, b), (y, y_b), change)
        else:
            change = (y - y_b) * _over(change, x - b, _SAME)
        return torch.cat([y, y_b, same + change])

    with ExitStack() as hooks:
        for leaf in model.modules():
            if type(leaf).__name__ in kinds:
                hooks.enter_context(leaf.register_forward_pre_hook(before))
                hooks.enter_context(leaf.register_forward_hook(after))
        yield


def _over(change: Tensor, dx: Tensor, threshold: float) -> Tensor:
    """Divide, where the difference is not too small.

    Twice where: the quotient that is not taken must have no NaN in its gradient.
    """
    same = dx.detach().abs() < threshold
    return torch.where(same, 0, change / torch.where(same, 1, dx))


def _pooled(leaf: Any, inputs: Tensors, outputs: Tensors, change: Tensor) -> Tensor:
    """Send an output's difference to where the maxima lie, on either side of the larger one."""
    pool, n, (y, y_b) = _POOLS[type(leaf).__name__], change.dim() - 2, outputs
    window = (leaf.kernel_size, leaf.stride, leaf.padding, leaf.dilation, leaf.ceil_mode)
    places = pool(torch.cat(inputs).detach(), *window, return_indices=True)[1].chunk(2)
    relative = _over(change, inputs[0] - inputs[1], _SAME_POOLED).flatten(-n)
    larger = torch.maximum(y, y_b)
    at, at_b = (relative.gather(-1, p.flatten(-n)).reshape(y.shape) for p in places)
    return (larger - y_b) * at + (y - larger) * at_b
