"""Attacks on explanations: points of a ball are visited, and the best are kept."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from captum.robust import Perturbation
from torch import Tensor

from captum_priors._captum import as_tuple, forward_args, forward_func_of, like_inputs, progress
from captum_priors._checks import (
    check_floating,
    check_inputs,
    check_target,
    count,
    nonnegative,
    positive,
)
from captum_priors._errors import NotDifferentiableError, one_of, refusal, type_of
from captum_priors._probe import (
    Probe,
    check_explainer,
    check_options,
    default_target,
    outputs_of,
    predictions,
    seed_or_global_state,
)
from captum_priors._types import TensorOrTuple
from captum_priors.adapters import differentiable
from captum_priors.attacks.ball import (
    Norm,
    Sizes,
    Tensors,
    ascend,
    balls,
    check_sizes,
    draw,
    per_example,
    step_sizes,
)
from captum_priors.engine import AttributionPass, derive
from captum_priors.engine._torch import out_of_inference
from captum_priors.engine.random import STREAMS
from captum_priors.penalties.maths import Axes


class BoundedPerturbation(Perturbation, ABC):
    """Each example keeps the best of the points visited that have its prediction.

    A subclass says which points of the ball are visited and how they rank, the clean input among
    them.
    """

    explainer: Any = None
    output_weight = 0.0

    def __init__(
        self,
        forward_func: Any,
        radius: Sizes,
        norm: Norm,
        bounds: tuple[Any, Any],
        keep_prediction: bool,
        seed: int | None,
    ) -> None:
        super().__init__()
        one_of("norm", norm, ("Linf", "L2"))
        if (keep_prediction or self.output_weight) and not callable(forward_func):
            raise refusal(
                TypeError,
                "`forward_func`",
                "the model whose prediction is to be kept",
                type(forward_func).__name__,
                "Pass forward_func=model, or keep_prediction=False and output_weight=0.",
            )
        self.radius, self.norm = check_sizes("radius", radius), norm
        self.forward_func, self.keep_prediction, self.seed = forward_func, keep_prediction, seed
        self.lower_bound, self.upper_bound = bounds
        self.attribute_options: dict[str, Any] = {}

    @abstractmethod
    def _visits(self, batch: "Batch") -> Iterator[Tensors]:
        """Visit points of the ball."""

    @abstractmethod
    def _rank(self, batch: "Batch", points: Tensors) -> Tensor:
        """Rank points, shape ``(batch,)``; nothing is better than infinity."""

    def perturb(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        baselines: Any = None,
        annotation: Any = None,
        show_progress: bool = False,
    ) -> TensorOrTuple:
        """Return perturbed inputs.

        Args:
            inputs: Tensor ``(batch, ...)`` or a tuple of them, within the bounds.
            target: The output whose explanation is attacked, in any form that Captum takes; by
                default the predicted class where there are several outputs.
            additional_forward_args: Further arguments of the model.
            baselines: Baselines of the explainer, where it takes them.
            annotation: Nonzero where the evidence is, which then stays as it is, in the form that
                :mod:`captum_priors.penalties` describes; a tuple has one for each input, or None.
            show_progress: Show a progress bar over the steps.

        Returns:
            Tensors like ``inputs``, detached.

        Raises:
            NotDifferentiableError: If the attributions have no graph to the inputs.
            ValueError: If inputs leave the bounds, or shapes do not match.
        """
        check_inputs(inputs)
        check_floating(as_tuple(inputs))
        check_target(target, len(as_tuple(inputs)[0]), several=False)
        call = {"inputs": inputs, "target": target, "baselines": baselines}
        explaining = AttributionPass(
            self.explainer,
            self.forward_func,
            seed=seed_or_global_state(self.seed),
            streams=STREAMS,
            replayed=True,
            exact=getattr(self.explainer, "differentiation", None) != "finite_difference",
            given=call,
        )
        with explaining, torch.enable_grad():
            call = {**call, "additional_forward_args": additional_forward_args}
            seed = explaining.seeded
            batch = Batch(self, out_of_inference(call), annotation, seed, show_progress)
            best, highest = batch.clean, self._rank(batch, batch.clean)
            for points in self._visits(batch):
                ranks = self._rank(batch, points)
                better = ranks > highest
                if self.keep_prediction and bool(better.any()):
                    now, before = batch.outputs(points), batch.clean_outputs
                    better = better & (predictions(now) == predictions(before))
                best = tuple(
                    torch.where(per_example(better, p), p, b)
                    for p, b in zip(points, best, strict=True)
                )
                highest = torch.where(better, ranks, highest)
                if bool((highest == torch.inf).all()):
                    break
        return like_inputs(inputs, best)


class Batch:
    """One call: the clean batch, and the model and the explainer as functions of points.

    Points are drawn from a stream of their own.
    """

    def __init__(
        self,
        attack: BoundedPerturbation,
        call: dict[str, Any],
        annotation: Any,
        seed: int,
        show_progress: bool,
    ) -> None:
        inputs, self.seed, self.show_progress = call.pop("inputs"), seed, show_progress
        bounds = (attack.lower_bound, attack.upper_bound)
        self.region = balls(as_tuple(inputs), attack.radius, attack.norm, *bounds, annotation)
        self.clean = tuple(ball.centre for ball in self.region)
        self.n = len(self.clean[0])
        self.generator = torch.Generator(self.clean[0].device).manual_seed(seed)
        self._forward_func = attack.forward_func
        self._args = forward_args(call["additional_forward_args"])
        needed = attack.keep_prediction or attack.output_weight
        by_default = call["target"] is None and attack.explainer is not None
        if needed or (by_default and self._forward_func is not None):
            self.clean_outputs = self.outputs(self.clean)
            if by_default:
                call["target"] = default_target(self.clean_outputs)
        if attack.explainer is not None:
            self._probe = Probe(attack.explainer, inputs, attack.attribute_options, **call)
            self.clean_maps = self.maps(self.clean)

    def outputs(self, points: Tensors, *, graph: bool = False) -> Tensor:
        """Return all outputs of the model."""
        return outputs_of(self._forward_func, points, self._args, graph=graph)

    def maps(self, points: Tensors, draws: int = 0, *, graph: bool = False) -> Tensors:
        """Return the attributions; what the explainer draws is the same for the same number."""
        copies = tuple(p.clone() for p in points)  # the explainer may work on them in place
        return self._probe(copies, derive(self.seed, draws), graph=graph)


class AttributionAttack(BoundedPerturbation):
    r"""Base of attacks that move an attribution map while the prediction stays.

    .. math:: \max_{\tilde x}\; J\left(\Phi(\tilde x), \Phi(x)\right) \quad\text{s.t.}\quad
        \lVert \tilde x - x \rVert \le r,\; l \le \tilde x \le u,\;
        \arg\max f(\tilde x) = \arg\max f(x)

    by projected gradient ascent on all examples at once: steps along the sign of the gradient
    (``"Linf"``) or the gradient itself (``"L2"``). The gradient map of a ReLU network is piecewise
    constant and gives no direction, so steps are taken with Softplus in place of ReLU, whose
    steepness grows from the first to the second of ``betas`` (Dombrowski et al. 2019). What
    is returned is, for each example, the best of all points visited that keep the prediction,
    judged with the model as it is; the clean input is among them. The model is held still
    meanwhile, and nothing of it, of the inputs or of any global random stream changes.

    A subclass defines :meth:`objective`, :math:`J`.

    Args:
        explainer: An explainer that :func:`captum_priors.differentiable` takes and whose
            attributions depend on the inputs differentiably.
        radius: :math:`r`, in units of the inputs; a tuple has one for each input. Each
            tensor of an example has a ball of its own, as in :class:`captum.robust.PGD`.
        norm: ``"Linf"`` or ``"L2"``.
        step_num: Gradient steps of each restart.
        step_size: Length of a step, in units of the inputs; a tuple has one for each input. By
            default ``5 * radius / step_num``.
        betas: First and last steepness of Softplus in the steps; None leaves the model as it is.
        lower_bound: :math:`l`, a number or a tensor that broadcasts to the inputs; a tuple has one
            for each input.
        upper_bound: :math:`u`, likewise.
        n_restarts: How often to start; the best of all restarts counts.
        random_start: Start at a uniform draw from the ball, as in :class:`captum.robust.PGD`,
            another for each restart, rather than at the clean input.
        output_weight: Weight of the squared change of the softmax outputs (of the output itself
            where there is one), subtracted from the objective in the steps.
        keep_prediction: Whether the class must stay: the largest of several outputs, or the sign
            of one logit.
        forward_func: The model; by default the explainer's.
        seed: Seed of all draws; by default read off torch's global generator, which does not move:
            reseed it, or pass another seed, for other draws.
        dim: The axes of the attributions that are places; absolute attributions are summed over
            the others (channels). As in :func:`captum_priors.penalties.total_variation`.
        attribute_options: Further keywords of ``explainer.attribute``, the same at every call.

    Raises:
        NotDifferentiableError: If the explainer cannot be differentiated.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_priors.attacks import AttributionAttack
        >>> class FirstFeature(AttributionAttack):
        ...     "Make the first feature matter as little as possible."
        ...     def objective(self, attributions, clean):
        ...         return -attributions[0][:, 0].abs()
        >>> model, x = torch.nn.Linear(3, 2, bias=False), torch.ones(1, 3)
        >>> attack = FirstFeature(InputXGradient(model), radius=0.5, keep_prediction=False)
        >>> round(attack.perturb(x, target=0)[0, 0].item(), 3)
        0.5
    """

    def __init__(
        self,
        explainer: Any,
        *,
        radius: Sizes,
        norm: Norm = "Linf",
        step_num: int = 100,
        step_size: Sizes | None = None,
        betas: tuple[float, float] | None = (10.0, 100.0),
        lower_bound: Any = float("-inf"),
        upper_bound: Any = float("inf"),
        n_restarts: int = 1,
        random_start: bool = True,
        output_weight: float = 0.0,
        keep_prediction: bool = True,
        forward_func: Any = None,
        seed: int | None = None,
        dim: Axes = None,
        **attribute_options: Any,
    ) -> None:
        check_explainer(explainer)
        self.output_weight = nonnegative("output_weight", output_weight)
        model = forward_func_of(explainer) if forward_func is None else forward_func
        super().__init__(model, radius, norm, (lower_bound, upper_bound), keep_prediction, seed)
        count("step_num", step_num)
        count("n_restarts", n_restarts)
        for i, beta in enumerate(betas or ()):
            positive(f"betas[{i}]", beta)
        self.explainer = differentiable(explainer)
        check_options(self.explainer, attribute_options)
        self.step_num, self.n_restarts, self.random_start = step_num, n_restarts, random_start
        self.step_size = None if step_size is None else check_sizes("step_size", step_size)
        self.betas, self.dim, self.attribute_options = betas, dim, attribute_options

    @abstractmethod
    def objective(self, attributions: Tensors, clean: Tensors) -> Tensor:
        """Return what the steps ascend, of attributions and the clean ones, shape ``(batch,)``."""

    def score(self, attributions: Tensors, clean: Tensors) -> Tensor:
        """Return what visited points are ranked by; by default the objective."""
        return self.objective(attributions, clean)

    def steepness(self, step: int) -> float | None:
        """Steepness of Softplus in a step, growing geometrically."""
        if self.betas is None:
            return None
        first, last = self.betas
        return float(first * (last / first) ** (step / max(1, self.step_num - 1)))

    def _visits(self, batch: Batch) -> Iterator[Tensors]:
        sizes = step_sizes(batch.region, self.step_size, self.step_num)
        steps = range(self.n_restarts * self.step_num)
        for i in progress(steps, desc=type(self).__name__, disable=not batch.show_progress):
            if i % self.step_num == 0:
                points = batch.clean
                if self.random_start:
                    points = draw(batch.region, "uniform", batch.generator)
                    yield points
            gradients = self._gradients(batch, points, i)
            if gradients is None:
                return
            points = ascend(batch.region, points, gradients, sizes)
            yield points

    def _rank(self, batch: Batch, points: Tensors) -> Tensor:
        scores: Any = self.score(batch.maps(points), batch.clean_maps)
        if isinstance(scores, Tensor) and tuple(scores.shape) == (batch.n,):
            return scores
        raise refusal(
            ValueError,
            f"score of {type(self).__name__}",
            f"a tensor of shape ({batch.n},)",
            f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type_of(scores),
            "Return one value for each example.",
        )

    def _gradients(self, batch: Batch, points: Tensors, i: int) -> Tensors | None:
        """Differentiate the objective in the i-th step; None if no point changes the maps."""
        points = tuple(p.detach().requires_grad_() for p in points)
        beta = self.steepness(i % self.step_num)
        with AttributionPass(self.explainer, smooth=beta, holds=False, exact=False):
            total = self.objective(batch.maps(points, i + 1, graph=True), batch.clean_maps).sum()
            if self.output_weight:
                now, before = batch.outputs(points, graph=True), batch.clean_outputs
                change = _probabilities(now) - _probabilities(before)
                total = total - self.output_weight * change.square().sum()
            if total.requires_grad:
                found = torch.autograd.grad(total, points, allow_unused=True)
                if any(g is not None for g in found):
                    pairs = zip(found, points, strict=True)
                    return tuple(torch.zeros_like(p) if g is None else g for g, p in pairs)
        elsewhere = batch.maps(draw(batch.region, "surface", batch.generator))
        if any(not torch.equal(a, b) for a, b in zip(elsewhere, batch.clean_maps, strict=True)):
            raise refusal(
                NotDifferentiableError,
                "`explainer`",
                "attributions with a graph to the inputs",
                f"none from {type(self.explainer).__name__}",
                "Look for detach() or torch.no_grad() in its attribute.",
            )
        return None


def _probabilities(outputs: Tensor) -> Tensor:
    """Probabilities where there are several outputs, the output itself where there is one."""
    return outputs.softmax(1) if outputs.dim() > 1 and outputs.shape[1] > 1 else outputs
