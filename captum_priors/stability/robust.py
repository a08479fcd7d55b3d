"""Regularizers that look at the worst point of a ball: robust attribution and its alignment."""

from functools import partial
from typing import Any, ClassVar, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from captum_priors._captum import like_inputs
from captum_priors._checks import count, positive
from captum_priors._errors import one_of
from captum_priors._rows import carried
from captum_priors._types import TensorOrTuple
from captum_priors.attacks.ball import Ball, Sizes, Tensors, balls, check_sizes, climb, draw
from captum_priors.engine import derive
from captum_priors.engine.model import BatchNorm
from captum_priors.penalties.maths import cosine_distance
from captum_priors.priors.base import Call, Reduction
from captum_priors.priors.classes import cross_entropies, logits_and_labels
from captum_priors.stability.base import GradientRegularizer, Shared, Way, flat_rows


class Ascent(TypedDict, total=False):
    """Options of both regularizers that have one default."""

    lower_bound: Any
    upper_bound: Any
    differentiation: Way
    reduction: Reduction
    batch_norm: BatchNorm
    name: str | None


class _WorstCase(GradientRegularizer):
    """A regularizer at the worst point of a ball of the maximum norm, with labels as the target."""

    labels: ClassVar[bool] = True

    def __init__(
        self,
        forward_func: Any,
        radius: Sizes,
        step_size: Sizes,
        step_num: int,
        *,
        lower_bound: Any = float("-inf"),
        upper_bound: Any = float("inf"),
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(forward_func, **options)
        self.radius = check_sizes("radius", radius)
        self.step_size = check_sizes("step_size", step_size)
        self.step_num = count("step_num", step_num)
        self.lower_bound, self.upper_bound = lower_bound, upper_bound

    def _start(self, call: Call) -> tuple[tuple[Ball, ...], Tensors]:
        """Make the ball, and draw a point of it."""
        region = balls(call.inputs, self.radius, "Linf", self.lower_bound, self.upper_bound)
        generator = torch.Generator(call.inputs[0].device).manual_seed(derive(call.seed, 0))
        return region, draw(region, "uniform", generator)


class RobustAttribution(_WorstCase):
    r"""IG-NORM and IG-SUM-NORM: penalise what the loss's worst change is attributed to.

    .. math:: \max_{x' \in B(x, r)} \lVert\mathrm{IG}_\ell(x, x')\rVert_1
        \qquad\text{or}\qquad
        \max_{x' \in B(x, r)} \ell(x') + \beta \lVert\mathrm{IG}_\ell(x, x')\rVert_1

    with integrated gradients of the cross entropy :math:`\ell` along the line from :math:`x` to
    :math:`x'`, which sum to :math:`\ell(x') - \ell(x)`, and the ball of the maximum norm (Chen et
    al. 2019). The first is added to the cross entropy, with weight 1 in the paper; the second takes
    its place. The target is the class labels.

    The maximum is sought by signed gradient ascent from a random point (at the centre the gradients
    that matter vanish), and what it adds is then a constant. Defaults are the paper's for MNIST.
    Each of ``step_num`` steps differentiates ``attack_n_steps`` input gradients.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        objective: ``"ig_norm"`` or ``"ig_sum_norm"``.
        radius: :math:`r`, in units of the inputs; a tuple has one for each input.
        step_size: Length of a step of the ascent, likewise.
        step_num: Steps of the ascent.
        n_steps: Midpoints of the integral that is trained on.
        attack_n_steps: Midpoints of the integral during the ascent.
        weight: :math:`\beta` of IG-SUM-NORM.
        lower_bound: Least valid input, a number or a tensor that broadcasts; a tuple has one for
            each input.
        upper_bound: Largest valid input, likewise.
        smooth, differentiation, reduction, batch_norm, name: As in
            :class:`InputGradientRegularization`.

    Raises:
        ValueError: If a label is none of the classes, or the inputs leave the bounds.

    Example:
        >>> import torch
        >>> from captum_priors.stability import RobustAttribution
        >>> flat = lambda x: torch.zeros(len(x), 2) * x  # a loss that does not move
        >>> RobustAttribution(flat, step_num=2)(torch.randn(3, 2), target=0).item()
        0.0
    """

    def __init__(
        self,
        forward_func: Any,
        objective: Literal["ig_norm", "ig_sum_norm"] = "ig_norm",
        *,
        radius: Sizes = 0.3,
        step_size: Sizes = 0.01,
        step_num: int = 40,
        n_steps: int = 50,
        attack_n_steps: int = 10,
        weight: float = 0.1,
        smooth: float | None = None,
        **ascent: Unpack[Ascent],
    ) -> None:
        super().__init__(forward_func, radius, step_size, step_num, smooth=smooth, **ascent)
        one_of("objective", objective, ("ig_norm", "ig_sum_norm"))
        self.objective = objective
        self.n_steps = count("n_steps", n_steps)
        self.attack_n_steps = count("attack_n_steps", attack_n_steps)
        self.weight = positive("weight", weight)
        # The cross entropy of IG-SUM-NORM comes from an ordinary forward pass.
        self.replayed = self.replayed and objective == "ig_norm"

    def _scores(self, call: Call) -> Tensor:
        def value(ends: Tensors, n_steps: int) -> Tensor:
            size = flat_rows(self._integrated(call, ends, n_steps)).abs().sum(1)
            if self.objective == "ig_norm":
                return size
            return cross_entropies(call, ends) + self.weight * size

        region, start = self._start(call)
        attacked = partial(value, n_steps=self.attack_n_steps)
        worst = climb(region, start, attacked, self.step_size, self.step_num)
        return value(carried(call.inputs, worst), self.n_steps)

    def _integrated(self, call: Call, ends: Tensors, n_steps: int) -> Tensors:
        """Integrated gradients of the loss from the inputs to the ends."""
        pairs = list(zip(call.inputs, ends, strict=True))
        alphas = [(i + 0.5) / n_steps for i in range(n_steps)]
        path = tuple(torch.cat([torch.lerp(x, z, a) for a in alphas]) for x, z in pairs)
        gradients = self._input_gradients(call, path)
        means = [g.unflatten(0, (n_steps, -1)).mean(0) for g in gradients]
        return tuple((z - x) * mean for (x, z), mean in zip(pairs, means, strict=True))


class AttributionAlignment(_WorstCase):
    r"""ART: the gradient of the true class is like the image, that of the runner-up is not.

    .. math:: \log\left(1 + e^{\,d(g_y, x) - d(g_k, x)}\right), \qquad d(g, x) = 1 - \cos(g, x),

    with input gradients of the logits of the true class y and of the highest other class k (Singh
    et al. 2020). It is the mean over :math:`x` and a perturbed :math:`\tilde x`, each compared with
    the farther one of the two gradients :math:`g_y` and the nearer one of the two :math:`g_k`, at
    :math:`x` and at :math:`\tilde x`. The perturbation raises the same loss, on the entries where
    :math:`|g_y|` is largest, by signed ascent from a random point of the ball. The target is the
    class labels. The paper adds it with weight ½ to the cross entropy *at the perturbed inputs*:
    :meth:`perturb` gives such inputs.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        radius: Maximum norm of the perturbation, in units of the inputs; a tuple has one for each
            input.
        step_size: Length of a step of the ascent, likewise.
        step_num: Steps of the ascent.
        top_k: Entries that the ascent's loss looks at, all where there are fewer.
        smooth: Softplus in place of ReLU with this steepness, 50 in the paper; None for ReLU,
            whose gradients the ascent cannot move.
        ascent: The other options of :class:`RobustAttribution`, from ``lower_bound`` on.

    Raises:
        ValueError: If a label is none of the classes, or the inputs leave the bounds.

    Example:
        >>> import torch
        >>> from captum_priors.stability import AttributionAlignment
        >>> model = torch.nn.Linear(3, 2)
        >>> aligned = model.weight[:1].detach()  # an input like its own class's gradient
        >>> art = AttributionAlignment(model, radius=1e-6, step_size=1e-6)
        >>> (art(aligned, target=0) < art(-aligned, target=0)).item()
        True
    """

    def __init__(
        self,
        forward_func: Any,
        *,
        radius: Sizes = 8 / 255,
        step_size: Sizes = 5 / 255,
        step_num: int = 3,
        top_k: int = 1000,
        smooth: float | None = 50.0,
        **ascent: Unpack[Ascent],
    ) -> None:
        super().__init__(forward_func, radius, step_size, step_num, smooth=smooth, **ascent)
        self.top_k = count("top_k", top_k)

    def perturb(
        self, inputs: TensorOrTuple, target: Any, additional_forward_args: Any = None
    ) -> TensorOrTuple:
        """Return the perturbed inputs that the next call on this batch will compare."""
        with self.evaluating(inputs, None, target, additional_forward_args, advance=False) as call:
            worst = self._worst(call)
        return like_inputs(inputs, worst)

    def _scores(self, call: Call) -> Tensor:
        pairs = zip(call.inputs, carried(call.inputs, self._worst(call)), strict=True)
        both = tuple(torch.cat(pair) for pair in pairs)
        anchors = flat_rows(both).unflatten(0, (2, -1))
        own, other = (flat_rows(g).unflatten(0, (2, -1)) for g in self._gradients(call, both))
        terms = []
        for anchor in anchors:
            farther = torch.stack([cosine_distance(g, anchor) for g in own]).amax(0)
            nearer = torch.stack([cosine_distance(g, anchor) for g in other]).amin(0)
            terms.append(F.softplus(farther - nearer))
        return torch.stack(terms).mean(0)

    def _worst(self, call: Call) -> Tensors:
        region, start = self._start(call)
        with torch.no_grad():
            saliency = flat_rows(self._gradients(call, start)[0]).abs()
        top = saliency.topk(min(self.top_k, saliency.shape[1]), dim=1).indices

        def loss(points: Tensors) -> Tensor:
            own, other = (flat_rows(g).gather(1, top) for g in self._gradients(call, points))
            x = flat_rows(points).gather(1, top)
            return F.softplus(cosine_distance(own, x) - cosine_distance(other, x))

        return climb(region, start, loss, self.step_size, self.step_num)

    def _gradients(self, call: Call, points: Tensors) -> tuple[Tensors, ...]:
        """Input gradients of the true class and of the runner-up."""

        def own(points: Tensors) -> Tensor:
            logits, labels = logits_and_labels(call, points)
            return logits.gather(1, labels.unsqueeze(1)).squeeze(1)

        def other(points: Tensors) -> Tensor:
            logits, labels = logits_and_labels(call, points)
            return logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)

        return tuple(self._input_gradients(call, points, field) for field in (own, other))
