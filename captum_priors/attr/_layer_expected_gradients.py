"""Expected gradients of a layer's activation: embeddings, latent features."""

from dataclasses import replace
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_priors._captum import as_tuple, forward_args, log_usage, run_forward, run_repeated
from captum_priors._checks import check_count, check_inputs, check_target
from captum_priors._engine._first_order import marks_start
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._engine._layers import only_activation, recorded, replaced
from captum_priors._engine._mismatch import names_mismatch
from captum_priors._errors import expected_found
from captum_priors._rows import length_of, take, tile
from captum_priors._types import Differentiation, TensorOrTuple
from captum_priors.attr._expected_gradients import (
    Estimator,
    ExpectedGradients,
    check_stdevs,
    reference_rows,
)
from captum_priors.attr._path_sum import FieldOf


class LayerExpectedGradients(LayerAttribution, ExpectedGradients):
    r"""Expected gradients with respect to what a layer returns (or receives).

    With :math:`f = h \circ a`, the attributions are those of :math:`h` at :math:`a(x)` with
    references :math:`a(x')`,

    .. math:: \mathbb{E}\left[(a(x) - a(x')) \odot \nabla h(a(x') + \alpha (a(x) - a(x')))\right],

    and sum to :math:`f(x) - \mathbb{E} f(x')` where all of :math:`f` passes through the layer. The
    path runs in the layer's space, as in :class:`captum.attr.LayerIntegratedGradients`, so token
    ids work; :class:`captum.attr.LayerGradientShap` interpolates the inputs instead. Gradients
    reach the parameters on both sides of the layer. (Erion et al. 2021, applied to :math:`h`.)

    Args:
        forward_func: A model, or any function of the inputs.
        layer: A module that runs once in each forward pass.
        device_ids: Accepted for Captum's sake; ``DataParallel`` is not supported.
        multiply_by_inputs: As in :class:`ExpectedGradients`.
        differentiation: As in :class:`ExpectedGradients`.

    Example:
        >>> import torch
        >>> from captum_priors import LayerExpectedGradients
        >>> embed, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 1)
        >>> model = lambda ids: head(embed(ids).sum(1))
        >>> ids, background = torch.randint(10, (3, 5)), torch.randint(10, (8, 5))
        >>> explainer = LayerExpectedGradients(model, embed)
        >>> attributions = explainer.attribute(ids, background, n_samples=2)
        >>> gap = (model(ids) - model(background).mean()).squeeze(1)
        >>> torch.allclose(attributions.sum((1, 2)), gap, atol=1e-5)
        True
    """

    def __init__(
        self,
        forward_func: Any,
        layer: nn.Module,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        *,
        differentiation: Differentiation = "double_backprop",
    ) -> None:
        if not isinstance(layer, nn.Module):
            raise TypeError(
                expected_found(
                    "`layer`", "a torch.nn.Module", type(layer).__name__, "Pass model.some_layer."
                )
            )
        ExpectedGradients.__init__(
            self, forward_func, multiply_by_inputs, differentiation=differentiation
        )
        self.layer = layer
        self.device_ids = device_ids

    @log_usage()
    @names_mismatch
    @leaves_inference_mode
    @marks_start
    def attribute(
        self,
        inputs: TensorOrTuple,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        *,
        estimator: Estimator = "control_variate",
        internal_batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Explain a batch; arguments as in :meth:`ExpectedGradients.attribute`.

        Args:
            inputs: What the model takes; integers are fine here.
            baselines: Reference inputs, like ``inputs`` in shape and dtype.
            n_samples: Samples for each example.
            stdevs: Standard deviation of noise added to the activations.
            target: Which output to explain.
            additional_forward_args: Further arguments of ``forward_func``. Where one of them has an
                entry for each example, so have the reference activations; their mean is then not
                known and the paper's estimator is used.
            return_convergence_delta: Also return the gap of each sample.
            attribute_to_layer_input: Explain what the layer receives.
            estimator: ``"control_variate"`` evaluates the layer on all reference rows.
            internal_batch_size: At most this many rows at once take part in a gradient.
            generator: Source of the draws.

        Returns:
            Attributions shaped like the activation, and the deltas if asked for.

        Raises:
            TypeError: If an argument has another type or dtype.
            ValueError: If shapes, devices or counts do not match, or the layer runs twice.
            NotDifferentiableError: If no correct parameter gradient exists.
        """
        check_inputs(inputs)
        tensors = as_tuple(inputs)
        batch = tensors[0].shape[0]
        check_target(target, batch)
        check_count("internal_batch_size", internal_batch_size, optional=True)
        table = reference_rows(baselines, inputs)
        args = forward_args(additional_forward_args)

        activations = self._activations(tensors, args, attribute_to_layer_input)
        n_rows = tuple(t.shape[0] for t in table)
        alike = len(set(n_rows)) == 1 and not any(_has_entry_for_each(arg, batch) for arg in args)
        draws, control_variate = self._draw(
            activations[0], n_rows, n_samples, estimator if alike else "monte_carlo", generator
        )
        reference_args = args
        if alike and control_variate:
            rows, reference_inputs = draws.rows[0], table
        elif alike:
            used, rows = draws.rows[0].unique(return_inverse=True)
            reference_inputs = tuple(t[used] for t in table)
        else:
            rows = torch.arange(n_samples * batch, device=draws.alphas.device).reshape(-1, batch)
            reference_inputs = tuple(t[r.flatten()] for t, r in zip(table, draws.rows, strict=True))
            reference_args = tuple(tile(arg, n_samples, batch) for arg in args)
        references = self._activations(reference_inputs, reference_args, attribute_to_layer_input)
        path_sum = self._path_sum(
            self._layer_field_of(tensors, target, args, attribute_to_layer_input),
            replace(draws, rows=(rows,) * len(activations)),
            check_stdevs(stdevs, len(activations)),
            control_variate,
            internal_batch_size,
        )
        values = path_sum.attributions(activations, references)
        attributions = values[0] if len(values) == 1 else values
        if not return_convergence_delta:
            return attributions
        return attributions, path_sum.convergence_delta(activations, references)

    def _activations(
        self, inputs: tuple[Tensor, ...], args: tuple[Any, ...], to_input: bool
    ) -> tuple[Tensor, ...]:
        with recorded(self.layer, to_input=to_input) as seen:
            run_forward(self.forward_func, inputs, None, args)
        return only_activation(seen)

    def _layer_field_of(
        self, inputs: tuple[Tensor, ...], target: Any, args: tuple[Any, ...], to_input: bool
    ) -> FieldOf:
        batch = inputs[0].shape[0]

        def field_of(examples: slice) -> Any:
            n = length_of(examples, batch)

            def field(points: tuple[Tensor, ...]) -> Tensor:
                times = points[0].shape[0] // n
                around = tuple(tile(x[examples], times, n) for x in inputs)
                extra = tuple(take(arg, examples, batch) for arg in args)
                with replaced(self.layer, points, to_input=to_input):
                    return run_repeated(
                        self.forward_func, around, take(target, examples, batch), extra, n
                    )

            return field

        return field_of


def _has_entry_for_each(arg: Any, batch: int) -> bool:
    return isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == batch
