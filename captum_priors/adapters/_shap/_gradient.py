r"""GradientExplainer: expected gradients, drawn as SHAP draws them and taken in one batch.

.. math:: \phi = \frac1K \sum_k (x - b_k) \odot \nabla f\big(t_k x + (1 - t_k) b_k\big)

SHAP's own loop says where the gradients are taken and what multiplies them, under its seed; the
first call holds one row against SHAP's own numbers. At an interim layer SHAP multiplies by the
layer's input itself instead of a difference, and so does this.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from captum_priors._captum import run_repeated
from captum_priors._engine import Visit, input_gradients, keep_graph, recompute
from captum_priors._engine._first_order import with_second_derivative
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors._rows import take
from captum_priors.adapters._shap._shap_check import in_precision
from captum_priors.adapters._shap._shap_loop import Drawn, draw
from captum_priors.adapters._shap._torch_family import TorchFamily

# Points of one forward pass; SHAP's batch_size bounds its memory, here the graph does.
_POINTS = 2048


class GradientFamily(TorchFamily):
    """SHAP draws; the gradients are the engine's, so every way of taking them works."""

    differentiations = ("double_backprop", "recompute", "finite_difference")
    _check_options: ClassVar[dict[str, Any]] = {"nsamples": 4, "rseed": 0}

    def _prepare_check(self, twin: Any, inputs: list[Tensor]) -> list[Tensor] | None:
        """Compare in torch's default precision, the only one that SHAP's loop computes in."""
        return in_precision(torch.get_default_dtype(), twin, inputs)

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
            self._check_once(inputs)
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
        n, n_samples, seed = len(inputs[0]), int(options.get("nsamples", 200)), options.get("rseed")
        if seed is None:  # SHAP's draw from the global stream, and its only one
            seed = np.random.randint(0, 1e6)  # type: ignore[call-overload]  # as SHAP calls it
        drawn = draw(
            self.explainer,
            inputs,
            self._backgrounds(),
            n_samples=n_samples,
            n_outputs=len(outputs),
            seed=int(seed),
        )
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
            for rows in self._chunks(n, n_samples):
                term = self._part(
                    [a[rows] for a in arguments],
                    [d[rows] for d in drawn],
                    [take(o, rows, n) for o in outputs],
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

    def _part(
        self,
        inputs: list[Tensor],
        drawn: list[Drawn],
        outputs: list[Any],
        variances: list[list[Tensor]] | None,
    ) -> tuple[Tensor, ...]:
        """Attributions of some examples, one tensor for each explained one."""
        n, n_samples = drawn[0].points[0].share.shape
        backgrounds = self._backgrounds()
        each: list[list[Tensor]] = []
        spread: list[list[Tensor]] = []
        for output, draws in zip(outputs, drawn, strict=True):
            points, deltas = (
                [s.at(x, b) for s, x, b in zip(sums, inputs, backgrounds, strict=True)]
                for sums in (draws.points, draws.factors)
            )
            target = output
            if isinstance(output, Tensor):
                target = output.to(inputs[0].device).repeat_interleave(n_samples)
            gradients, factors = self._gradients(
                tuple(p.flatten(0, 1) for p in points), target, deltas
            )
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
