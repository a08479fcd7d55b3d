r"""GradientExplainer: expected gradients, on SHAP's draws and in a few batches.

.. math:: \phi = \frac1K \sum_k (x - b_k) \odot \nabla f\big(t_k x + (1 - t_k) b_k\big)

At an interim layer SHAP multiplies by the layer's input itself instead of a difference, and so does
this.

Private: ``explainer`` and what it holds, ``model``, ``layer``, ``data``, ``model_inputs``,
``multi_input``, ``local_smoothing``, ``input_handle`` (0.51.0).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._checks import check_floating
from captum_priors._rows import Rows
from captum_priors._types import Target
from captum_priors.adapters.shap.adapter import Options, ShapAdapter, Tensors, explanation
from captum_priors.adapters.shap.model import numbers, refused
from captum_priors.attr.path_sum import Draws, PathSum
from captum_priors.engine import with_second_derivative

# Points of one forward pass; SHAP's batch_size bounds its memory, here the graph does.
_POINTS = 2048


class ModuleAdapter(ShapAdapter):
    """Explains a module that SHAP holds itself, at its inputs or those of one of its layers."""

    def _start(self) -> None:
        self.inner = self.explainer.explainer
        self.layer: nn.Module | None = getattr(self.inner, "layer", None)
        if getattr(self.inner, "input_handle", None) is not None:
            # What SHAP's constructor leaves on the layer, its own call removes and adds again.
            self.inner.input_handle.remove()
            self.inner.input_handle = None
            vars(self.layer).pop("target_input", None)
        self._held: list[Tensor] = getattr(self.inner, "model_inputs", self.inner.data)

    def _function(self) -> Any:
        return self.inner.model

    def _sample(self) -> Sequence[Any]:
        return [b[:8] for b in self._held]

    def _backgrounds(self) -> Tensors:
        """Reference rows, one tensor for each input of the model."""
        return tuple(self._torch.convert(b.detach()) for b in self._held)

    def _base(self) -> Tensor:
        return self._torch(*self._backgrounds()).mean(0)

    def _all(self, X: Any, options: Options) -> tuple[list[Tensor], Tensors]:  # noqa: N803  # SHAP's
        """Attributions ``(rows, ..., outputs)`` of all outputs, and the inputs."""
        rows = X if self.inner.multi_input else [X]
        inputs = tuple(self._torch.convert(torch.as_tensor(x)) for x in rows)
        each = self._phi(inputs, range(np.size(self.expected_value)), options)
        return [torch.stack(outputs, dim=-1) for outputs in zip(*each, strict=True)], inputs

    def _explain(self, rows: Any, options: Options) -> Any:
        phi, inputs = self._all(rows, options)
        base = self._base().expand(len(inputs[0]), -1)
        names = getattr(self.explainer, "features", None)
        data = inputs if self.layer is None else [None] * len(phi)
        if base.shape[1] == 1:  # SHAP's plots take no axis of one output
            phi, base = [p.squeeze(-1) for p in phi], base.squeeze(-1)
        found = [explanation(p, base, x, names) for p, x in zip(phi, data, strict=True)]
        return found if len(found) > 1 else found[0]

    @torch.no_grad()
    def shap_values(self, X: Any, **options: Any) -> Any:  # noqa: N803  # SHAP's name
        """Explain as SHAP, arrays alone, with an axis for the outputs even where there is one."""
        arrays = [numbers(p) for p in self._all(X, options)[0]]
        return arrays if len(arrays) > 1 else arrays[0]

    def _values(
        self, tensors: Tensors, targets: Sequence[Target], options: Options
    ) -> list[Tensors]:
        given = tuple(map(self._torch.convert, tensors))
        if self.layer is None:
            check_floating(given)
        return self._phi(given, targets, options)

    def _phi(self, inputs: Tensors, targets: Sequence[Target], options: Options) -> list[Tensors]:
        """Attributions of the explained tensors, for each target."""
        raise NotImplementedError


class GradientAdapter(ModuleAdapter):
    """SHAP's draws; the sum and its gradients are those of ExpectedGradients."""

    mechanism = "draws of SHAP's loop, gradients by the engine"
    held_fixed = "draws"
    differentiations = ("double_backprop", "recompute", "finite_difference")
    options = ("nsamples", "rseed")

    def _start(self) -> None:
        super()._start()
        smoothing, way = self.inner.local_smoothing, self.differentiation
        if smoothing or (self.layer is not None and way != "double_backprop"):
            raise refused(
                "GradientExplainer",
                "no local_smoothing, and at a layer differentiation='double_backprop'",
                f"local_smoothing={smoothing}, {way!r}",
                "Use ExpectedGradients or LayerExpectedGradients, which have stdevs and every way.",
            )

    def _phi(self, inputs: Tensors, targets: Sequence[Target], options: Options) -> list[Tensors]:
        check_floating(inputs)
        seed, n_samples, n = options.get("rseed"), options.get("nsamples", 200), len(inputs[0])
        if seed is None:  # SHAP's draw from the global stream, and its only one
            seed = np.random.randint(0, 1e6)  # type: ignore[call-overload]  # noqa: NPY002  # as SHAP
        random = np.random.RandomState(int(seed))  # draws as the global generator that SHAP seeds
        drawn = [
            (random.choice(len(self._held[0])), random.uniform()) for _ in range(n * n_samples)
        ]
        rows, alphas = torch.tensor(drawn, dtype=torch.float64, device=inputs[0].device).T
        rows, alphas = (t.reshape(n, n_samples).T for t in (rows.long(), alphas))
        draws, backgrounds = Draws((rows,) * len(inputs), alphas, 0), self._backgrounds()
        found = []
        for target in targets:
            field = Rows(self.model, target, (), n)
            if self.layer is None:
                way, still = self.differentiation, (0.0,) * len(inputs)
                path = PathSum(field, draws, still, True, False, way, _POINTS)
                found.append(path.attributions(inputs, backgrounds))
            else:
                found.append(_at_layer(self.layer, field, draws, inputs, backgrounds))
        return found


def _at_layer(
    layer: nn.Module, field: Rows, draws: Draws, inputs: Tensors, backgrounds: Tensors
) -> Tensors:
    """Means of the layer's inputs times the gradients by them, some samples at a time."""
    parts, n, width = [], field.n, max(1, _POINTS // field.n)
    reached: list[Tensors] = []

    def at_layer(_: nn.Module, args: Tensors) -> Tensors:
        reached.append(tuple(map(differentiable_by, args)))
        return reached[-1]

    for rows, alphas in zip(draws.rows[0].split(width), draws.alphas.split(width), strict=True):
        points = []
        for x, b in zip(inputs, backgrounds, strict=True):
            t = alphas.to(x).reshape(*alphas.shape, *[1] * (x.dim() - 1))
            points.append(torch.lerp(b[rows], x, t).flatten(0, 1))
        with torch.enable_grad(), layer.register_forward_pre_hook(at_layer):
            outputs = field(tuple(points))
            gradients = with_second_derivative(outputs.sum(), reached[-1])
        products = (g * a for g, a in zip(gradients, reached[-1], strict=True))
        parts.append(detached(tuple(p.unflatten(0, (-1, n)).sum(0) for p in products)))
    return tuple(sum(each) / len(draws.alphas) for each in zip(*parts, strict=True))


def differentiable_by(tensor: Tensor) -> Tensor:
    """Return a tensor that gradients can be taken by, with its graph where it has one."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def detached(tensors: Tensors) -> Tensors:
    """Let go of graphs where none is recorded."""
    return tensors if torch.is_grad_enabled() else tuple(t.detach() for t in tensors)
