r"""A value now, its gradient later: ``recompute`` and ``finite_difference``.

An attribution that averages over samples or path steps is a sum :math:`A = \sum_c A_c(x, \theta)`,
and so is its pullback: :math:`\nabla_\theta\langle v, A\rangle = \sum_c \nabla_\theta\langle v,
A_c\rangle`. ``recompute`` keeps no graph in the forward pass; its backward pass evaluates one term
at a time with its graph, pulls the cotangent through it and lets it go. Exact, in the memory of one
term, at the price of a second pass.

``finite_difference`` needs first derivatives only. For a loss :math:`P` of :math:`g = \nabla_z
f(z)` with cotangent :math:`v = \partial P/\partial g`,

.. math:: \nabla_\theta \langle v, g\rangle = \nabla_\theta \, \partial_v f(z) \approx
    \nabla_\theta \, \lVert v\rVert \, \frac{f(z + h\hat v) - f(z - h\hat v)}{2h}.

Both sides go through the model in one batch: in half precision the cancellation must happen within
the accumulators of its matrix products, before their results are rounded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors.engine._torch import without_hooks
from captum_priors.engine.batch_norm import HeldStatistics
from captum_priors.engine.gradients import (
    Field,
    check_rows,
    nodes,
    refuse_batch_statistics,
    values,
    without_graph,
)
from captum_priors.engine.model import (
    ReluMode,
    current_beta,
    current_pass,
    enter_exact_kernels,
    plainly_in,
    resumed,
    run_eagerly,
    run_modules,
)
from captum_priors.engine.random import GlobalState

Pullback = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[bool]], Sequence[Tensor | None]]
"""(cotangents of the values, sources, which sources want a gradient) to the sources' gradients."""


class Visit(Protocol):
    """Receives each term of the sum, and the rows of the output that it adds to."""

    def __call__(self, term: tuple[Tensor, ...], rows: slice = ...) -> tuple[Tensor, ...]:
        """Return the term as the program is to go on with it."""


Program = Callable[[tuple[Tensor, ...], Visit], tuple[Tensor, ...]]
"""Evaluates the sum from its explicit arguments, passing each term through ``visit``."""

# Forward and backward pass evaluate the same program; nondeterministic GPU kernels reorder sums.
_REPRODUCES = 1e-2
# Finite differences: the steps that are tried, relative to the norm of the point, and what an
# example's slope may be off. In float32 the best step of trained transformers and convolutional
# networks lies between 3e-5 and 3e-2, with errors of 1e-4 to 4e-3; half precision rounds at 2^-8 to
# 2^-11, and in bfloat16 the minimum of 1 to 4 % lies between 5 and 20 %.
_STEPS, _TOLERANCE = (1e-4, 1e-2), (0.2, 0.02)  # of most examples, and of a typical one
_HALF = (torch.float16, torch.bfloat16)
_STEPS_HALF, _TOLERANCE_HALF = (0.05, 0.15), (0.5, 0.25)


def keep_graph(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
    """Visit that leaves the terms as they are: the sum keeps the graph of all of them."""
    return term


def recompute(
    program: Program,
    arguments: tuple[Tensor, ...],
    *,
    forward_func: Any,
    streams: Sequence[str] = ("torch",),
) -> tuple[Tensor, ...]:
    """Evaluate a sum whose backward pass evaluates it again, term by term.

    Args:
        program: The sum; it passes each of its terms through the ``visit`` that it is given.
        arguments: What it is a function of, besides leaf tensors such as parameters.
        forward_func: What refers to the modules that run.
        streams: The global streams that are drawn from.

    Returns:
        The values, as differentiable functions of the arguments and leaves.

    Raises:
        NotDifferentiableError: If examples influence each other, or something with a graph that was
            made before the call takes part.

    Example:
        >>> import torch
        >>> from captum_priors.engine import recompute
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> program = lambda args, visit: visit((w.square() * args[0],))
        >>> (value,) = recompute(program, (torch.tensor([3.0]),), forward_func=None)
        >>> value.item(), torch.autograd.grad(value, w)[0].item()
        (12.0, 12.0)
    """
    if not torch.is_grad_enabled():
        return program(arguments, keep_graph)
    conditions = Conditions(forward_func, streams)
    n_arguments = len(arguments)
    given = tuple(a.detach().requires_grad_(a.requires_grad) for a in arguments)
    with conditions, without_graph(returns_with_graph=True) as current:

        def let_go(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
            # Gradients are recorded up to here, so that nothing that a term depends on is missed.
            current.reach(term, given)
            return tuple(t.detach() for t in term)

        found = tuple(v.detach() for v in program(given, let_go))
    leaves = [*current.leaves.values()]

    def pullback(
        cotangents: Sequence[Tensor], sources: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        given = tuple(sources[i].detach().requires_grad_(wanted[i]) for i in range(n_arguments))
        total: list[Tensor | None] = [None] * len(sources)

        def visit(term: tuple[Tensor, ...], rows: slice = slice(None)) -> tuple[Tensor, ...]:
            weights = [c[rows] for c in cotangents]
            more = _pull(term, [*given, *leaves], wanted, weights)
            for i, gradient in enumerate(more):
                if gradient is not None:
                    so_far = total[i]
                    total[i] = gradient if so_far is None else so_far + gradient
            return tuple(t.detach() for t in term)

        with conditions.again():
            again = program(given, visit)
        for value, repeated in zip(found, again, strict=True):
            _check_reproduced(value, repeated.detach())
        return total

    return with_pullback(found, [*arguments, *conditions.sources(leaves)], pullback)


def _check_reproduced(value: Tensor, repeated: Tensor) -> None:
    difference = (value - repeated).abs().amax() if value.numel() else value.new_zeros(())
    if difference > _REPRODUCES * value.abs().amax():
        raise NotDifferentiableError(
            "recompute: expected the same attributions in the backward pass as in the forward "
            f"pass, found a difference of {float(difference):.3g}. Something outside the model "
            "changed in between; keep it fixed until backward() is over, or use "
            "differentiation='double_backprop'."
        )


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
    with torch.autocast(device, enabled=False) if mixed else nullcontext():
        conditions = Conditions(field, ("torch",))
        with conditions, without_graph(returns_with_graph=False) as current:
            gradients = values(field, exact)
        half = computes_in_half(exact, conditions.modules)
    if conditions.stochastic:
        raise NotDifferentiableError(
            expected_found(
                "`forward_func`",
                "a deterministic forward pass",
                "one that draws random numbers: the two sides of a finite difference would see "
                "different networks",
                "Call model.eval(), use a prior (which holds the model still), or "
                "differentiation='double_backprop'.",
            )
        )
    n_points, leaves = len(points), [*current.leaves.values()]

    def pullback(
        cotangents: Sequence[Tensor], sources: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        with conditions.again():
            at = tuple(sources[i].detach().requires_grad_(wanted[i]) for i in range(n_points))
            line = _Line.along(field, at, cotangents)
            slopes = line.slopes(line.steps(gradients, _STEPS_HALF if half else _STEPS))
            tolerance = _TOLERANCE_HALF if half else _TOLERANCE
            _refuse_another_function(slopes.detach(), cotangents, gradients, tolerance)
            slope = slopes.sum()
            return _pull([slope], [*at, *leaves], wanted, [torch.ones_like(slope)])

    found = with_pullback(gradients, [*exact, *conditions.sources(leaves)], pullback)
    return tuple([g.to(p.dtype) for g, p in zip(found, points, strict=True)])


@dataclass(frozen=True)
class _Line:
    """The outputs along each example's direction :math:`v`, on both sides of its point."""

    field: Field
    points: tuple[Tensor, ...]
    units: tuple[Tensor, ...]  # v / |v|, like the points
    norms: Tensor  # |v|
    lengths: Tensor  # of the step that moves a tensor by all of its own norm

    @classmethod
    def along(
        cls, field: Field, points: tuple[Tensor, ...], directions: Sequence[Tensor]
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
        return cls(field, points, units, norms, lengths)

    def slopes(self, steps: Tensor) -> Tensor:
        """Central difference for each example, its step relative to the norm of the point."""
        step = steps * self.lengths
        sides = []
        for p, unit in zip(self.points, self.units, strict=True):
            move = (step.reshape(-1, *[1] * (p.dim() - 1)) * unit).to(p.dtype)
            sides.append(torch.cat([p + move, p - move]))
        outputs = self.field(tuple(sides))
        check_rows(outputs, sides[0].shape[0])
        above, below = _rows(outputs.reshape(-1, 1)).squeeze(1).chunk(2)
        return (above - below) * (self.norms / (2 * step))

    def steps(self, gradients: Sequence[Tensor], tried: tuple[float, float]) -> Tensor:
        r"""The step of each example where the two errors of a difference are least.

        The slope is known, from the gradient: with a short step :math:`h_1` it is off by rounding,
        :math:`R/h_1`, and with a long one by curvature, :math:`T h_2^2`. Their sum is least at
        :math:`h^3 = R/2T`.
        """
        pairs = zip(self.units, gradients, strict=True)
        known = torch.stack([(_rows(v) * _rows(g)).sum(1) for v, g in pairs]).sum(0)
        short, long = tried
        off_short, off_long = (
            (self.slopes(torch.full_like(known, h)).detach() - self.norms * known).abs()
            for h in tried
        )
        # Outputs are rounded alike: an example that is right by chance is taken as the others are.
        scale = (self.norms / self.lengths).clamp_min(torch.finfo(known.dtype).tiny)
        rounding = short * torch.maximum(off_short, (off_short / scale).median() * scale)
        curvature = (off_long - rounding / long).clamp_min(0) / long**2
        # A long step that is off by as much as the slope is large leaves out how much more.
        far = off_long > 0.3 * self.norms * known.abs()
        curvature = torch.where(far, torch.maximum(curvature, off_short / short**2), curvature)
        best = (rounding / (2 * curvature)) ** (1 / 3)
        return best.nan_to_num(long).clamp(short / 3, 3 * long)


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


def _refuse_another_function(
    slopes: Tensor,
    cotangents: Sequence[Tensor],
    gradients: Sequence[Tensor],
    tolerance: tuple[float, float],
) -> None:
    """Check each example's slope against that of the backward pass.

    They disagree where the backward pass is not the derivative of the forward pass (detach,
    straight-through estimators, hooks), where examples influence each other, where the model draws
    random numbers of its own, and where the step is too long for the function. The scale is that of
    a random direction: penalties that ignore the scale of attributions are orthogonal to them. What
    is not finite comes out as such, for a loss scaler to see.
    """
    vectors, known = (torch.cat([_rows(t) for t in each], 1) for each in (cotangents, gradients))
    expected = (vectors * known).sum(1)
    size = vectors.norm(dim=1) * known.norm(dim=1)
    # An example whose gradient is much smaller than the batch's is lost in rounding.
    scale = expected.abs() + (size + 0.1 * size.mean()) / vectors.shape[1] ** 0.5
    share = (slopes - expected).abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    # One example in twenty may lie at a kink within the step, where a part of its slope changes;
    # more than that, or a slope that is another altogether, has another reason.
    wrong = share > (tolerance[0] if share.median() <= tolerance[1] else tolerance[1])
    if bool((wrong.sum() > max(1, len(wrong) // 20)) | (share.amax() > 0.6)):
        raise NotDifferentiableError(
            expected_found(
                "finite_difference",
                "differences of the outputs that agree with the input gradient of each example",
                f"{int(wrong.sum())} of {len(wrong)} examples that do not, with a relative error "
                f"of up to {float(share[wrong].amax()):.2g}",
                "Look for detach(), custom backward passes, tensor hooks, operations across the "
                "batch, random numbers from a generator of the model's own, or inputs far from the "
                "origin; differentiation='double_backprop' takes the backward pass as it is.",
            )
        )


# ---- Known values with a gradient that is computed when it is asked for ---------------------


class _WithPullback(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pullback: Pullback, n_values: int, *tensors: Tensor) -> Any:
        known, sources = tensors[:n_values], tensors[n_values:]
        ctx.pullback, ctx.sources, ctx.n_values = pullback, sources, n_values
        # Unpacked in backward for torch's check that nobody changed them in place in between.
        ctx.save_for_backward(*sources)
        return tuple(value.detach() for value in known)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 + ctx.n_values :]
        gradients = ctx.pullback(cotangents, ctx.sources, wanted)
        return (None, None, *([None] * ctx.n_values), *gradients)


def with_pullback(
    known: Sequence[Tensor], sources: Sequence[Tensor], pullback: Pullback
) -> tuple[Tensor, ...]:
    """Return known values as differentiable functions of the sources, by their pullback."""
    if not any(source.requires_grad for source in sources):
        return tuple(known)
    apply: Callable[..., tuple[Tensor, ...]] = _WithPullback.apply
    return apply(pullback, len(known), *known, *sources)


def _pull(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradient of <cotangents, outputs> with respect to the wanted sources, None elsewhere."""
    found: list[Tensor | None] = [None] * len(sources)
    connected = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    places = [i for i, want in enumerate(wanted) if want]
    if not connected or not places:
        return found
    wanted_sources = [sources[i] for i in places]
    with without_hooks(wanted_sources):
        gradients = torch.autograd.grad(
            [o for o, _ in connected],
            wanted_sources,
            [c for _, c in connected],
            # Terms of a sum may share a part of their graph. Compiled modules cannot keep theirs.
            retain_graph=not any(n.name() == "CompiledFunctionBackward" for n in nodes(outputs)),
            allow_unused=True,
        )
    for place, gradient in zip(places, gradients, strict=True):
        found[place] = gradient
    return found


# ---- The same forward pass, later ----------------------------------------------------------


class Conditions:
    """What decides the value of a forward pass besides its arguments and parameters.

    The backward pass of ``recompute`` and ``finite_difference`` runs the model again when the prior
    that held it still is long over; without this it would see another network. The block is the
    forward pass; afterwards ``modules`` are those that may have run, and ``stochastic`` says
    whether torch's random numbers were drawn.
    """

    modules: tuple[nn.Module, ...]
    stochastic: bool

    def __init__(self, forward_func: Any, streams: Sequence[str]) -> None:
        self._pass = current_pass()
        self._exact = self._pass is None or self._pass.exact
        self._held = HeldStatistics() if self._pass is None else self._pass.statistics
        self._roots, self._hidden = plainly_in((forward_func,))
        refuse_batch_statistics(m for root in self._roots for m in root.modules())
        self._random, self._streams = GlobalState.now(streams), streams
        self._beta = current_beta()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()

    def __enter__(self) -> "Conditions":
        with ExitStack() as stack:
            watch: Any = run_modules() if self._hidden else nullcontext(())
            self._running = stack.enter_context(watch)
            stack.enter_context(self._held.as_leaves())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        held = self._pass.modules if self._pass is not None else ()
        roots = (*self._roots, *self._running)
        self.modules = tuple({*held, *(m for root in roots for m in root.modules())})
        self.stochastic = self._random.moved()
        self._states = [
            (module, name, value)
            for module in self.modules
            for name, value in _state_of(module, self._held)
        ]

    def sources(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return what the leaves of the forward pass stand for: statistics have a graph."""
        return [self._held.source(leaf) for leaf in leaves]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Re-create the conditions, with gradients recorded."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(resumed(self._pass))
            if self.stochastic or len(self._streams) > 1:
                stack.callback(GlobalState.now(self._streams).restore)
                self._random.restore()
            undo = [(module, name, getattr(module, name)) for module, name, _ in self._states]
            stack.callback(_set_all, undo)
            _set_all(self._states)
            if self._exact:
                enter_exact_kernels(stack, self.modules)
            if self._held:
                run_eagerly(stack)
                self._held.restart()
                stack.enter_context(self._held.as_leaves())
                stack.enter_context(self._held)
            if self._beta is not None or current_beta() is not None:
                stack.enter_context(ReluMode(self._beta))
            for device, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(
                        torch.autocast(
                            device, dtype=dtype, enabled=enabled, cache_enabled=self._autocast_cache
                        )
                    )
            yield


def _state_of(module: nn.Module, held: HeldStatistics) -> Iterator[tuple[str, Any]]:
    """Flags that decide how a module runs, and copies of the buffers that it may read."""
    yield "training", module.training
    if isinstance(module, nn.RNNBase):
        yield "dropout", module.dropout
    for name, buffer in module.named_buffers(recurse=False):
        yield name, buffer if buffer.requires_grad or held.knows(buffer) else buffer.clone()


def _set_all(states: Sequence[tuple[nn.Module, str, Any]]) -> None:
    for module, name, value in states:
        setattr(module, name, value)
