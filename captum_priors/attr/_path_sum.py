r"""The sum behind expected gradients, evaluated in chunks.

With references :math:`x'_k`, positions :math:`\alpha_k` and displacements :math:`d_k = x - x'_k`,
both estimators are :math:`\frac1n \sum_k w_k \odot g_k` with :math:`g_k = \nabla f(x'_k + \alpha_k
d_k)` and differ in the weights: :math:`w_k = d_k` for the paper's, and for the control variate

.. math:: w_k = (x - \mu) - \tfrac{n}{n-1} F (x'_k - \bar x'),

which is :math:`(x - \mu) \odot \bar g` plus the sample covariance of :math:`d` and :math:`g`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_priors._engine import Program, Visit, input_gradients, keep_graph, recompute
from captum_priors._rows import take
from captum_priors._types import Differentiation
from captum_priors.attr._draws import Draws, covariance_factor

FieldOf = Callable[[slice], Callable[[tuple[Tensor, ...]], Tensor]]
"""The explained output at points that repeat the given examples any number of times."""

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class PathSum:
    """A set-up expected-gradients sum: everything is drawn, nothing is evaluated yet."""

    field_of: FieldOf
    draws: Draws
    stdevs: tuple[float, ...]
    multiply_by_inputs: bool
    control_variate: bool
    differentiation: Differentiation
    rows_at_once: int | None

    def attributions(self, inputs: Tensors, baselines: Tensors) -> Tensors:
        """Evaluate the sum, with its graph where gradients are recorded."""
        arguments = (*inputs, *baselines)
        program = self._program(len(inputs))
        if self.differentiation == "recompute":
            return recompute(program, arguments, forward_func=self.field_of)
        return program(arguments, keep_graph)

    @torch.no_grad()
    def convergence_delta(self, inputs: Tensors, baselines: Tensors) -> Tensor:
        """Per sample, what the attributions miss of f(x) - f(x'), in Captum's order of rows."""
        deltas: list[list[Tensor]] = []
        centres = self._centres(inputs, baselines)
        for chunk in self._chunks(inputs[0].shape[0]):
            ends, references, weights, gradients = self._terms(inputs, baselines, centres, chunk)
            explained = torch.stack(
                [
                    (g if w is None else w * g).flatten(2).sum(2)
                    for w, g in zip(weights, gradients, strict=True)
                ]
            ).sum(0)
            field = self.field_of(chunk.examples)
            start, end = (
                field(tuple(p.flatten(0, 1) for p in points)).reshape(explained.shape)
                for points in (
                    references,
                    tuple(e.expand_as(r) for e, r in zip(ends, references, strict=True)),
                )
            )
            if chunk.examples.start == 0:
                deltas.append([])
            deltas[-1].append(explained - (end - start))
        return torch.cat([torch.cat(parts, 1) for parts in deltas]).T.reshape(-1)

    @property
    def n_samples(self) -> int:
        """Number of samples for each example."""
        return self.draws.alphas.shape[0]

    def _chunks(self, batch: int) -> Iterator["_Chunk"]:
        """Split the rows, at most ``rows_at_once`` in each chunk."""
        n = self.n_samples
        at_once = self.rows_at_once or n * batch
        if at_once >= batch:
            width = at_once // batch
            for start in range(0, n, width):
                yield _Chunk(range(start, min(start + width, n)), slice(0, batch))
        else:
            for k in range(n):
                for start in range(0, batch, at_once):
                    yield _Chunk(range(k, k + 1), slice(start, min(start + at_once, batch)))

    def _program(self, n_inputs: int) -> Program:
        def program(arguments: Tensors, visit: Visit) -> Tensors:
            inputs, baselines = arguments[:n_inputs], arguments[n_inputs:]
            batch = inputs[0].shape[0]
            total: Tensors = ()
            block: list[Tensors] = []
            centres = self._centres(inputs, baselines)
            for chunk in self._chunks(batch):
                _, _, weights, gradients = self._terms(inputs, baselines, centres, chunk)
                share = len(chunk.samples) / self.n_samples
                term = tuple(
                    _mean_of_samples(g if w is None else w * g, share)
                    for w, g in zip(weights, gradients, strict=True)
                )
                block.append(visit(term, chunk.examples))
                if chunk.examples.stop == batch:
                    whole = tuple(
                        torch.cat(parts) if len(parts) > 1 else parts[0]
                        for parts in zip(*block, strict=True)
                    )
                    total = _add(total, whole) if total else whole
                    block = []
            return total

        return program

    def _terms(
        self, inputs: Tensors, baselines: Tensors, centres: "_Centres", chunk: "_Chunk"
    ) -> tuple[Tensors, Tensors, tuple[Tensor | None, ...], Tensors]:
        """Path ends, references, weights and gradients of one chunk: (samples, examples, ...).

        Ends have one sample for all where no noise tells them apart.
        """
        examples = chunk.examples
        alphas = self._drawn(self.draws.alphas, chunk)
        ends, references, points, noises = [], [], [], []
        for t, (x, table) in enumerate(zip(inputs, baselines, strict=True)):
            end = take(x, examples, x.shape[0]).unsqueeze(0)
            noise = self._noise(x, t, chunk) if self.stdevs[t] > 0 else None
            end = end if noise is None else end + noise
            noises.append(noise)
            rows = self._drawn(self.draws.rows[t], chunk)
            # Whole rows: three times as fast on a CPU as indexing by (samples, examples).
            reference = table.index_select(0, rows.reshape(-1)).view(*rows.shape, *x.shape[1:])
            alpha = alphas.to(x.dtype).reshape(*alphas.shape, *[1] * (x.dim() - 1))
            ends.append(end)
            references.append(reference)
            points.append(torch.lerp(reference, end, alpha))
        flat = input_gradients(
            self.field_of(examples),
            tuple(p.flatten(0, 1) for p in points),
            "double_backprop" if self.differentiation == "recompute" else self.differentiation,
        )
        gradients = tuple(g.reshape(p.shape) for g, p in zip(flat, points, strict=True))
        weights = tuple(
            self._weight(end, reference, noise, centre, examples)
            for end, reference, noise, centre in zip(ends, references, noises, centres, strict=True)
        )
        return tuple(ends), tuple(references), weights, gradients

    def _drawn(self, drawn: Tensor, chunk: "_Chunk") -> Tensor:
        """Of what was drawn for every sample of every example, the chunk's."""
        n_samples, n_examples = len(chunk.samples), chunk.examples.stop - chunk.examples.start
        if (n_samples, n_examples) == drawn.shape:
            return drawn
        return drawn[chunk.samples.start : chunk.samples.stop, chunk.examples]

    def _centres(self, inputs: Tensors, baselines: Tensors) -> "_Centres":
        """Means over all samples that the weights of every chunk refer to, taken once."""
        if not (self.multiply_by_inputs and self.control_variate):
            return (None,) * len(inputs)
        whole = slice(0, inputs[0].shape[0])
        each = [_Chunk(range(k, k + 1), whole) for k in range(self.n_samples)]
        n = self.n_samples
        centres = []
        for t, (x, table) in enumerate(zip(inputs, baselines, strict=True)):
            factor = covariance_factor(n, table.shape[0]) * n / (n - 1)
            mean = _mean(table[rows] for rows in self.draws.rows[t])
            noise = _mean(self._noise(x, t, k)[0] for k in each) if self.stdevs[t] > 0 else None
            centres.append(_Centre(x - table.mean(0) + factor * mean, factor, noise))
        return tuple(centres)

    def _weight(
        self,
        end: Tensor,
        reference: Tensor,
        noise: Tensor | None,
        centre: "_Centre | None",
        examples: slice,
    ) -> Tensor | None:
        if not self.multiply_by_inputs:
            return None
        if centre is None:
            return end - reference
        weight = centre.offset[examples] - centre.factor * reference
        if noise is not None and centre.noise is not None:
            n = self.n_samples
            weight = weight + (noise - centre.noise[examples]) * (n / (n - 1))
        return weight

    def _noise(self, x: Tensor, t: int, chunk: "_Chunk") -> Tensor:
        """Noise is drawn for the whole batch, so that chunks do not change it."""
        like = x.detach()
        stdev = self.stdevs[t]
        return torch.stack(
            [self.draws.noise(like, k, t, stdev)[chunk.examples] for k in chunk.samples]
        )


@dataclass(frozen=True)
class _Chunk:
    samples: range
    examples: slice


@dataclass(frozen=True)
class _Centre:
    offset: Tensor  # (x - mu) + factor * mean of the drawn references, for each example
    factor: float
    noise: Tensor | None  # mean of the drawn noise, for each example


_Centres = tuple[_Centre | None, ...]


def _mean_of_samples(each: Tensor, share: float) -> Tensor:
    """Sum over the samples of a chunk, divided by the number of all, of which it is a share."""
    mean = each.squeeze(0) if each.shape[0] == 1 else each.mean(0)
    return mean if share == 1 else share * mean


def _add(a: Tensors, b: Tensors) -> Tensors:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    """Average without holding more than two of them."""
    iterator = iter(tensors)
    total, count = next(iterator), 1
    for tensor in iterator:
        total, count = total + tensor, count + 1
    return total / count
