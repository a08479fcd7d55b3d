r"""DeepExplainer: DeepLIFT's rescale rule against every background row.

A first pass keeps input :math:`x` and output :math:`y` of every nonlinear module, for the example
and for the background row :math:`b`. A second pass, on the background row, replaces each of these
modules by a function of the same value whose derivative is the multiplier

.. math:: m = (y - y_b) / (x - x_b),

so that one ordinary gradient yields what SHAP's backward hooks do, and keeps its graph: the
multipliers are functions of the parameters, too. Where :math:`x = x_b` the module's own derivative
takes the quotient's place, as in SHAP. The first call holds one row against SHAP's hooks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors._engine._first_order import with_second_derivative
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors.adapters._shap._door import shap_module
from captum_priors.adapters._shap._shap_check import in_precision
from captum_priors.adapters._shap._torch_family import TorchFamily

# As SHAP: differences of inputs below which its quotient is not taken.
_SAME_INPUT = 1e-6
_SAME_POOLED = 1e-7
# Pairs of an example and a background row that go through the model at once.
_PAIRS = 2048

_POOLS: dict[str, Callable[..., Any]] = {
    "MaxPool1d": F.max_pool1d,
    "MaxPool2d": F.max_pool2d,
    "MaxPool3d": F.max_pool3d,
}


class DeepFamily(TorchFamily):
    """Two forward passes and a gradient; no hook and no attribute is left on the model."""

    _only_way = (
        "Its multipliers are quotients of activations, and not input gradients of the model."
    )
    _check_options: ClassVar[dict[str, Any]] = {"check_additivity": False}

    def _prepare_check(self, twin: Any, inputs: list[Tensor]) -> list[Tensor] | None:
        """Compare in double precision, which quotients of small differences need."""
        rows = in_precision(torch.float64, twin, inputs)
        return None if _differs_by_design(twin.model, rows) else rows

    @leaves_inference_mode
    def shap_values(
        self,
        X: Any,  # noqa: N803  # SHAP's name
        ranked_outputs: Any = None,
        output_rank_order: str = "max",
        check_additivity: bool = True,
    ) -> Any:
        """Return arrays, as SHAP."""
        if self._torch_model() is None:
            return self._stock.shap_values(
                self, X, ranked_outputs, output_rank_order, check_additivity
            )
        inputs = [x.detach() for x in self._as_inputs(X)]
        with self._still(), torch.no_grad():
            self._check_once(inputs)
            outputs, ranks = self._ranked(inputs, ranked_outputs, output_rank_order)
            phi = self._phi(inputs, outputs, {"check_additivity": check_additivity})
        arrays = [p.cpu().numpy() for p in phi]
        values: Any = arrays if self.explainer.multi_input else arrays[0]
        return values if ranked_outputs is None else (values, ranks)

    def _phi(
        self, inputs: list[Tensor], outputs: list[Any], options: dict[str, Any]
    ) -> list[Tensor]:
        backgrounds = self._backgrounds()
        n, n_background = inputs[0].shape[0], backgrounds[0].shape[0]
        step = max(1, _PAIRS // n_background)
        parts = []
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            chosen = [o[rows] if isinstance(o, Tensor) else o for o in outputs]
            parts.append(self._part([x[rows] for x in inputs], backgrounds, chosen))
        phi = [torch.cat(each) for each in zip(*parts, strict=True)]
        if options.get("check_additivity", True):
            self._check_sums(inputs, outputs, phi)
        return phi

    def _part(
        self, inputs: list[Tensor], backgrounds: list[Tensor], outputs: list[Any]
    ) -> tuple[Tensor, ...]:
        n, n_background = inputs[0].shape[0], backgrounds[0].shape[0]
        pairs = [
            (x.repeat_interleave(n_background, 0), b.repeat(n, *[1] * (b.dim() - 1)))
            for x, b in zip(inputs, backgrounds, strict=True)
        ]
        with torch.enable_grad():
            record = _Record(self._module, self._layer())
            with record.first_pass():
                self._module(*(torch.cat(pair) for pair in pairs))
            points = [b if b.requires_grad else b.detach().requires_grad_() for _, b in pairs]
            with record.second_pass():
                values = self._module(*points)
            explained: Sequence[Tensor] = points
            deltas = [x - b for x, b in pairs]
            if self._layer() is not None:
                explained = record.reached
                deltas = record.layer_differences()
            phi = []
            for output in outputs:
                index: Any = output
                if isinstance(output, Tensor):
                    index = output.to(values.device).repeat_interleave(n_background).long()
                    chosen = values.gather(1, index.unsqueeze(1))
                else:
                    chosen = values[:, index]
                gradients = with_second_derivative(chosen.sum(), explained, allow_unused=True)
                phi.append(
                    [
                        torch.zeros_like(d).double().unflatten(0, (n, n_background)).mean(1)
                        if g is None
                        else (g * d).double().unflatten(0, (n, n_background)).mean(1)
                        for g, d in zip(gradients, deltas, strict=True)
                    ]
                )
        stacked = tuple(torch.stack(each, dim=-1) for each in zip(*phi, strict=True))
        return stacked if torch.is_grad_enabled() else tuple(p.detach() for p in stacked)

    @torch.no_grad()
    def _check_sums(self, inputs: list[Tensor], outputs: list[Any], phi: list[Tensor]) -> None:
        """SHAP's own check: operators that it does not know show in the sums."""
        values, base = self._module(*inputs), self._base()
        ranks = [
            (o.to(values.device) if isinstance(o, Tensor) else torch.full((len(values),), o))
            for o in outputs
        ]
        index = torch.stack([r.long().to(values.device) for r in ranks], dim=1)
        total = sum(p.flatten(1, -2).sum(1) for p in phi)
        error = values.double().gather(1, index) - base[index] - total
        worst = float(error.abs().max())
        assert worst < _ADDITIVE, (
            "The SHAP explanations do not sum up to the model's output! An operator of the model "
            "is not one of DeepExplainer's modules (a functional activation, say). Pass "
            f"check_additivity=False to accept it. Max. diff: {worst} - Tolerance: {_ADDITIVE}"
        )


# SHAP's tolerance.
_ADDITIVE = 1e-2


def _nonlinear_leaves(module: nn.Module) -> list[tuple[nn.Module, str]]:
    handlers = shap_module("explainers._deep.deep_pytorch").op_handler
    kinds = {name: handler.__name__ for name, handler in handlers.items()}
    return [
        (m, kinds[type(m).__name__])
        for m in module.modules()
        if not list(m.children()) and kinds.get(type(m).__name__) in ("nonlinear_1d", "maxpool")
    ]


def _differs_by_design(module: nn.Module, inputs: list[Tensor]) -> bool:
    """Find modules that run twice, and pooling windows that overlap: SHAP mixes up their parts."""
    leaves = _nonlinear_leaves(module)
    runs: list[nn.Module] = []
    handles = [leaf.register_forward_hook(lambda m, *_: runs.append(m)) for leaf, _ in leaves]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return len(runs) > len(set(runs)) or any(
        _overlaps(leaf) for leaf, kind in leaves if kind == "maxpool"
    )


def _overlaps(pool: Any) -> bool:
    sizes = (pool.kernel_size, pool.stride, pool.dilation)
    each = [s if isinstance(s, tuple) else (s,) * leaf_dims(pool) for s in sizes]
    return any(d * (k - 1) >= s for k, s, d in zip(*each, strict=True))


class _Record:
    """Inputs and outputs of the nonlinear modules, call by call."""

    def __init__(self, module: nn.Module, layer: nn.Module | None) -> None:
        self._leaves = _nonlinear_leaves(module)
        self._layer = layer
        self._seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._layer_inputs: list[tuple[Tensor, ...]] = []
        self.reached: tuple[Tensor, ...] = ()

    @contextmanager
    def _hooks(self, before: Any, after: Any, at_layer: Any) -> Iterator[None]:
        handles = []
        if self._layer is not None:
            handles.append(self._layer.register_forward_pre_hook(at_layer))
        for leaf, kind in self._leaves:
            handles.append(leaf.register_forward_pre_hook(before))
            handles.append(leaf.register_forward_hook(after[kind]))
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
            self._layer_inputs.append(args)

        with self._hooks(before, {"nonlinear_1d": after, "maxpool": after}, at_layer):
            yield

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Give each module the derivative that the rescale rule asks for."""
        moving: list[Tensor] = []
        calls = {leaf: iter(seen) for leaf, seen in self._seen.items()}
        kinds = dict(self._leaves)

        def before(leaf: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            moving.append(x)
            if kinds[leaf] == "maxpool":
                return (x.detach(), *args[1:])
            first, reference = _halves(self._peek(leaf, calls)[0])
            same = (first - reference).detach().abs() < _SAME_INPUT
            return (torch.where(same, x, x.detach()), *args[1:])

        def nonlinear(leaf: nn.Module, args: Any, output: Tensor) -> Tensor:
            x = moving.pop()
            inputs, outputs = next(calls[leaf])
            (a, b), (ya, yb) = _halves(inputs), _halves(outputs)
            difference = a - b
            same = difference.detach().abs() < _SAME_INPUT
            # Twice where: the quotient that is not taken must have no NaN in its gradient.
            slope = torch.where(same, 0, (ya - yb) / torch.where(same, 1, difference))
            return output + slope * (x - x.detach())

        def pooled(leaf: nn.Module, args: Any, output: Tensor) -> Tensor:
            x = moving.pop()
            inputs, outputs = next(calls[leaf])
            return output + _pool_change(leaf, inputs, outputs, x - x.detach())

        def at_layer(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.reached = args

        with self._hooks(before, {"nonlinear_1d": nonlinear, "maxpool": pooled}, at_layer):
            yield

    def _peek(self, leaf: nn.Module, calls: dict[nn.Module, Any]) -> tuple[Tensor, Tensor]:
        record: tuple[Tensor, Tensor] = next(calls[leaf])
        rest = calls[leaf]

        def again() -> Iterator[tuple[Tensor, Tensor]]:
            yield record
            yield from rest

        calls[leaf] = again()
        return record

    def layer_differences(self) -> list[Tensor]:
        """Differences of the layer's inputs between examples and background rows."""
        return [a - b for a, b in map(_halves, self._layer_inputs[-1])]


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2)
    return first, second


def _pool_change(leaf: Any, inputs: Tensor, outputs: Tensor, change: Tensor) -> Tensor:
    """Send an output's difference to where the maxima lie, on either side of the larger one.

    SHAP writes these shares over each other where windows overlap; here they add up.
    """
    pool = _POOLS[type(leaf).__name__]
    _, places = pool(
        inputs.detach(),
        leaf.kernel_size,
        leaf.stride,
        leaf.padding,
        leaf.dilation,
        leaf.ceil_mode,
        return_indices=True,
    )
    (x, b), (y, yb), (at, at_b) = _halves(inputs), _halves(outputs), _halves(places)
    spatial = leaf_dims(leaf)
    difference = (x - b).flatten(-spatial)
    same = difference.detach().abs() < _SAME_POOLED
    relative = torch.where(same, 0, change.flatten(-spatial) / torch.where(same, 1, difference))
    larger = torch.maximum(y, yb)
    shares = ((larger - yb, at), (y - larger, at_b))
    return torch.stack(
        [
            size * relative.gather(-1, place.flatten(-spatial)).reshape(size.shape)
            for size, place in shares
        ]
    ).sum(0)


def leaf_dims(leaf: nn.Module) -> int:
    """Count the spatial dimensions of a pooling module."""
    return int(type(leaf).__name__[len("MaxPool")])
