"""Captum's methods that are arithmetic on input gradients, with every differentiation."""

import copy
from contextlib import nullcontext
from typing import Any, cast

import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor

from captum_priors._captum import as_tuple, forward_args, like_inputs, logits_returned
from captum_priors._checks import check_inputs
from captum_priors._rows import Rows, tile
from captum_priors.adapters.captum import CaptumAdapter
from captum_priors.adapters.keep_graph import KeepGraph
from captum_priors.engine import Visit, input_gradients, keep_graph, recompute
from captum_priors.outputs import SeveralOutputs


class SeamAdapter(CaptumAdapter):
    """Swaps Captum's ``gradient_func`` for the engine's, and leaves everything else to Captum."""

    _visit: Visit = staticmethod(keep_graph)
    _outputs: SeveralOutputs | None = None  # if several are explained, of
    _n: int  # examples
    gradient_func: Any
    forward_func: Any
    compute_convergence_delta: Any

    def _check_call(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        check_inputs(given["inputs"])
        return super()._check_call(given)

    def _attribute_with_graph(self, given: dict[str, Any]) -> Any:
        self._check()
        tensors, inputs = self._check_call(given), given["inputs"]
        wants_delta = given.pop("return_convergence_delta", False)
        worker = copy.copy(self)
        if self.differentiation == "recompute":
            if "internal_batch_size" in self._takes and given.get("internal_batch_size") is None:
                given["internal_batch_size"] = tensors[0].shape[0]

            def program(arguments: tuple[Tensor, ...], visit: Visit) -> tuple[Tensor, ...]:
                worker._visit = visit
                return worker._evaluate(self._copies(given, arguments))

            result = recompute(program, tensors, forward_func=self.forward_func)
        else:
            result = worker._evaluate(self._copies(given, tensors))
        if self._outputs is not None:
            result = self._outputs.grouped(result)
        attributions = like_inputs(inputs, result)
        if not wants_delta:
            return attributions
        ends = self._copies(given, tensors)
        keeps = KeepGraph(self, tensors[0].shape[0]) if torch.is_grad_enabled() else nullcontext()
        with keeps, logits_returned(self.forward_func):
            delta = self.compute_convergence_delta(
                attributions,
                ends.get("baselines"),
                ends["inputs"],
                additional_forward_args=given.get("additional_forward_args"),
                target=given.get("target"),
            )
        return attributions, delta

    def _attribute_each(self, given: dict[str, Any], target: SeveralOutputs) -> Any:
        """Explain several outputs from one forward pass, but for deltas, which are of one."""
        if given.get("return_convergence_delta"):
            return super()._attribute_each(given, target)
        worker = copy.copy(self)
        worker._outputs = target
        return worker._attribute_with_graph({**given, "target": None})

    def _evaluate(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        """Run Captum's algorithm with the engine's gradients."""
        worker = copy.copy(self)
        worker.gradient_func = self._gradients  # the worker's own would be a cycle of references
        if self._outputs is not None:
            # For Captum, inputs: it does the same to the gradients of each, by each output.
            self._n, times = len(as_tuple(given["inputs"])[0]), len(self._outputs)
            for name in {"inputs", "baselines"} & {*given}:
                if given[name] is not None:
                    given[name] = as_tuple(given[name]) * times
        return self._visit(as_tuple(worker._run_stock(**given)))

    def _gradients(
        self,
        forward_fn: Any,
        inputs: Any,
        target_ind: Any = None,
        additional_forward_args: Any = None,
    ) -> tuple[Tensor, ...]:
        """Stand in for Captum's ``compute_gradients``; its names, because Captum uses them."""
        args, n = forward_args(additional_forward_args), as_tuple(inputs)[0].shape[0]
        points, target = as_tuple(inputs), target_ind
        if self._outputs is not None:
            points = points[: len(points) // len(self._outputs)]
            target = tile(self._outputs, n // self._n, self._n)
        way = "double_backprop" if self.differentiation == "recompute" else self.differentiation
        return input_gradients(Rows(forward_fn, target, args, n), points, way)


class DifferentiableSaliency(SeamAdapter, Saliency):
    """:class:`captum.attr.Saliency` with its graph."""

    _stock = Saliency


class DifferentiableInputXGradient(SeamAdapter, InputXGradient):
    """:class:`captum.attr.InputXGradient` with its graph."""

    _stock = InputXGradient


class DifferentiableIntegratedGradients(SeamAdapter, IntegratedGradients):
    """:class:`captum.attr.IntegratedGradients` with its graph, internal batches included."""

    _stock = IntegratedGradients

    def _evaluate(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        """Add the chunks up again: Captum detaches all of them but the first."""
        visit, chunks = self._visit, list[tuple[Tensor, ...]]()

        def add(chunk: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
            chunk = visit(chunk, rows)
            if chunks:
                chunks[0] = tuple(a + b for a, b in zip(chunk, chunks[0], strict=True))
            else:
                chunks.append(chunk)
            return chunk

        worker = copy.copy(self)
        worker._visit, worker._add_chunk = keep_graph, cast("Visit", add)
        SeamAdapter._evaluate(worker, given)
        return chunks[0]

    _add_chunk: Visit = staticmethod(keep_graph)

    def _attribute(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Captum calls this once for each internal batch."""
        return self._add_chunk(super()._attribute(*args, **kwargs))
