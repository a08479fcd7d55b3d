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
        for samples, examples in self._chunks(inputs[0].shape[0]):
            ends, references, weights, gradients = self._terms(inputs, baselines, samples, examples)
            explained = torch.stack(
                [
                    (g if w is None else w * g).flatten(2).sum(2)
                    for w, g in zip(weights, gradients, strict=True)
                ]
            ).sum(0)
            n = len(range(*samples.indices(self.n_samples)))
            field = self.field_of(examples)
            start, end = (
                field(tuple(p.flatten(0, 1) for p in points)).reshape(n, -1)
                for points in (references, ends)
            )
            if examples.start in (None, 0):
                deltas.append([])
            deltas[-1].append(explained - (end - start))
        return torch.cat([torch.cat(parts, 1) for parts in deltas]).T.reshape(-1)

    @property
    def n_samples(self) -> int:
        """Number of samples for each example."""
        return self.draws.alphas.shape[0]

    def _chunks(self, batch: int) -> Iterator[tuple[slice, slice]]:
        """Samples and examples of each chunk, at most ``rows_at_once`` rows in each."""
        at_once = self.rows_at_once or self.n_samples * batch
        if at_once >= batch:
            width = at_once // batch
            for start in range(0, self.n_samples, width):
                yield slice(start, min(start + width, self.n_samples)), slice(0, batch)
        else:
            for k in range(self.n_samples):
                for start in range(0, batch, at_once):
                    yield slice(k, k + 1), slice(start, min(start + at_once, batch))

    def _program(self, n_inputs: int) -> Program:
        def program(arguments: Tensors, visit: Visit) -> Tensors:
            inputs, baselines = arguments[:n_inputs], arguments[n_inputs:]
            batch = inputs[0].shape[0]
            total: Tensors = ()
            block: list[Tensors] = []
            for samples, examples in self._chunks(batch):
                _, _, weights, gradients = self._terms(inputs, baselines, samples, examples)
                term = tuple(
                    (g if w is None else w * g).sum(0) / self.n_samples
                    for w, g in zip(weights, gradients, strict=True)
                )
                block.append(visit(term, examples))
                if examples.stop == batch:
                    whole = (
                        block[0]
                        if len(block) == 1
                        else tuple(torch.cat(parts) for parts in zip(*block, strict=True))
                    )
                    total = (
                        whole
                        if not total
                        else tuple(t + w for t, w in zip(total, whole, strict=True))
                    )
                    block = []
            return total

        return program

    def _terms(
        self, inputs: Tensors, baselines: Tensors, samples: slice, examples: slice
    ) -> tuple[Tensors, Tensors, tuple[Tensor | None, ...], Tensors]:
        """Path ends, references, weights and gradients of one chunk: (samples, examples, ...)."""
        ks = range(*samples.indices(self.n_samples))
        ends, references, points = [], [], []
        for t, (x, table) in enumerate(zip(inputs, baselines, strict=True)):
            end = x[examples].unsqueeze(0)
            if self.stdevs[t] > 0:
                end = end + self._noise(x, t, ks, examples)
            reference = table[self.draws.rows[t][samples, examples]]
            alpha = self.draws.alphas[samples, examples].to(x.dtype)
            alpha = alpha.reshape(*alpha.shape, *[1] * (x.dim() - 1))
            ends.append(end.expand_as(reference))
            references.append(reference)
            points.append(torch.lerp(reference, ends[t], alpha.expand_as(reference)))
        field = self.field_of(examples)
        shape = (len(ks), points[0].shape[1])
        flat = input_gradients(
            field,
            tuple(p.flatten(0, 1) for p in points),
            "double_backprop" if self.differentiation == "recompute" else self.differentiation,
        )
        gradients = tuple(g.reshape(*shape, *g.shape[1:]) for g in flat)
        weights = tuple(
            self._weight(t, inputs[t], baselines[t], ends[t], references[t], ks, examples)
            for t in range(len(inputs))
        )
        return tuple(ends), tuple(references), weights, gradients

    def _weight(
        self,
        t: int,
        x: Tensor,
        table: Tensor,
        end: Tensor,
        reference: Tensor,
        ks: range,
        examples: slice,
    ) -> Tensor | None:
        if not self.multiply_by_inputs:
            return None
        if not self.control_variate:
            return end - reference
        n = self.n_samples
        factor = covariance_factor(n, table.shape[0]) * n / (n - 1)
        if len(ks) == n:
            mean = reference.mean(0)
        else:
            rows = self.draws.rows[t][:, examples]
            mean = _mean(table[rows[k]] for k in range(n))
        weight = (x[examples] - table.mean(0) + factor * mean) - factor * reference
        if self.stdevs[t] > 0:
            mean_noise = _mean(self._noise(x, t, range(k, k + 1), examples)[0] for k in range(n))
            noise = self._noise(x, t, ks, examples)
            weight = weight + (noise - mean_noise) * (n / (n - 1))
        return weight

    def _noise(self, x: Tensor, t: int, ks: range, examples: slice) -> Tensor:
        like = x.detach()
        return torch.stack([self.draws.noise(like, k, t, self.stdevs[t])[examples] for k in ks])


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    """Average without holding more than two of them."""
    iterator = iter(tensors)
    total, count = next(iterator), 1
    for tensor in iterator:
        total, count = total + tensor, count + 1
    return total / count
