"""Projected gradient ascent on a score of perturbed inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_priors._checks import check_count
from captum_priors.engine.gradients import differentiate
from captum_priors._errors import expected_found
from captum_priors.stability._regularizer import Tensors, check_number


@dataclass(frozen=True)
class Ascent:
    """Steps along the sign of the gradient, within a maximum-norm ball and the valid range."""

    radius: float
    step_size: float
    n_iter: int
    bounds: tuple[float, float] | None

    def __post_init__(self) -> None:
        check_number("radius", self.radius)
        check_number("step_size", self.step_size)
        check_count("n_iter", self.n_iter)
        bounds = self.bounds
        if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ValueError(
                expected_found(
                    "`bounds`",
                    "None, or the least and the largest valid input",
                    repr(bounds),
                    "Pass for example bounds=(0, 1).",
                )
            )

    def start(self, inputs: Tensors) -> Tensors:
        """Return a random point of the ball: at its centre the gradients that matter vanish."""
        moves = [(2 * torch.rand_like(x) - 1) * self.radius for x in _detached(inputs)]
        return self._valid(tuple(x.detach() + m for x, m in zip(inputs, moves, strict=True)))

    def climb(
        self, inputs: Tensors, points: Tensors, score: Callable[[Tensors], Tensor]
    ) -> Tensors:
        """Raise the scores, one for each row, from the given points on."""
        for _ in range(self.n_iter):
            points = tuple(p.detach().requires_grad_() for p in points)
            gradients = differentiate(score(points), points, create_graph=False)
            moved = []
            for x, p, g in zip(_detached(inputs), _detached(points), gradients, strict=True):
                step = p + self.step_size * g.sign()
                moved.append(torch.maximum(torch.minimum(step, x + self.radius), x - self.radius))
            points = self._valid(tuple(moved))
        return points

    def _valid(self, points: Tensors) -> Tensors:
        if self.bounds is None:
            return points
        return tuple(p.clamp(*self.bounds) for p in points)


def _detached(tensors: Tensors) -> Tensors:
    return tuple(t.detach() for t in tensors)
