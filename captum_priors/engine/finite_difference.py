r"""Input gradients by first derivatives only, for models whose kernels have no second ones.

For a loss :math:`P` of :math:`g = \nabla_z f(z)` with cotangent :math:`v = \partial P/\partial g`,

.. math:: \nabla_\theta \langle v, g\rangle = \nabla_\theta \, \partial_v f(z) \approx
    \nabla_\theta \, \lVert v\rVert \, \frac{f(z + h\hat v) - f(z - h\hat v)}{2h}.

Both sides go through the model in one batch: in half precision the cancellation must happen within
the accumulators of its matrix products, before their results are rounded.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors.engine.coupled import other_rows
from captum_priors.engine.gradients import Field, check_rows, values, without_graph
from captum_priors.engine.modules import run_eagerly
from captum_priors.engine.replay import Conditions, pull, with_pullback

# Steps are relative to the norm of the point. In float32 the best one of trained transformers and
# smooth networks lies between 1e-5 and 3e-2, with errors of 1e-5 to 6e-3: two are tried to find it.
# Half precision rounds at 2^-8 to 2^-11: in bfloat16 the least error lies between 5 and 20 %.
_LEAST, *_TRIED = 1e-5, 1e-3, 1e-2
_LEAST_HALF, *_TRIED_HALF = 0.017, 0.05, 0.15
_HALF = (torch.float16, torch.bfloat16)


def finite_difference(field: Field, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Input gradients whose parameter gradient is a central difference of first derivatives.

    Evaluated in full precision also under autocast, with a step chosen for each example.

    Raises:
        NotDifferentiableError: If examples influence each other or random numbers are drawn, and,
            in the backward pass, if the differences disagree with the gradients.
    """
    device = points[0].device.type
    mixed = torch.is_autocast_enabled(device)
    exact = tuple([p.float() if mixed and p.dtype in _HALF else p for p in points])
    with torch.autocast(device, enabled=False) if mixed else nullcontext(), full_precision(device):
        conditions = Conditions(field, ("torch",))
        with conditions, without_graph(returns_with_graph=False) as current:
            gradients = values(field, exact)
        half = computes_in_half(exact, conditions.modules)
    if conditions.stochastic:
        raise refusal(
            NotDifferentiableError,
            "`forward_func`",
            "a deterministic forward pass",
            "one that draws random numbers: the two sides of a finite difference would see "
            "different networks",
            "Call model.eval(), use a prior (which holds the model still), or "
            "differentiation='double_backprop'.",
        )
    n_points, leaves = len(points), [*current.leaves.values()]

    def pullback(
        cotangents: Sequence[Tensor], sources: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        with conditions.again(), full_precision(device):
            at = tuple(sources[i].detach().requires_grad_(wanted[i]) for i in range(n_points))
            slopes = []
            for i in range(0, len(gradients), n_points):  # of one output, or one after another
                own = slice(i, i + n_points)
                one = field if len(gradients) == n_points else _part(field, i // n_points)
                line = _Line.along(one, at, cotangents[own], gradients[own])
                slopes.append(line.checked_slopes(half).sum())
            slope = torch.stack(slopes).sum()
            return pull([slope], [*at, *leaves], wanted, [torch.ones_like(slope)])

    found = with_pullback(gradients, [*exact, *conditions.sources(leaves)], pullback)
    return tuple([g.to(p.dtype) for g, p in zip(found, cycle(points), strict=False)])


class _WithoutAutocast(TorchFunctionMode):
    """Leaves autocast in each operation, also where the model enters it by itself."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not torch.is_autocast_enabled(self.device):
            return func(*args, **(kwargs or {}))
        with torch.autocast(self.device, enabled=False):
            return func(*args, **(kwargs or {}))


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Run without autocast a model that enters it, as one does that Accelerate has prepared.

    What is compiled runs as it was written: compiled code has autocast in it.
    """
    with ExitStack() as stack:
        run_eagerly(stack)
        stack.enter_context(_WithoutAutocast(device))
        yield


@dataclass(frozen=True)
class _Line:
    """The outputs along each example's direction :math:`v`, on both sides of its point."""

    field: Field
    points: tuple[Tensor, ...]
    units: tuple[Tensor, ...]  # v / |v|, like the points
    norms: Tensor  # |v|
    lengths: Tensor  # of the step that moves a tensor by all of its own norm
    known: Tensor  # the slope that the gradient says
    scale: Tensor  # of slopes in random directions

    @classmethod
    def along(
        cls,
        field: Field,
        points: tuple[Tensor, ...],
        directions: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> "_Line":
        vectors = [_rows(v) for v in directions]
        each = torch.stack([v.norm(dim=1) for v in vectors])
        norms = each.square().sum(0).sqrt()
        unit = torch.where(norms > 0, norms, torch.ones_like(norms))
        scales = torch.stack([_rows(p.detach()).norm(dim=1) for p in points])
        typical = scales.mean(dim=1, keepdim=True)
        typical = torch.where(typical > 0, typical, torch.ones_like(typical))
        # A point much nearer to the origin than its batch (a zero baseline) would get no step.
        scales = torch.maximum(scales, 0.1 * typical)
        share = (each / unit).clamp_min(torch.finfo(norms.dtype).tiny)
        lengths = torch.where(norms > 0, (scales / share).amin(0), torch.ones_like(norms))
        pairs = zip(vectors, points, strict=True)
        units = tuple((v / unit.unsqueeze(1)).reshape(p.shape) for v, p in pairs)
        v, g = torch.cat(vectors, 1), torch.cat([_rows(each) for each in gradients], 1)
        known, size = (v * g).sum(1), norms * g.norm(dim=1)
        # An example whose gradient is much smaller than the batch's is lost in rounding.
        scale = known.abs() + (size + 0.1 * size.mean()) / v.shape[1] ** 0.5
        return cls(field, points, units, norms, lengths, known, scale)

    def slopes(self, steps: Any) -> tuple[Tensor, Tensor]:
        """Central difference for each example, its step relative to the norm of the point.

        With it comes how far it is from what the gradient says.
        """
        step = steps * self.lengths
        sides = []
        for p, unit in zip(self.points, self.units, strict=True):
            move = (step.reshape(-1, *[1] * (p.dim() - 1)) * unit).to(p.dtype)
            sides.append(torch.cat([p + move, p - move]))
        with other_rows(f"{len(sides[0])} rows"):
            outputs = self.field(tuple(sides))
        check_rows(outputs, sides[0].shape[0])
        above, below = _rows(outputs.reshape(-1, 1)).squeeze(1).chunk(2)
        slopes = (above - below) * (self.norms / (2 * step))
        return slopes, (slopes.detach() - self.known).abs()

    def errors(self, short: float, long: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        r"""The two errors of a difference: those of rounding times the step, and of curvature.

        A step :math:`h` is off by :math:`R/h + T h^2`, where :math:`R` is known: one or two units
        in the last place of the largest output. :math:`T` is told by the shorter of two steps if it
        is off by more, or else by the longer. Last comes by how much the nearer of the two is off.
        """
        with torch.no_grad():
            largest = self.field(self.points).abs().amax()
        rounding = eps * largest * self.norms / self.lengths
        (_, off_short), (_, off_long) = self.slopes(short), self.slopes(long)
        curvature = torch.where(
            off_short > 4 * rounding / short,
            off_short / short**2,
            (off_long - rounding / long).clamp_min(0) / long**2,
        )
        return rounding, curvature, torch.minimum(off_short, off_long)

    def checked_slopes(self, half: bool) -> Tensor:
        """Slopes by the best steps, which agree with the gradient of each example.

        They do not where the backward pass is not the derivative of the forward pass (detach,
        straight-through estimators, hooks), where examples influence each other, where the model
        draws random numbers of its own, and where there is too much rounding. Penalties that ignore
        the scale of attributions are orthogonal to them, so the scale is that of a random
        direction. What is not finite comes out as such, for a loss scaler to see.
        """
        short, long = _TRIED_HALF if half else _TRIED
        eps = torch.finfo(torch.bfloat16 if half else self.known.dtype).eps
        rounding, curvature, nearer = self.errors(short, long, eps)

        def best(curvature: Tensor) -> Tensor:
            """Return the step where the sum of both errors is least."""
            least = (rounding / (2 * curvature)) ** (1 / 3)
            return least.nan_to_num(long).clamp(_LEAST_HALF if half else _LEAST, 3 * long)

        steps = best(curvature)
        slopes, off = self.slopes(steps)
        # What another backward pass leaves out is missing at every step, and at kinks at some.
        share = torch.minimum(off, nearer) / self.scale.clamp_min(torch.finfo(off.dtype).tiny)
        most, typical = (0.5, 0.25) if half else (0.05, 0.02)
        wrong = share > (most if share.median() <= typical else typical)
        if bool((wrong.sum() > len(share) // 20) | (share.amax() > 0.6)):
            raise refusal(
                NotDifferentiableError,
                "finite_difference",
                "differences of the outputs that agree with the input gradient of each example",
                f"{int(wrong.sum())} of {len(wrong)} examples that do not, with a relative error "
                f"of up to {float(share.amax()):.2g}",
                ("In half precision it may be rounding alone. Otherwise look" if half else "Look")
                + " for detach(), custom backward passes, tensor hooks, operations across the "
                "batch, random numbers from a generator of the model's own, or inputs far from the "
                "origin; differentiation='double_backprop' takes the backward pass as it is.",
            )
        # At kinks slopes change by jumps, so that shorter steps come closer to the known slope, but
        # its derivative by the parameters no closer: the fewer the jumps, the larger each counts.
        # (Smooth networks are off by at most 1e-4, and by chance the estimate of it is nought.)
        error = rounding / steps + curvature * steps**2
        kinked = off > 4 * error + 1e-4 * self.scale
        if bool(kinked.float().mean() > 0.5):
            raise refusal(
                NotDifferentiableError,
                "finite_difference",
                "a function that is smooth along each example's direction",
                f"kinks (ReLU, max-pooling, abs), or too much rounding, in {int(kinked.sum())} of "
                f"{len(kinked)} examples, where a difference is as good as noise",
                "differentiation='double_backprop' is exact for them; or smooth them: smooth=30 of "
                "the prior runs ReLU as Softplus.",
            )
        if bool(kinked.any()):  # or the tried steps were too long to tell
            slopes, _ = self.slopes(torch.where(kinked, best(off / steps**2), steps))
        return slopes


def _part(field: Field, which: int) -> Field:
    """One of the outputs of a field of several."""
    return lambda points: field(points)[which]


def _rows(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(tensor.shape[0], -1)
    return rows.float() if rows.dtype in _HALF else rows


def computes_in_half(points: Sequence[Tensor], modules: Sequence[nn.Module] = ()) -> bool:
    """Whether the model will compute in half precision, of itself or by autocast."""
    return (
        any(p.dtype in _HALF for p in points)
        or torch.is_autocast_enabled(points[0].device.type)
        or any(p.dtype in _HALF for m in modules for p in m.parameters(recurse=False))
    )
