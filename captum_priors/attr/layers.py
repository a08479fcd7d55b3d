"""Expected gradients of a layer's activation: embeddings, latent features."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_priors._captum import as_tuple, forward_args
from captum_priors._checks import check_inputs, check_module, check_target
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
from captum_priors.engine._torch import leaf_of
from captum_priors.engine.coupled import other_rows
from captum_priors.engine.gradients import nodes
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

    A layer that several inputs share, such as the embedding of an encoder of two texts, runs once
    for each. With :math:`f = h(a(x_1), a(x_2))` attributions are a tuple, one entry for each run in
    the order of the runs, as :class:`ExpectedGradients` of :math:`h` has for its inputs.

    Args:
        forward_func: A model, or any function of the inputs.
        layer: A module that runs once in each forward pass, or once for each of several inputs.
            Its rows are the examples, or as many for each example (the sentences of a document),
            one example's after another's.
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

        Two texts through one embedding:

        >>> pair = lambda a, b: model(a) - 2 * model(b)
        >>> ours, theirs = LayerExpectedGradients(pair, embed).attribute(
        ...     (ids, ids[:, :2]), (background, background[:, :2]))
        >>> torch.allclose(ours.sum((1, 2)), gap, atol=1e-5), theirs.shape
        (True, torch.Size([3, 2, 4]))
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
        check_module("layer", layer)
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
            Attributions shaped like the activation, a tuple of those of each run where there are
            several, and the deltas if asked for.

        Raises:
            TypeError: If an argument has another type or dtype.
            ValueError: If shapes, devices or counts do not match, or one of the layer's runs feeds
                another.
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
        """Return what the layer returns (or receives), by examples, and how many rows each has.

        What it returns in one run follows what it returned in the run before.
        """
        batch, current = inputs[0].shape[0], current_pass()
        first = current is not None and not current.seen.before
        runs = self._recorded(inputs, args)
        if len(runs) > 1 and first and self.runs_apart(inputs, args) is None:
            raise runs_error(f"{len(runs)} runs, of which one feeds another")
        found = _only_activations(runs)
        times, rest = divmod(found[0].shape[0], batch)
        alike = rest == 0 < times and all(len(a) == len(found[0]) for a in found)
        if alike and (times > 1 or (batch > 1 and first)):
            alike = self._by_examples(found, times, inputs, args)
        if not alike:
            raise refusal(
                ValueError,
                "`layer`",
                f"a layer whose first dimension counts the {batch} examples, or as many rows "
                "for each, one example's after another's",
                f"shapes {[tuple(a.shape) for a in found]}",
                "Choose a layer before the examples are packed or transposed, or one behind; of "
                "several inputs that go through it in one batch, run it once for each.",
            )
        if times > 1:
            found = tuple(a.unflatten(0, (batch, times)) for a in found)
        return found, times

    def _by_examples(
        self, found: Tensors, times: int, inputs: Tensors, args: tuple[Any, ...]
    ) -> bool:
        """Whether rows come example by example: half of the examples have the first half of them.

        A batch of one is compared with two of the same.
        """
        batch = inputs[0].shape[0]
        if batch > 1:
            small, some = batch // 2, slice(0, batch // 2)
            inputs, args = (tuple(take(x, some, batch) for x in each) for each in (inputs, args))
            with other_rows(f"{small} of its examples"):
                whole, part = found, _only_activations(self._recorded(inputs, args))
        else:
            small, batch = 1, 2
            inputs, args = (tuple(tile(x, 2, 1) for x in each) for each in (inputs, args))
            with other_rows("its example twice"):
                whole, part = _only_activations(self._recorded(inputs, args)), found
        if [a[: times * small].shape for a in whole] != [p.shape for p in part]:
            return False
        return times == 1 or not any(
            _block_by_block(a.detach(), p.detach(), times, (batch, small))
            for a, p in zip(whole, part, strict=True)
        )

    def _recorded(self, inputs: Tensors, args: tuple[Any, ...]) -> list[Any]:
        runs: list[Any] = []
        with self._hooked(lambda found: runs.append(copied(found))):
            run_forward(self.forward_func, inputs, None, args)
        return runs

    def runs_apart(self, inputs: Tensors, args: tuple[Any, ...]) -> int | None:
        """Count the layer's runs in a forward pass; None where one of them feeds another."""
        before: list[Tensor] = []
        fed: list[bool] = []

        def tracked(found: Any) -> list[Tensor]:
            return [t for t in _each(found) if isinstance(t, Tensor) and t.requires_grad]

        def hook(found: Any) -> Any:
            leaves = (leaf_of(node) for node in nodes(tracked(found)))
            fed.append(any(leaf is other for leaf in leaves for other in before))
            cut = _mapped(lambda t: t.detach().requires_grad_(t.is_floating_point()), found)
            before.extend(tracked(cut))
            return copied(cut)

        with torch.enable_grad(), self._hooked(hook):
            run_forward(self.forward_func, inputs, None, args)
        return None if any(fed) else len(fed)

    @contextmanager
    def replaced(self, values: Tensors) -> Iterator[None]:
        """Let the layer return (or receive) the given values, those of one run after another's."""
        rest = iter(values)

        def hook(found: Any) -> Any:
            own = tuple(value.clone() for _, value in zip(_each(found), rest, strict=False))
            if len(own) < len(_each(found)):
                raise runs_error("more runs than at the whole batch")
            return own if self.to_input or isinstance(found, tuple) else own[0]

        with self._hooked(hook):
            yield
        if next(rest, None) is not None:
            raise runs_error("fewer runs than at the whole batch")

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
        # Views: a second try, which leaves may need, would begin among the values of the first.
        around = tuple(y.view_as(y) for y in (tile(x, repeats, self.n) for x in self.inputs))
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
    return _mapped(Tensor.clone, found)


def _mapped(function: Callable[[Tensor], Tensor], found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(_mapped(function, each) for each in found)
    return function(found) if isinstance(found, Tensor) else found


def _each(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def _block_by_block(whole: Tensor, part: Tensor, times: int, counts: tuple[int, int]) -> bool:
    """Whether rows of all examples follow one another, rather than all rows of one example."""
    batch, small = counts
    by_example = (whole[: times * small] - part).norm()
    of_blocks = whole.unflatten(0, (times, batch))[:, :small].flatten(0, 1)
    # Rounding, and dropout of a model that is explained in train mode, are no difference.
    return bool(by_example > 1e-3 * part.norm() and 4 * (of_blocks - part).norm() < by_example)


def runs_error(found: str) -> Exception:
    """Word what is wrong with the runs of a layer."""
    return refusal(
        ValueError,
        "`layer`",
        "a layer that runs in each forward pass, once or apart for each of several inputs",
        found,
        "Pass another layer of the model behind forward_func; modules may share their weights.",
    )


def _only_activations(runs: list[Any]) -> Tensors:
    """Require that the layer ran, and dealt in floating-point tensors."""
    if not runs:
        raise runs_error("0 runs")
    values = tuple(value for run in runs for value in _each(run))
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
