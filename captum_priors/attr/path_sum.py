r"""The sum behind expected gradients: what is drawn for it, and its evaluation in chunks.

With references :math:`x'_k`, positions :math:`\alpha_k` and displacements :math:`d_k = x - x'_k`,
both estimators are :math:`\frac1n \sum_k w_k \odot g_k` with :math:`g_k = \nabla f(x'_k + \alpha_k
d_k)` and differ in the weights: :math:`w_k = d_k` for the paper's, and for the control variate

.. math:: w_k = (x - \mu) - \tfrac{n}{n-1} F (x'_k - \bar x'),

which is :math:`(x - \mu) \odot \bar g` plus the sample covariance of :math:`d` and :math:`g`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_priors._rows import Rows
from captum_priors._types import Differentiation
from captum_priors.engine import Visit, input_gradients, recompute

Tensors = tuple[Tensor, ...]
_SEEDS = 2**62

# ---- What is drawn -------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """What was drawn, sample-major: entry ``[k, i]`` belongs to sample ``k`` of example ``i``."""

    rows: tuple[Tensor, ...]  # (n_samples, batch) for each input; one shared tensor when joint
    alphas: Tensor  # (n_samples, batch), in [0, 1]
    noise_seed: int

    @classmethod
    def new(
        cls,
        n_samples: int,
        batch: int,
        n_rows: Sequence[int],
        *,
        stratified: bool,
        generator: torch.Generator | None,
        device: torch.device | None = None,
    ) -> "Draws":
        """Draw on the generator's device (the CPU by default), so that seeds mean the same.

        What is drawn moves to ``device``, next to the inputs.
        """
        here = generator.device if generator is not None else torch.device("cpu")
        drawn: dict[int, Tensor] = {}
        for n in n_rows:
            if n not in drawn:
                rows = _reference_rows(n_samples, batch, n, generator, here)
                if drawn and n_samples >= n > 1:
                    # Whole passes over a table come in order, which would pair its rows with those
                    # of the tables before.
                    order = torch.rand(n_samples, batch, generator=generator, device=here)
                    rows = rows.gather(0, order.argsort(0))
                drawn[n] = rows.to(device, non_blocking=True)
        alphas = torch.rand(n_samples, batch, generator=generator, device=here)
        if stratified:
            # One position in each of n equal parts of the path, in random order.
            order = torch.rand(n_samples, batch, generator=generator, device=here).argsort(0)
            alphas = (order + alphas) / n_samples
        seed = int(torch.randint(_SEEDS, (), generator=generator, device=here))
        alphas = alphas.to(device, non_blocking=True)
        return cls(tuple(map(drawn.__getitem__, n_rows)), alphas, seed)

    def noise(self, like: Tensor, sample: int, tensor: int, stdev: float) -> Tensor:
        """Gaussian noise of one sample, the same whenever it is asked for."""
        generator = torch.Generator(like.device).manual_seed(
            (self.noise_seed + 1_000_003 * sample + tensor) % _SEEDS
        )
        shape, dtype = like.shape, like.dtype
        return stdev * torch.randn(shape, generator=generator, dtype=dtype, device=like.device)


def _reference_rows(
    n_samples: int, batch: int, n_rows: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Rows for each example, every row used as often as any other, give or take one."""
    whole, rest = divmod(n_samples, n_rows)
    if whole == 0:
        return _distinct(rest, batch, n_rows, generator, device)
    every = torch.arange(n_rows, device=device).repeat(whole)
    passes = every.unsqueeze(1).expand(-1, batch)
    if rest == 0:
        return passes
    return torch.cat([passes, _distinct(rest, batch, n_rows, generator, device)])


def _distinct(
    n: int, batch: int, n_rows: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Uniform ordered samples without replacement, one in each column."""
    if n * n > n_rows:
        scores = torch.rand(n_rows, batch, generator=generator, device=device)
        return scores.argsort(0)[:n]
    # Few from many: draw with replacement and draw again the columns that repeat a row (rejection
    # keeps the distribution uniform; here at least half of the columns are accepted each time).
    drawn = torch.randint(n_rows, (n, batch), generator=generator, device=device)
    while n > 1:
        ordered = drawn.sort(0).values
        again = (ordered[1:] == ordered[:-1]).any(0)
        n_again = int(again.sum())
        if n_again == 0:
            break
        drawn[:, again] = torch.randint(n_rows, (n, n_again), generator=generator, device=device)
    return drawn


def covariance_factor(n_samples: int, n_rows: int) -> float:
    r"""Factor that makes the sample covariance unbiased for rows drawn evenly from a finite set.

    With a fraction :math:`p` of pairs of samples on the same row, the sample covariance estimates
    :math:`\frac{R}{R-1}(1-p)` times the covariance over the set. For distinct rows :math:`p = 0`
    and the factor is :math:`(R-1)/R`.
    """
    if n_rows == 1:
        return 0.0  # d does not vary
    whole, rest = divmod(n_samples, n_rows)
    pairs = (n_rows - rest) * whole * (whole - 1) + rest * (whole + 1) * whole
    same = pairs / (n_samples * (n_samples - 1))
    return (n_rows - 1) / n_rows / (1 - same)


# ---- The sum -------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    samples: slice
    examples: slice


class _Centre(NamedTuple):
    offset: Tensor  # what the weights of all samples of an example share
    factor: float  # of their references
    unbiased: float  # of their noise


class _Terms(NamedTuple):
    """Path ends, references and weighted gradients of one chunk: (samples, examples, ...).

    Ends have one sample for all where no noise tells them apart.
    """

    ends: list[Tensor]
    references: list[Tensor]
    products: list[Tensor]  # of several outputs, those of one after those of another


@dataclass(frozen=True)
class PathSum:
    """A set-up expected-gradients sum: everything is drawn, nothing is evaluated yet."""

    rows: Rows
    draws: Draws
    stdevs: tuple[float, ...]
    multiply_by_inputs: bool
    control_variate: bool
    differentiation: Differentiation
    rows_at_once: int | None

    def attributions(
        self, inputs: Tensors, baselines: Tensors, visit: Visit | None = None
    ) -> Tensors:
        """Evaluate the sum, with its graph where gradients are recorded.

        Where graphs come later, ``recompute`` evaluates it with a ``visit`` for each term.
        """
        if self.differentiation == "recompute" and visit is None:
            n_inputs = len(inputs)
            return recompute(
                lambda given, visit: self.attributions(given[:n_inputs], given[n_inputs:], visit),
                (*inputs, *baselines),
                forward_func=self.rows,
            )
        total: Tensors = ()
        block: list[Tensors] = []
        centres = self._centres(inputs, baselines) if self.control_variate else []
        for chunk in self._chunks():
            term = []
            for each in self._terms(inputs, baselines, centres, chunk).products:
                mean = each.squeeze(0) if each.shape[0] == 1 else each.mean(0)
                share = each.shape[0] / len(self.draws.alphas)
                term.append(mean if share == 1 else share * mean)
            block.append(visit(tuple(term), chunk.examples) if visit else tuple(term))
            if chunk.examples.stop == self.rows.n:
                whole = block[0]
                if len(block) > 1:
                    whole = tuple(map(torch.cat, zip(*block, strict=True)))
                total = tuple(map(torch.add, total, whole)) if total else whole
                block = []
        return total

    @torch.no_grad()
    def convergence_delta(self, inputs: Tensors, baselines: Tensors) -> Tensor:
        """Per sample, what the attributions miss of f(x) - f(x'), in Captum's order of rows."""
        deltas = inputs[0].new_empty(self.draws.alphas.shape)
        centres = self._centres(inputs, baselines) if self.control_variate else []
        for chunk in self._chunks():
            terms = self._terms(inputs, baselines, centres, chunk)
            explained = [product.flatten(2).sum(2) for product in terms.products]
            field = self.rows.of(chunk.examples)
            ends = [e.expand_as(r) for e, r in zip(terms.ends, terms.references, strict=True)]
            start, end = (
                field(tuple(p.flatten(0, 1) for p in points)).reshape(explained[0].shape)
                for points in (terms.references, ends)
            )
            deltas[chunk] = torch.stack(explained).sum(0) - (end - start)
        return deltas.T.reshape(-1)

    def _chunks(self) -> list[_Chunk]:
        """Split the rows, at most ``rows_at_once`` in each chunk."""
        n, batch = self.draws.alphas.shape
        at_once = self.rows_at_once or n * batch
        samples, examples = max(1, at_once // batch), min(at_once, batch)
        return [
            _Chunk(slice(k, min(k + samples, n)), slice(start, min(start + examples, batch)))
            for k in range(0, n, samples)
            for start in range(0, batch, examples)
        ]

    def _terms(
        self, inputs: Tensors, baselines: Tensors, centres: list[_Centre], chunk: _Chunk
    ) -> _Terms:
        terms, points, weights = _Terms([], [], []), [], []
        alphas = self.draws.alphas[chunk]
        for t, (x, table) in enumerate(zip(inputs, baselines, strict=True)):
            end = x[chunk.examples].unsqueeze(0)
            noise = self._noise(x, t, chunk) if self.stdevs[t] > 0 else None
            end = end if noise is None else end + noise
            rows = self.draws.rows[t][chunk]
            # Whole rows: three times as fast on a CPU as indexing by (samples, examples).
            reference = table.index_select(0, rows.reshape(-1)).view(*rows.shape, *x.shape[1:])
            alpha = alphas.to(x.dtype).reshape(*alphas.shape, *[1] * (x.dim() - 1))
            terms.ends.append(end)
            terms.references.append(reference)
            points.append(torch.lerp(reference, end, alpha).flatten(0, 1))
            weight = end - reference if self.multiply_by_inputs and not centres else None
            if centres:
                weight = centres[t].offset[chunk.examples] - centres[t].factor * reference
                weight = weight if noise is None else weight + centres[t].unbiased * noise
            weights.append(weight)
        flat = input_gradients(
            self.rows.of(chunk.examples),
            tuple(points),
            "double_backprop" if self.differentiation == "recompute" else self.differentiation,
        )
        # Of several outputs, the gradients of one follow those of another.
        times = len(flat) // len(points)
        around = zip(weights * times, terms.references * times, strict=True)
        for gradient, (weight, reference) in zip(flat, around, strict=True):
            each = gradient.reshape(reference.shape)
            terms.products.append(each if weight is None else weight * each)
        return terms

    def _centres(self, inputs: Tensors, baselines: Tensors) -> list[_Centre]:
        """Means over all samples that the control variate's weights refer to, taken once."""
        centres, n = [], len(self.draws.alphas)
        unbiased = n / (n - 1)
        for t, (x, table) in enumerate(zip(inputs, baselines, strict=True)):
            factor = covariance_factor(n, table.shape[0]) * unbiased
            offset = x - table.mean(0) + factor * _mean(table[rows] for rows in self.draws.rows[t])
            if self.stdevs[t] > 0:
                each = (_Chunk(slice(k, k + 1), slice(None)) for k in range(n))
                noise = _mean(self._noise(x, t, chunk)[0] for chunk in each)
                offset = offset - unbiased * noise
            centres.append(_Centre(offset, factor, unbiased))
        return centres

    def _noise(self, x: Tensor, t: int, chunk: _Chunk) -> Tensor:
        """Noise is drawn for the whole batch, so that chunks do not change it."""
        like, stdev = x.detach(), self.stdevs[t]
        samples = range(chunk.samples.start, chunk.samples.stop)
        return torch.stack([self.draws.noise(like, k, t, stdev)[chunk.examples] for k in samples])


def _mean(tensors: Iterator[Tensor]) -> Tensor:
    """Average without holding more than two of them."""
    total, count = next(tensors), 1
    for tensor in tensors:
        total, count = total + tensor, count + 1
    return total / count
