"""Expected gradients of a layer's activation: embeddings, latent features."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_priors._captum import as_tuple, forward_args
from captum_priors._checks import check_inputs, check_layer, check_target
from captum_priors._errors import refusal
from captum_priors._rows import Rows, run_forward, take, tile
from captum_priors._types import Differentiation, TensorOrTuple
from captum_priors.attr.expected_gradients import (
    Estimator,
    ExpectedGradients,
    convergence_delta,
    reference_rows,
)
from captum_priors.engine import attribution_call, current_pass
from captum_priors.engine.coupled import other_rows
from captum_priors.outputs import SeveralOutputs

Tensors = tuple[Tensor, ...]


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
        layer: A module that runs once in each forward pass. Its rows are the examples, or as many
            for each example (the sentences of a document), one example's after another's.
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
        check_layer(layer)
        ExpectedGradients.__init__(
            self, forward_func, multiply_by_inputs, differentiation=differentiation
        )
        self.layer = layer
        self.device_ids = device_ids

    @attribution_call
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
        """Explain a batch, with the arguments of :meth:`ExpectedGradients.attribute`.

        ``inputs`` and ``baselines`` are what the model takes; integers are fine here. The noise of
        ``stdevs`` is added to the activations, and the control variate evaluates the layer on all
        reference rows. Where an additional argument has an entry for each example, so have the
        reference activations; their mean is then not known and the paper's estimator is used.
        ``attribute_to_layer_input`` explains what the layer receives.

        Returns:
            Attributions shaped like the activation, and the deltas if asked for.

        Raises:
            TypeError: If an argument has another type or dtype.
            ValueError: If shapes, devices or counts do not match, or the layer runs twice.
            NotDifferentiableError: If no correct parameter gradient exists.
        """
        batch = check_inputs(inputs)
        tensors = as_tuple(inputs)
        check_target(target, batch)
        table = reference_rows(baselines, inputs)
        args = forward_args(additional_forward_args)
        if isinstance(target, SeveralOutputs):
            target = target.known(self.forward_func, tensors, args)
        layer = Layer(self.forward_func, self.layer, attribute_to_layer_input)
        activations, times = layer.activations(tensors, args)
        own = [isinstance(arg, Tensor) and arg.shape[:1] == (batch,) for arg in args]
        alike = len({*map(len, table)}) == 1 and not any(own)
        estimator = estimator if alike else "monte_carlo"
        rows = _LayerRows(self.forward_func, target, args, batch, layer, tensors, times)
        options = (n_samples, stdevs, estimator, internal_batch_size, generator)
        path_sum = self._path_sum(rows, tensors, activations, table, options)

        drawn, reference_args = path_sum.draws.rows, args
        if alike and path_sum.control_variate:
            chosen, reference_inputs = drawn[0], table
        elif alike:
            used, chosen = drawn[0].unique(return_inverse=True)
            reference_inputs = tuple(t[used] for t in table)
        else:
            chosen = torch.arange(n_samples * batch, device=drawn[0].device).reshape(-1, batch)
            reference_inputs = tuple(t[r.flatten()] for t, r in zip(table, drawn, strict=True))
            reference_args = tuple(tile(arg, n_samples, batch) for arg in args)
        references, _ = layer.activations(reference_inputs, reference_args)
        _check_alike(activations, references)
        draws = replace(path_sum.draws, rows=(chosen,) * len(activations))
        path_sum = replace(path_sum, draws=draws)
        values = path_sum.attributions(activations, references)
        if times > 1:
            values = tuple(v.flatten(0, 1) for v in values)
        if isinstance(target, SeveralOutputs):
            values = target.grouped(values)
        attributions = values[0] if len(values) == 1 else values
        if not return_convergence_delta:
            return attributions
        return attributions, convergence_delta(path_sum, activations, references)


@dataclass(frozen=True)
class Layer:
    """A layer of a model: what it deals in, and the model with that replaced."""

    forward_func: Any
    layer: nn.Module
    to_input: bool = False

    def activations(self, inputs: Tensors, args: tuple[Any, ...]) -> tuple[Tensors, int]:
        """Return what the layer returns (or receives), by examples, and how many rows each has."""
        batch, current = inputs[0].shape[0], current_pass()
        found = self._recorded(inputs, args)
        times, rest = divmod(found[0].shape[0], batch)
        alike = rest == 0 < times and all(len(a) == len(found[0]) for a in found)
        if alike and batch > 1 and (times > 1 or (current is not None and not current.seen.before)):
            some = slice(0, batch // 2)
            half_of_args = tuple(take(arg, some, batch) for arg in args)
            with other_rows(f"{batch // 2} of its examples"):
                half = self._recorded(tuple(x[some] for x in inputs), half_of_args)
            shapes = [a[: times * (batch // 2)].shape for a in found]
            alike = [h.shape for h in half] == shapes
        if not alike:
            raise refusal(
                ValueError,
                "`layer`",
                f"a layer whose first dimension counts the {batch} examples, or as many rows "
                "for each, one example's after another's",
                f"shapes {[tuple(a.shape) for a in found]}",
                "Choose a layer before the examples are packed or transposed, or one behind.",
            )
        if times > 1:
            found = tuple(a.unflatten(0, (batch, times)) for a in found)
        return found, times

    def _recorded(self, inputs: Tensors, args: tuple[Any, ...]) -> Tensors:
        seen: list[Any] = []
        with self._hooked(lambda found: seen.append(copied(found))):
            run_forward(self.forward_func, inputs, None, args)
        return _only_activation(seen)

    @contextmanager
    def replaced(self, values: Tensors) -> Iterator[None]:
        """Let the layer return (or receive) the given values."""

        def hook(found: Any) -> Any:
            several = self.to_input or isinstance(found, tuple)
            return copied(values) if several else values[0].clone()

        with self._hooked(hook):
            yield

    @contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        if self.to_input:
            handle = self.layer.register_forward_pre_hook(lambda module, args: hook(args))
        else:
            handle = self.layer.register_forward_hook(lambda module, args, output: hook(output))
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class _LayerRows(Rows):
    """The explained output as a function of what the layer deals in."""

    layer: Layer
    inputs: Tensors
    times: int

    def __call__(self, points: Tensors) -> Any:
        """Return the target output of each example, with the layer's values replaced."""
        repeats = points[0].shape[0] // self.n
        around = tuple(tile(x, repeats, self.n) for x in self.inputs)
        values = tuple(p.flatten(0, 1) for p in points) if self.times > 1 else points
        with self.layer.replaced(values):
            return super().__call__(around)

    def of(self, examples: slice) -> "_LayerRows":
        """Return the same for some of the examples."""
        some = super().of(examples)
        inputs = tuple(x[examples] for x in self.inputs)
        return replace(self, target=some.target, args=some.args, n=some.n, inputs=inputs)


def copied(found: Any) -> Any:
    """Copy the tensors of a tuple, which what follows may flag or work in place on."""
    if isinstance(found, tuple):
        return tuple(map(copied, found))
    return found.clone() if isinstance(found, Tensor) else found


def _only_activation(seen: list[Any]) -> Tensors:
    """Require that the layer ran once and dealt in floating-point tensors."""
    if len(seen) != 1:
        raise refusal(
            ValueError,
            "`layer`",
            "a layer that runs once in each forward pass",
            f"{len(seen)} runs",
            "Pass a layer of the model behind forward_func that is not shared.",
        )
    values = seen[0] if isinstance(seen[0], tuple) else (seen[0],)
    if not all(isinstance(v, Tensor) and v.is_floating_point() for v in values) or not values:
        raise refusal(
            TypeError,
            "`layer`",
            "a layer that deals in a floating-point tensor or a tuple of them",
            ", ".join(type(v).__name__ for v in values) or "nothing",
            "Choose another layer, or attribute_to_layer_input.",
        )
    return values


def _check_alike(activations: Tensors, references: Tensors) -> None:
    found, wanted = ([tuple(a.shape[1:]) for a in each] for each in (references, activations))
    if found != wanted:
        raise refusal(
            ValueError,
            "`baselines`",
            f"reference inputs at which the layer's rows have shapes {wanted}",
            str(found),
            "Pad the reference inputs to the length of the inputs.",
        )
