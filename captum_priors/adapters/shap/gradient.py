r"""GradientExplainer: expected gradients, on SHAP's draws and in a few batches.

.. math:: \phi = \frac1K \sum_k (x - b_k) \odot \nabla f\big(t_k x + (1 - t_k) b_k\big)

At an interim layer SHAP multiplies by the layer's input itself instead of a difference, and so does
this. Token ids cannot be interpolated, and SHAP fails on them: there the layer's inputs are, and
multiplied by their difference, as the equation says.

Private: ``explainer`` and what it holds, ``model``, ``layer``, ``data``, ``model_inputs``,
``multi_input``, ``local_smoothing``, ``input_handle`` (0.51.0).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors._rows import Rows, take
from captum_priors._types import Target
from captum_priors.adapters.shap.adapter import ShapAdapter, explanation
from captum_priors.engine import (
    Visit,
    input_gradients,
    keep_graph,
    recompute,
    with_second_derivative,
)

# Points of one forward pass; SHAP's batch_size bounds its memory, here the graph does.
_POINTS = 2048


class ModuleAdapter(ShapAdapter):
    """Explains a module that SHAP holds itself, at its inputs or those of one of its layers."""

    def _start(self) -> None:
        self.inner = self.explainer.explainer
        self.layer: nn.Module | None = getattr(self.inner, "layer", None)
        module, name = getattr(self.inner, "model", None), type(self.explainer).__name__
        for what, is_wrong, expected, found in (
            ("SHAP's model", not isinstance(module, nn.Module), "a torch module", module),
            ("`model`", self.given not in (None, module), f"none: {name} holds its", self.given),
        ):
            if is_wrong:
                raise NotDifferentiableError(
                    expected_found(what, expected, type(found).__name__, "Explain the torch model.")
                )
        if getattr(self.inner, "input_handle", None) is not None:
            # What SHAP's constructor leaves on the layer, its own call removes and adds again.
            self.inner.input_handle.remove()
            self.inner.input_handle = None
            vars(self.layer).pop("target_input", None)

    def _function(self) -> Any:
        return self.inner.model

    def _sample(self) -> tuple[Any, ...] | None:
        held = getattr(self.inner, "model_inputs", self.inner.data)
        return None if all(b.is_floating_point() for b in held) else tuple(b[:8] for b in held)

    def _backgrounds(self) -> list[Tensor]:
        """Reference rows, one tensor for each input of the model."""
        held = getattr(self.inner, "model_inputs", self.inner.data)
        return [self._torch.convert(b.detach()) for b in held]

    def _base(self) -> Tensor:
        return self._torch(*self._backgrounds()).mean(0)

    def _explain(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        several = self.inner.multi_input
        rows = args[0] if several and len(args) == 1 else list(args)
        backgrounds = self._backgrounds()
        if not isinstance(rows, (list, tuple)) or len(rows) != len(backgrounds):
            expected = f"a list of {len(backgrounds)} tensors" if several else "a tensor"
            raise TypeError(
                expected_found("`X`", expected, type(rows).__name__, "Pass what the background has.")
            )
        inputs = [self._torch.convert(torch.as_tensor(x)) for x in rows]
        base = self._base().expand(len(inputs[0]), -1)
        outputs = range(base.shape[1])
        phi = [
            torch.stack(each, dim=-1)
            for each in zip(*self._phi(inputs, list(outputs), options), strict=True)
        ]
        if len(outputs) == 1:  # SHAP's plots take no axis of one output
            phi, base = [p.squeeze(-1) for p in phi], base.squeeze(-1)
        names = getattr(self.explainer, "features", None)
        data = inputs if self.layer is None else [None] * len(phi)
        found = [explanation(p, base, x, names) for p, x in zip(phi, data, strict=True)]
        return found if several and self.layer is None else found[0]

    def shap_values(self, X: Any, **options: Any) -> Any:  # noqa: N803  # SHAP's name
        """Explain as SHAP, arrays alone, with an axis for the outputs even where there is one."""
        found = super().shap_values(X, **options)
        if self._base_outputs() > 1:
            return found
        return [v[..., None] for v in found] if isinstance(found, list) else found[..., None]

    def _base_outputs(self) -> int:
        return int(np.size(self.expected_value))

    def _values(
        self, tensors: tuple[Tensor, ...], target: Target, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        if self.layer is not None:
            raise NotDifferentiableError(
                expected_found(
                    f"`attribute` of {type(self.explainer).__name__}",
                    "an explainer of the model's inputs",
                    "one of a layer, whose attributions are not like the inputs",
                    "Use adapter(X).tensor, or LayerExpectedGradients.",
                )
            )
        inputs = [self._torch.convert(t) for t in tensors]
        return self._phi(inputs, [target], options)[0]

    def _phi(
        self, inputs: list[Tensor], targets: Sequence[Target], options: dict[str, Any]
    ) -> list[tuple[Tensor, ...]]:
        """Attributions of the explained tensors, for each target."""
        raise NotImplementedError


class GradientAdapter(ModuleAdapter):
    """SHAP's draws; the gradients are the engine's, so every way of taking them works."""

    differentiations = ("double_backprop", "recompute", "finite_difference")
    draws = ("torch", "numpy")
    options = ("nsamples", "rseed")

    def _phi(
        self, inputs: list[Tensor], targets: Sequence[Target], options: dict[str, Any]
    ) -> list[tuple[Tensor, ...]]:
        if self.layer is not None and self.differentiation != "double_backprop":
            raise NotDifferentiableError(
                expected_found(
                    f"{self.differentiation} of GradientExplainer at a layer",
                    "differentiation='double_backprop'",
                    repr(self.differentiation),
                    "The layer's input depends on the parameters below it, which only a graph "
                    "takes into account.",
                )
            )
        seed, n_samples = options.get("rseed"), int(options.get("nsamples", 200))
        if seed is None:  # SHAP's draw from the global stream, and its only one
            seed = np.random.randint(0, 1e6)  # type: ignore[call-overload]  # noqa: NPY002
        n, (rows, alphas) = len(inputs[0]), self._draws(len(inputs[0]), n_samples, int(seed))
        step = max(1, _POINTS // n_samples)
        found = []
        for target in targets:
            noise = self._noise(inputs, n_samples)

            def program(
                arguments: tuple[Tensor, ...],
                visit: Visit,
                target: Target = target,
                noise: list[Tensor] | None = noise,
            ) -> tuple[Tensor, ...]:
                parts = []
                for start in range(0, n, step):
                    some = slice(start, min(start + step, n))
                    part = self._part(
                        [a[some] for a in arguments],
                        take(target, some, n),
                        rows[:, some],
                        alphas[:, some],
                        None if noise is None else [e[:, some] for e in noise],
                    )
                    parts.append(visit(part, some))
                return tuple(map(torch.cat, zip(*parts, strict=True)))

            if self.differentiation == "recompute":
                streams = ("torch", "numpy")
                found.append(
                    recompute(program, tuple(inputs), forward_func=self.model, streams=streams)
                )
            else:
                found.append(program(tuple(inputs), keep_graph))
        return found

    def _draws(self, n: int, n_samples: int, seed: int) -> tuple[Tensor, Tensor]:
        """Reference rows and places between, ``(samples, examples)``, in SHAP's order."""
        random = np.random.RandomState(seed)  # which SHAP's seeding of the global one draws like
        n_rows = len(self.inner.data[0])
        drawn = [(random.choice(n_rows), random.uniform()) for _ in range(n * n_samples)]
        rows, alphas = np.array(drawn).reshape(n, n_samples, 2).transpose(2, 1, 0)
        return torch.as_tensor(rows).long(), torch.as_tensor(alphas)

    def _noise(self, inputs: list[Tensor], n_samples: int) -> list[Tensor] | None:
        """SHAP's smoothing, from torch's generator, anew for each output."""
        if not self.inner.local_smoothing > 0:
            return None
        shapes = [x.shape[1:] for x in inputs]
        drawn = [
            [torch.empty(s, device=x.device).normal_() for s, x in zip(shapes, inputs, strict=True)]
            for _ in range(len(inputs[0]) * n_samples)
        ]
        each = [torch.stack(e).unflatten(0, (-1, n_samples)) for e in zip(*drawn, strict=True)]
        return [self.inner.local_smoothing * e.transpose(0, 1) for e in each]

    def _part(
        self,
        inputs: list[Tensor],
        target: Target,
        rows: Tensor,
        alphas: Tensor,
        noise: list[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        """Attributions of some examples to one output."""
        moved = inputs if noise is None else [x + e.to(x) for x, e in zip(inputs, noise, strict=True)]
        references = [b[rows.to(b.device)] for b in self._backgrounds()]
        field = Rows(self.model, target, (), len(inputs[0]))
        if not inputs[0].is_floating_point():
            gradients, factors = self._of_tokens(field, inputs, references, alphas)
        else:
            points = tuple(
                torch.lerp(b, x.expand_as(b), _like(alphas, b)).flatten(0, 1)
                for x, b in zip(moved, references, strict=True)
            )
            if self.layer is not None:
                gradients, factors = _at_layer(field, self.layer, points, None)
            else:
                way: Any = self.differentiation
                way = "double_backprop" if way == "recompute" else way
                gradients = input_gradients(field, points, way)
                factors = tuple(
                    (x - b).flatten(0, 1) for x, b in zip(moved, references, strict=True)
                )
        return tuple(
            (g.double() * f.double()).unflatten(0, rows.shape).mean(0)
            for g, f in zip(gradients, factors, strict=True)
        )

    def _of_tokens(
        self, field: Rows, inputs: list[Tensor], references: list[Tensor], alphas: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Interpolate the layer's inputs."""
        if self.layer is None:
            raise NotDifferentiableError(
                expected_found(
                    "GradientExplainer of token ids",
                    "a layer, (model, layer), whose inputs are floating-point",
                    "none",
                    "Token ids have no gradient.",
                )
            )
        repeated = tuple(x.repeat(len(alphas), *[1] * (x.dim() - 1)) for x in inputs)
        _, at_x = _at_layer(field, self.layer, repeated, None, differentiates=False)
        flat = tuple(b.flatten(0, 1) for b in references)
        _, at_b = _at_layer(field, self.layer, flat, None, differentiates=False)
        between = tuple(
            torch.lerp(b, x, _like(alphas.flatten(), b)) for x, b in zip(at_x, at_b, strict=True)
        )
        gradients, _ = _at_layer(field, self.layer, repeated, between)
        return gradients, tuple(x - b for x, b in zip(at_x, at_b, strict=True))


def _like(alphas: Tensor, rows: Tensor) -> Tensor:
    return alphas.to(rows).reshape(*alphas.shape, *[1] * (rows.dim() - alphas.dim()))


def _at_layer(
    field: Rows,
    layer: nn.Module,
    points: tuple[Tensor, ...],
    replaced: tuple[Tensor, ...] | None,
    *,
    differentiates: bool = True,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients by the layer's inputs, and these; or with others in their place."""
    reached: list[tuple[Tensor, ...]] = []

    def at_layer(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = args if replaced is None else replaced
        reached.append(tuple(a if a.requires_grad else a.detach().requires_grad_() for a in given))
        return reached[-1]

    with torch.enable_grad():
        handle = layer.register_forward_pre_hook(at_layer)
        try:
            outputs = field(points)
        finally:
            handle.remove()
        gradients = with_second_derivative(outputs.sum(), reached[-1]) if differentiates else ()
    if torch.is_grad_enabled():
        return gradients, reached[-1]
    return tuple(g.detach() for g in gradients), tuple(h.detach() for h in reached[-1])
