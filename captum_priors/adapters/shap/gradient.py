r"""GradientExplainer: expected gradients, on SHAP's draws and in a few batches.

.. math:: \phi = \frac1K \sum_k (x - b_k) \odot \nabla f\big(t_k x + (1 - t_k) b_k\big)

At an interim layer SHAP multiplies by the layer's input itself instead of a difference, and so does
this. Token ids cannot be interpolated, and SHAP fails on them: there the layer's inputs are, and
multiplied by their difference, as the equation says.

Private: ``explainer`` and what it holds, ``model``, ``layer``, ``data``, ``model_inputs``,
``multi_input``, ``local_smoothing``, ``input_handle`` (0.51.0).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._checks import check_floating
from captum_priors._errors import expected_found
from captum_priors._rows import Rows, take
from captum_priors._types import Target
from captum_priors.adapters.shap.adapter import ShapAdapter, explanation
from captum_priors.adapters.shap.model import refused
from captum_priors.engine import (
    Visit,
    input_gradients,
    keep_graph,
    recompute,
    with_second_derivative,
)

# Points of one forward pass; SHAP's batch_size bounds its memory, here the graph does.
_POINTS = 2048

Tensors = tuple[Tensor, ...]


class ModuleAdapter(ShapAdapter):
    """Explains a module that SHAP holds itself, at its inputs or those of one of its layers."""

    def _start(self) -> None:
        self.inner = self.explainer.explainer
        self.layer: nn.Module | None = getattr(self.inner, "layer", None)
        module = getattr(self.inner, "model", None)
        if not isinstance(module, nn.Module) or self.given not in (None, module):
            raise refused(
                f"`model` of {type(self.explainer).__name__}",
                "none beside the torch module that SHAP holds",
                f"{type(self.given).__name__} beside {type(module).__name__}",
                "Leave it out; TensorFlow's models have no graph in torch.",
            )
        if getattr(self.inner, "input_handle", None) is not None:
            # What SHAP's constructor leaves on the layer, its own call removes and adds again.
            self.inner.input_handle.remove()
            self.inner.input_handle = None
            vars(self.layer).pop("target_input", None)
        self._held: list[Tensor] = getattr(self.inner, "model_inputs", self.inner.data)

    def _function(self) -> Any:
        return self.inner.model

    def _sample(self) -> Sequence[Any] | None:
        whole = any(not b.is_floating_point() for b in self._held)
        return [b[:8] for b in self._held] if whole else None

    def _backgrounds(self) -> Tensors:
        """Reference rows, one tensor for each input of the model."""
        return tuple(self._torch.convert(b.detach()) for b in self._held)

    def _base(self) -> Tensor:
        return self._torch(*self._backgrounds()).mean(0)

    def _all(self, X: Any, options: dict[str, Any]) -> tuple[list[Tensor], Tensors]:  # noqa: N803  # SHAP's
        """Attributions ``(rows, ..., outputs)`` of all outputs, and the inputs."""
        rows = X if self.inner.multi_input else [X]
        if not isinstance(rows, (list, tuple)) or len(rows) != len(self._held):
            raise TypeError(
                expected_found(
                    "`X`",
                    f"a list of {len(self._held)} tensors",
                    type(X).__name__,
                    "Pass what the background has: one tensor for each input of the model.",
                )
            )
        inputs = tuple(self._torch.convert(torch.as_tensor(x)) for x in rows)
        each = self._phi(inputs, range(np.size(self.expected_value)), options)
        return [torch.stack(outputs, dim=-1) for outputs in zip(*each, strict=True)], inputs

    def _explain(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        phi, inputs = self._all(args[0], options)
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
        arrays = [p.cpu().numpy() for p in self._all(X, options)[0]]
        return arrays if len(arrays) > 1 else arrays[0]

    def _values(self, tensors: Tensors, target: Target, options: dict[str, Any]) -> Tensors:
        if self.layer is not None:
            raise refused(
                f"`attribute` of {type(self.explainer).__name__}",
                "an explainer of the model's inputs",
                "one of a layer, whose attributions are not like the inputs",
                "Use adapter(X).tensor, or LayerExpectedGradients.",
            )
        given = tuple(map(self._torch.convert, tensors))
        check_floating(given)
        return self._phi(given, [target], options)[0]

    def _phi(
        self, inputs: Tensors, targets: Sequence[Target], options: dict[str, Any]
    ) -> list[Tensors]:
        """Attributions of the explained tensors, for each target."""
        raise NotImplementedError


class GradientAdapter(ModuleAdapter):
    """SHAP's draws; the gradients are the engine's, so every way of taking them works."""

    mechanism = "draws of SHAP's loop, gradients by the engine"
    held_fixed = "draws"
    differentiations = ("double_backprop", "recompute", "finite_difference")
    draws = ("torch", "numpy")
    options = ("nsamples", "rseed")

    def _phi(
        self, inputs: Tensors, targets: Sequence[Target], options: dict[str, Any]
    ) -> list[Tensors]:
        if self.layer is not None and self.differentiation != "double_backprop":
            raise refused(
                "GradientExplainer at a layer",
                "differentiation='double_backprop'",
                repr(self.differentiation),
                "The layer's input depends on the parameters below it, which only a graph "
                "takes into account.",
            )
        seed, n_samples = options.get("rseed"), int(options.get("nsamples", 200))
        if seed is None:  # SHAP's draw from the global stream, and its only one
            seed = np.random.randint(0, 1e6)  # type: ignore[call-overload]  # noqa: NPY002
        rows, alphas = self._draws(len(inputs[0]), n_samples, int(seed))
        found = []
        for target in targets:
            program = partial(self._sum, target, rows, alphas, self._noise(inputs, n_samples))
            if self.differentiation == "recompute":
                found.append(recompute(program, inputs, forward_func=self.model))
            else:
                found.append(program(inputs, keep_graph))
        return found

    def _draws(self, n: int, n_samples: int, seed: int) -> tuple[Tensor, Tensor]:
        """Reference rows and places between, ``(samples, examples)``, in SHAP's order."""
        random = np.random.RandomState(seed)  # draws as the global generator that SHAP seeds
        drawn = [
            (random.choice(len(self._held[0])), random.uniform()) for _ in range(n * n_samples)
        ]
        rows, alphas = np.array(drawn).reshape(n, n_samples, 2).transpose(2, 1, 0)
        return torch.as_tensor(rows).long(), torch.as_tensor(alphas)

    def _noise(self, inputs: Tensors, n_samples: int) -> list[Tensor]:
        """SHAP's smoothing, from torch's generator, anew for each output."""
        if not self.inner.local_smoothing > 0:
            return []
        drawn = [
            [torch.empty(x.shape[1:], device=x.device).normal_() for x in inputs]
            for _ in range(len(inputs[0]) * n_samples)
        ]
        each = [torch.stack(e).unflatten(0, (-1, n_samples)) for e in zip(*drawn, strict=True)]
        return [self.inner.local_smoothing * e.transpose(0, 1) for e in each]

    def _sum(
        self,
        target: Target,
        rows: Tensor,
        alphas: Tensor,
        noise: list[Tensor],
        inputs: Tensors,
        visit: Visit,
    ) -> Tensors:
        """Attributions to one output, some examples at a time."""
        parts, (n_samples, n) = [], rows.shape
        for examples in torch.arange(n).split(max(1, _POINTS // n_samples)):
            some = slice(int(examples[0]), int(examples[-1]) + 1)
            field = Rows(self.model, take(target, some, n), (), len(examples))
            x = tuple(a[some] for a in inputs)
            moved = [a + e[:, some].to(a) for a, e in zip(x, noise, strict=True)] if noise else x
            gradients, factors = self._gradients(field, x, moved, rows[:, some], alphas[:, some])
            part = tuple(
                (g.double() * f.double()).unflatten(0, (n_samples, -1)).mean(0)
                for g, f in zip(gradients, factors, strict=True)
            )
            parts.append(visit(part if torch.is_grad_enabled() else detached(part), some))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _gradients(
        self, field: Rows, x: Tensors, moved: Sequence[Tensor], rows: Tensor, alphas: Tensor
    ) -> tuple[Tensors, Tensors]:
        """Gradients at the points between, and what they are multiplied by."""
        references = [b[rows.to(b.device)] for b in self._backgrounds()]
        if not all(a.is_floating_point() for a in x):
            return self._at_tokens(field, x, tuple(b.flatten(0, 1) for b in references), alphas)
        pairs = [(a.expand_as(b), b) for a, b in zip(moved, references, strict=True)]
        points = tuple(_between(a.flatten(0, 1), b.flatten(0, 1), alphas) for a, b in pairs)
        if self.layer is not None:
            return self._at_layer(field, points)
        way = "double_backprop" if self.differentiation == "recompute" else self.differentiation
        return input_gradients(field, points, way), tuple((a - b).flatten(0, 1) for a, b in pairs)

    def _at_tokens(
        self, field: Rows, x: Tensors, references: Tensors, alphas: Tensor
    ) -> tuple[Tensors, Tensors]:
        """Gradients between the layer's inputs."""
        if self.layer is None:
            raise refused(
                "GradientExplainer of token ids",
                "a layer, (model, layer), whose inputs are floating-point",
                "none",
                "Token ids have no gradient: use (model, layer), or LayerExpectedGradients.",
            )
        repeated = tuple(a.repeat(len(alphas), *[1] * (a.dim() - 1)) for a in x)
        ends = [self._at_layer(field, p)[1] for p in (repeated, references)]
        points = tuple(_between(a, b, alphas) for a, b in zip(*ends, strict=True))
        gradients = self._at_layer(field, repeated, points)[0]
        return gradients, tuple(a - b for a, b in zip(*ends, strict=True))

    def _at_layer(
        self, field: Rows, points: Tensors, replaced: Tensors | None = None
    ) -> tuple[Tensors, Tensors]:
        """Gradients by the layer's inputs, and these."""
        with torch.enable_grad(), captured(self.layer, replaced) as reached:
            outputs = field(points)
            return with_second_derivative(outputs.sum(), reached[-1]), reached[-1]


def detached(tensors: Tensors) -> Tensors:
    """Let go of graphs."""
    return tuple(t.detach() for t in tensors)


def _between(x: Tensor, b: Tensor, alphas: Tensor) -> Tensor:
    t = alphas.flatten().to(b).reshape(-1, *[1] * (b.dim() - 1))
    return t * x + (1 - t) * b


@contextmanager
def captured(layer: nn.Module | None, replaced: Tensors | None = None) -> Iterator[list[Tensors]]:
    """Collect a layer's inputs at each call, as points to differentiate by, or put in others."""
    reached: list[Tensors] = []

    def at_layer(_: nn.Module, args: Tensors) -> Tensors:
        given = args if replaced is None else replaced
        reached.append(tuple(a if a.requires_grad else a.detach().requires_grad_() for a in given))
        return reached[-1]

    handle = None if layer is None else layer.register_forward_pre_hook(at_layer)
    try:
        yield reached
    finally:
        if handle is not None:
            handle.remove()
