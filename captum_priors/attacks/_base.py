"""What all attacks on attributions share: ascent in a ball, keeping the prediction."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from captum.robust import Perturbation
from torch import Tensor

from captum_priors._captum import (
    as_tuple,
    forward_args,
    like_inputs,
    progress,
    run_forward,
)
from captum_priors._checks import check_count, check_inputs, check_target
from captum_priors._engine._first_order import check_points
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._engine._mismatch import names_mismatch
from captum_priors._engine._random import mixed
from captum_priors._engine._smooth import check_beta, relu_as_softplus
from captum_priors._engine._surrogate import pull
from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors._importance import check_spatial_dims
from captum_priors._probe import (
    Probe,
    check_explainer,
    check_options,
    check_outputs,
    default_target,
    forward_func_of,
    outputs_of,
    predictions,
    seed_from_global_state,
    undisturbed,
)
from captum_priors._types import TensorOrTuple
from captum_priors.adapters import differentiable
from captum_priors.attacks._ball import Ball, Norm, balls, check_ball

Maps = tuple[Tensor, ...]
SamePrediction = Callable[[Tensor, Tensor], Tensor]


class BoundedPerturbation(Perturbation, ABC):
    """A perturbation within a radius and a valid range that may have to keep the prediction."""

    is_control = False

    def __init__(
        self,
        forward_func: Any,
        *,
        radius: float | tuple[float, ...],
        norm: Norm,
        lower_bound: Any,
        upper_bound: Any,
        keep_prediction: bool | SamePrediction,
        seed: int | None,
    ) -> None:
        super().__init__()
        check_ball(radius, norm)
        if not isinstance(keep_prediction, bool) and not callable(keep_prediction):
            raise TypeError(
                expected_found(
                    "`keep_prediction`",
                    "True, False or a function (outputs, clean_outputs) -> (batch,)",
                    type(keep_prediction).__name__,
                    "Pass True to keep the class.",
                )
            )
        if keep_prediction and not callable(forward_func):
            raise TypeError(
                expected_found(
                    "`forward_func`",
                    "the model whose prediction is to be kept",
                    type(forward_func).__name__,
                    "Pass forward_func=model, or keep_prediction=False.",
                )
            )
        check_count("seed", seed, least=0, optional=True)
        self.forward_func = forward_func
        self.radius, self.norm = radius, norm
        self.lower_bound, self.upper_bound = lower_bound, upper_bound
        self.keep_prediction, self.seed = keep_prediction, seed

    def _checked(self, inputs: Any, target: Any) -> tuple[Ball, ...]:
        check_inputs(inputs)
        tensors = as_tuple(inputs)
        check_points(tensors)
        check_target(target, tensors[0].shape[0])
        return balls(tensors, self.radius, self.norm, self.lower_bound, self.upper_bound)

    @contextmanager
    def _undisturbed(self, *holders: Any) -> Iterator[int]:
        seed = seed_from_global_state() if self.seed is None else self.seed
        with undisturbed(seed, self.forward_func, *holders):
            yield seed

    def _outputs(self, points: Maps, additional_forward_args: Any) -> Tensor:
        found = outputs_of(self.forward_func, points, additional_forward_args)
        return check_outputs(found, points[0].shape[0])

    def _keeps(self, outputs: Tensor, clean_outputs: Tensor) -> Tensor:
        """Which examples have the prediction that they had, shape ``(batch,)``."""
        if callable(self.keep_prediction):
            same = self.keep_prediction(outputs, clean_outputs)
            if not isinstance(same, Tensor) or same.shape[:1] != outputs.shape[:1]:
                found = tuple(same.shape) if isinstance(same, Tensor) else type(same).__name__
                raise ValueError(
                    expected_found(
                        "`keep_prediction`",
                        f"truth values of shape ({outputs.shape[0]},)",
                        str(found),
                        "Return one for each example.",
                    )
                )
        else:
            same = predictions(outputs) == predictions(clean_outputs)
        return same.reshape(same.shape[0], -1).all(1)


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
    meanwhile, and nothing of it or of any global random stream changes.

    A subclass defines :meth:`objective`, :math:`J`.

    Args:
        explainer: An explainer that :func:`captum_priors.differentiable` takes and whose
            attributions depend on the inputs differentiably.
        radius: :math:`r`, in units of the inputs; a tuple has one for each input. Each
            tensor of an example has a ball of its own, as in :class:`captum.robust.PGD`.
        norm: ``"Linf"`` or ``"L2"``.
        step_num: Gradient steps of each restart.
        step_size: Length of a step relative to the radius; by default ``5 / step_num``.
        betas: First and last steepness of Softplus in the steps; None leaves the model as it is.
        lower_bound: :math:`l`, a number or a tensor that broadcasts to the inputs; a tuple has one
            for each input.
        upper_bound: :math:`u`, likewise.
        n_restarts: How often to start; the best of all restarts counts.
        random_start: Start at a uniform draw from the ball, as in :class:`captum.robust.PGD`,
            rather than at the clean input.
        output_weight: Weight of the squared change of the softmax outputs (of the output itself
            where there is one), subtracted from the objective in the steps.
        keep_prediction: Whether the class must stay: the largest of several outputs, or the sign
            of one logit. Or a function ``(outputs, clean_outputs)`` that says so for each example.
        forward_func: The model; by default the explainer's.
        seed: Seed of all draws; by default read off torch's global generator, which does not move:
            reseed it, or pass another seed, for other draws.
        spatial_dims: How many of the last dimensions of the attributions are spatial. Absolute
            attributions are summed over the others (channels); by default over dimension 1 from
            four dimensions on.
        attribute_options: Further keywords of ``explainer.attribute``, the same at every call.

    Raises:
        NotDifferentiableError: If the explainer cannot be differentiated.
        TypeError: If an argument has another type.
        ValueError: If an argument is out of range.

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
        radius: float | tuple[float, ...],
        norm: Norm = "Linf",
        step_num: int = 100,
        step_size: float | None = None,
        betas: tuple[float, float] | None = (10.0, 100.0),
        lower_bound: Any = float("-inf"),
        upper_bound: Any = float("inf"),
        n_restarts: int = 1,
        random_start: bool = True,
        output_weight: float = 0.0,
        keep_prediction: bool | SamePrediction = True,
        forward_func: Any = None,
        seed: int | None = None,
        spatial_dims: int | None = None,
        **attribute_options: Any,
    ) -> None:
        check_explainer(explainer)
        super().__init__(
            forward_func_of(explainer) if forward_func is None else forward_func,
            radius=radius,
            norm=norm,
            lower_bound=lower_bound,
            upper_bound=upper_bound,
            keep_prediction=keep_prediction,
            seed=seed,
        )
        check_count("step_num", step_num)
        check_count("n_restarts", n_restarts)
        _check_number("step_size", 1 if step_size is None else step_size, above=True)
        _check_number("output_weight", output_weight, above=False)
        check_spatial_dims(spatial_dims)
        if output_weight and not callable(self.forward_func):
            raise TypeError(
                expected_found(
                    "`forward_func`",
                    "the model whose outputs `output_weight` holds in place",
                    type(self.forward_func).__name__,
                    "Pass forward_func=model, or output_weight=0.",
                )
            )
        self.explainer = differentiable(explainer)
        check_options(self.explainer, attribute_options)
        self.step_num, self.n_restarts, self.random_start = step_num, n_restarts, random_start
        self.step_size = 5 / step_num if step_size is None else float(step_size)
        self.betas = None if betas is None else _checked_betas(betas)
        self.output_weight, self.spatial_dims = float(output_weight), spatial_dims
        self.attribute_options = attribute_options

    @abstractmethod
    def objective(self, attributions: Maps, clean: Any) -> Tensor:
        """Return what the steps ascend, shape ``(batch,)``, differentiable.

        ``clean`` is what :meth:`prepare` returns.
        """

    def prepare(self, attributions: Maps) -> Any:
        """Return what is compared with, from the clean attributions; by default these."""
        return attributions

    def score(self, attributions: Maps, clean: Any) -> Tensor:
        """Return what visited points are ranked by; by default the objective."""
        return self.objective(attributions, clean)

    @names_mismatch
    @leaves_inference_mode
    def perturb(
        self,
        inputs: TensorOrTuple,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        baselines: Any = None,
        show_progress: bool = False,
    ) -> TensorOrTuple:
        """Return attacked inputs.

        Args:
            inputs: Tensor ``(batch, ...)`` or a tuple of them, within the bounds.
            target: The output whose explanation is attacked, in any form that Captum takes; by
                default the predicted class where there are several outputs.
            additional_forward_args: Further arguments of the model.
            baselines: Baselines of the explainer, where it takes them.
            show_progress: Show a progress bar over the steps.

        Returns:
            Tensors like ``inputs``, detached.

        Raises:
            NotDifferentiableError: If the attributions have no graph to the inputs.
            TypeError: If an argument has another type.
            ValueError: If inputs leave the bounds, or shapes do not match.
        """
        region = self._checked(inputs, target)
        with self._undisturbed(self.explainer) as seed, torch.enable_grad():
            search = _Search(self, inputs, region, target, additional_forward_args, baselines, seed)
            steps = self.n_restarts * self.step_num
            with progress(desc=type(self).__name__, total=steps, disable=not show_progress) as bar:
                found = search.run(lambda: bar.update(1))
        return like_inputs(inputs, found)

    def steepness(self, step: int) -> float | None:
        """Steepness of Softplus in a step, growing geometrically."""
        if self.betas is None:
            return None
        first, last = self.betas
        return float(first * (last / first) ** (step / max(1, self.step_num - 1)))


class _Search:
    """One call of an attack: the clean batch, and the best points found so far."""

    def __init__(
        self,
        attack: AttributionAttack,
        inputs: TensorOrTuple,
        region: tuple[Ball, ...],
        target: Any,
        args: Any,
        baselines: Any,
        seed: int,
    ) -> None:
        self.attack, self.region, self.args, self.seed = attack, region, args, seed
        self.best = tuple(ball.centre for ball in region)
        self.needs_outputs = bool(attack.keep_prediction) or attack.output_weight > 0
        if attack.forward_func is not None and (self.needs_outputs or target is None):
            self.clean_outputs = attack._outputs(self.best, args)
            target = default_target(self.clean_outputs, target)
        given = {"target": target, "additional_forward_args": args}
        if baselines is not None:
            given["baselines"] = baselines
        self.probe = Probe(attack.explainer, inputs, {**attack.attribute_options, **given})
        self.clean_maps = self.probe(self.best, seed)
        self.clean = attack.prepare(self.clean_maps)
        self.best_score = self._checked(attack.score(self.clean_maps, self.clean)).detach()

    def run(self, tick: Callable[[], object]) -> Maps:
        attack = self.attack
        for restart in range(attack.n_restarts):
            points = tuple(ball.centre for ball in self.region)
            if attack.random_start:
                points = tuple(ball.draw("uniform") for ball in self.region)
            self._consider(points)
            for step in range(attack.step_num):
                draws = mixed(self.seed, restart * attack.step_num + step)
                gradients = self._gradients(points, attack.steepness(step), draws)
                if gradients is None:
                    return self.best
                points = tuple(
                    ball.ascend(p, g, attack.step_size * ball.radius)
                    for ball, p, g in zip(self.region, points, gradients, strict=True)
                )
                self._consider(points)
                tick()
        return self.best

    def _gradients(self, points: Maps, beta: float | None, draws: int) -> Maps | None:
        """Differentiate the objective; None if nothing can change the attributions."""
        points = tuple(p.detach().requires_grad_() for p in points)
        with relu_as_softplus(beta) if beta is not None else _nothing():
            attributions = self.probe(points, draws, graph=True)
            objective = self._checked(self.attack.objective(attributions, self.clean))
            if self.attack.output_weight:
                objective = objective - self.attack.output_weight * self._output_change(points)
            total = objective.sum()
            found = pull([total], points, [True] * len(points), [torch.ones_like(total)])
        if all(g is None for g in found):
            self._insist_on_constant_maps()
            return None
        return tuple(
            torch.zeros_like(p) if g is None else g for p, g in zip(points, found, strict=True)
        )

    def _insist_on_constant_maps(self) -> None:
        """Accept attributions without a graph only where they are the same everywhere."""
        elsewhere = self.probe(tuple(ball.draw("surface") for ball in self.region), self.seed)
        if any(not torch.equal(a, b) for a, b in zip(elsewhere, self.clean_maps, strict=True)):
            raise NotDifferentiableError(
                expected_found(
                    "`explainer`",
                    "attributions with a graph to the inputs",
                    f"none from {type(self.attack.explainer).__name__}",
                    "Look for detach() or torch.no_grad() in its attribute.",
                )
            )

    def _consider(self, points: Maps) -> None:
        """Take the points that score higher and keep the prediction."""
        attack = self.attack
        points = tuple(p.detach() for p in points)
        scores = self._checked(attack.score(self.probe(points, self.seed), self.clean)).detach()
        better = scores > self.best_score
        if attack.keep_prediction and bool(better.any()):
            outputs = attack._outputs(points, self.args)
            better = better & attack._keeps(outputs, self.clean_outputs)
        self.best = tuple(
            torch.where(better.reshape(-1, *[1] * (p.dim() - 1)), p, b)
            for p, b in zip(points, self.best, strict=True)
        )
        self.best_score = torch.where(better, scores, self.best_score)

    def _output_change(self, points: Maps) -> Tensor:
        outputs = run_forward(self.attack.forward_func, points, None, forward_args(self.args))
        before, after = self.clean_outputs, outputs
        if outputs.dim() > 1 and outputs.shape[1] > 1:
            before, after = before.softmax(1), after.softmax(1)
        return (after - before).square().reshape(after.shape[0], -1).sum(1)

    def _checked(self, scores: Any) -> Tensor:
        n = self.best[0].shape[0]
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (n,):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                expected_found(
                    f"objective of {type(self.attack).__name__}",
                    f"a tensor of shape ({n},)",
                    str(found),
                    "Return one number for each example.",
                )
            )
        return scores


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _check_number(name: str, value: Any, *, above: bool) -> None:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not 0 <= value < torch.inf or (above and value == 0):
        kind = "a positive finite number" if above else "a finite number of at least 0"
        raise ValueError(expected_found(f"`{name}`", kind, repr(value), "Check it."))


def _checked_betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(
            expected_found(
                "`betas`",
                "a pair: the first and the last steepness of Softplus",
                repr(betas),
                "Pass (10, 100), or None for a network without ReLU.",
            )
        )
    return check_beta("betas[0]", betas[0]), check_beta("betas[1]", betas[1])
