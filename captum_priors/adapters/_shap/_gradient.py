r"""GradientExplainer: expected gradients, drawn as SHAP draws them and taken in one batch.

.. math:: \phi = \frac1K \sum_k (x - b_k) \odot \nabla f\big(t_k x + (1 - t_k) b_k\big)

with the draws :math:`b_k, t_k` that SHAP's loop makes under its seed. At an interim layer SHAP
multiplies by the layer's input itself instead of a difference, and so does this.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._captum import run_repeated
from captum_priors._engine import Visit, input_gradients, keep_graph, recompute
from captum_priors._engine._first_order import with_second_derivative
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors._rows import take
from captum_priors.adapters._shap._torch_family import TorchFamily

# Points of one forward pass; SHAP's batch_size bounds its memory, here the graph does.
_POINTS = 2048


class Draws:
    """What SHAP's loop draws for each example and sample: a background row and a step."""

    def __init__(self, n: int, n_samples: int, n_background: int, seed: int) -> None:
        random = np.random.RandomState(seed)
        self.rows = np.empty((n, n_samples), dtype=np.int64)
        self.steps = np.empty((n, n_samples))
        for i in range(n):
            for k in range(n_samples):
                self.rows[i, k] = random.choice(n_background)
                self.steps[i, k] = random.uniform()


class GradientFamily(TorchFamily):
    """Replays SHAP's draws; the gradients are the engine's, so every way of taking them works."""

    differentiations = ("double_backprop", "recompute", "finite_difference")

    @leaves_inference_mode
    def shap_values(
        self,
        X: Any,  # noqa: N803  # SHAP's name
        nsamples: int = 200,
        ranked_outputs: Any = None,
        output_rank_order: str = "max",
        rseed: int | None = None,
        return_variances: bool = False,
    ) -> Any:
        """Return arrays, as SHAP."""
        if self._torch_model() is None:
            return self._stock.shap_values(
                self, X, nsamples, ranked_outputs, output_rank_order, rseed, return_variances
            )
        inputs = self._as_inputs(X)
        options = {"nsamples": nsamples, "rseed": rseed}
        variances: list[Tensor] = []
        with self._still(), torch.no_grad():
            outputs, ranks = self._ranked(inputs, ranked_outputs, output_rank_order)
            phi = self._phi(inputs, outputs, options, variances)
        arrays = [p.cpu().numpy() for p in phi]
        values: Any = arrays if len(arrays) > 1 else arrays[0]
        if not return_variances:
            return values if ranked_outputs is None else (values, ranks)
        spread = [v.cpu().numpy() for v in variances]
        each: list[Any] = [[s[..., i] for s in spread] for i in range(len(outputs))]
        if not self.explainer.multi_input:
            each = [parts[0] for parts in each]
        return (values, each) if ranked_outputs is None else (values, each, ranks)

    def _phi(
        self,
        inputs: list[Tensor],
        outputs: list[Any],
        options: dict[str, Any],
        variances: list[Tensor] | None = None,
    ) -> list[Tensor]:
        n_samples, seed = int(options.get("nsamples", 200)), options.get("rseed")
        if seed is None:  # SHAP's draw from the global stream, and its only one
            seed = np.random.randint(0, 1e6)  # type: ignore[call-overload]  # as SHAP calls it
        backgrounds = self._backgrounds()
        draws = Draws(inputs[0].shape[0], n_samples, len(backgrounds[0]), int(seed))
        noises = [self._noise(inputs, n_samples) for _ in outputs]
        if self._layer() is not None and self.differentiation != "double_backprop":
            raise NotDifferentiableError(
                expected_found(
                    f"{self.differentiation} of GradientExplainer at a layer",
                    "differentiation='double_backprop'",
                    repr(self.differentiation),
                    "The layer's input depends on the parameters below it, which only a graph "
                    "takes into account.",
                )
            )
        if variances is not None:
            variances.clear()

        def program(arguments: tuple[Tensor, ...], visit: Visit) -> tuple[Tensor, ...]:
            total: list[list[Tensor]] = []
            for rows in self._chunks(len(draws.rows), n_samples):
                term = self._part(
                    [a[rows] for a in arguments],
                    draws.rows[rows],
                    draws.steps[rows],
                    [take(o, rows, len(draws.rows)) for o in outputs],
                    [[e[rows] for e in noise] if noise else None for noise in noises],
                    total if variances is not None else None,
                )
                visited = visit(term, rows)
                parts.append(visited)
            if variances is not None:
                variances.extend(torch.cat(v) for v in zip(*total, strict=True))
            return tuple(torch.cat(each) for each in zip(*parts, strict=True))

        parts: list[tuple[Tensor, ...]] = []
        if self.differentiation == "recompute":

            def again(arguments: tuple[Tensor, ...], visit: Visit) -> tuple[Tensor, ...]:
                parts.clear()
                return program(arguments, visit)

            return list(recompute(again, tuple(inputs), forward_func=self._module))
        return list(program(tuple(inputs), keep_graph))

    @staticmethod
    def _chunks(n: int, n_samples: int) -> list[slice]:
        step = max(1, _POINTS // n_samples)
        return [slice(i, min(i + step, n)) for i in range(0, n, step)]

    def _noise(self, inputs: Sequence[Tensor], n_samples: int) -> list[Tensor] | None:
        """Draw SHAP's smoothing, in its order, from torch's global generator."""
        scale = self.explainer.local_smoothing
        if not scale > 0:
            return None
        noise = [torch.empty(len(x), n_samples, *x.shape[1:]).to(x) for x in inputs]
        for i in range(inputs[0].shape[0]):
            for k in range(n_samples):
                for each, x in zip(noise, inputs, strict=True):
                    each[i, k] = torch.empty(x.shape[1:], device=x.device).normal_() * scale
        return noise

    def _part(
        self,
        inputs: list[Tensor],
        rows: np.ndarray,
        steps: np.ndarray,
        outputs: list[Any],
        noises: list[list[Tensor] | None],
        variances: list[list[Tensor]] | None,
    ) -> tuple[Tensor, ...]:
        """Attributions of some examples, one tensor for each explained one."""
        n, n_samples = rows.shape
        each: list[list[Tensor]] = []
        spread: list[list[Tensor]] = []
        for output, noise in zip(outputs, noises, strict=True):
            points, deltas = [], []
            for a, (x, background) in enumerate(zip(inputs, self._backgrounds(), strict=True)):
                b = background[torch.as_tensor(rows, device=background.device)]
                moved = x.unsqueeze(1).expand_as(b)
                if noise is not None:
                    moved = moved + noise[a]
                t = torch.as_tensor(steps).to(x).reshape(n, n_samples, *[1] * (x.dim() - 1))
                points.append((t * moved + (1 - t) * b).flatten(0, 1))
                deltas.append(moved - b)
            target = output
            if isinstance(output, Tensor):
                target = output.to(inputs[0].device).repeat_interleave(n_samples)
            gradients, factors = self._gradients(tuple(points), target, deltas)
            samples = [
                g.reshape(n, n_samples, *g.shape[1:]).double() * f.double()
                for g, f in zip(gradients, factors, strict=True)
            ]
            each.append([s.mean(1) for s in samples])
            if variances is not None:
                spread.append([s.var(1, unbiased=False) / n_samples**0.5 for s in samples])
        if variances is not None:
            variances.append([torch.stack(v, dim=-1) for v in zip(*spread, strict=True)])
        return tuple(torch.stack(parts, dim=-1) for parts in zip(*each, strict=True))

    def _gradients(
        self, points: tuple[Tensor, ...], target: Any, deltas: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Gradients, and what SHAP multiplies them by."""
        layer, module = self._layer(), self._module
        if layer is not None:
            return _at_layer(module, layer, points, target, deltas[0].shape[:2])

        def field(at: tuple[Tensor, ...]) -> Tensor:
            return run_repeated(module, at, target, (), points[0].shape[0])

        way = "double_backprop" if self.differentiation == "recompute" else self.differentiation
        return input_gradients(field, points, way), deltas


def _at_layer(
    module: nn.Module, layer: nn.Module, points: tuple[Tensor, ...], target: Any, shape: Any
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    with torch.enable_grad():
        points = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in points)
        inputs: list[Any] = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args))
        try:
            outputs = run_repeated(module, points, target, (), points[0].shape[0])
        finally:
            handle.remove()
        reached = inputs[-1]
        gradients = with_second_derivative(outputs.sum(), reached)
    if not torch.is_grad_enabled():
        gradients = tuple(g.detach() for g in gradients)
        reached = tuple(h.detach() for h in reached)
    return gradients, [h.reshape(*shape, *h.shape[1:]) for h in reached]
