"""The random choices of expected gradients: reference rows, path positions, noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SEEDS = 2**62


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
