"""The attacks: what each moves a map towards or away from, and noise to compare them with."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import forward_func_of
from captum_priors._checks import count
from captum_priors._errors import one_of
from captum_priors._types import Distance, TensorOrTuple
from captum_priors.attacks.attack import AttributionAttack, Batch, BoundedPerturbation
from captum_priors.attacks.ball import Distribution, Norm, Sizes, Tensors, broadcast, draw, for_each
from captum_priors.penalties.maths import importance, importance_rows


class DistanceAttack(AttributionAttack):
    r"""Move the map as far from the clean one as possible.

    .. math:: J = d\left(\Phi(\tilde x), \Phi(x)\right)

    The inner maximum of adversarial stability training: with the same distance in
    :class:`captum_priors.StabilityPrior` this is the robust attribution of Ivankay et al. 2021
    (FAR), there with one minus the correlation.

    Args:
        explainer: As in :class:`AttributionAttack`, like all options.
        distance: One of :mod:`captum_priors.distances`, or ``distance(attributions, other)`` of
            shape ``(batch,)``.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_priors.attacks import DistanceAttack
        >>> from captum_priors.distances import mse
        >>> model, x = torch.nn.Linear(3, 1), torch.zeros(2, 3)
        >>> attack = DistanceAttack(InputXGradient(model), mse, radius=0.5, keep_prediction=False)
        >>> torch.allclose(attack.perturb(x).abs(), torch.full((2, 3), 0.5))
        True
    """

    def __init__(self, explainer: Any, distance: Distance, **options: Any) -> None:
        super().__init__(explainer, **options)
        self.distance = distance

    def objective(self, attributions: Tensors, clean: Tensors) -> Tensor:
        """Distance to the clean map."""
        if len(attributions) == 1:
            return self.distance(attributions[0], clean[0])
        return self.distance(attributions, clean)


class TopKAttack(AttributionAttack):
    r"""Make the ``k`` most important features of the clean map unimportant.

    .. math:: J = -\sum_{i \in \mathrm{top}_k(x)} |\phi_i(\tilde x)| \Big/ \sum_i |\phi_i(\tilde x)|

    (Ghorbani, Abid, Zou 2019, top-k attack.) Points are ranked by how many of the ``k`` features
    stay among the top ``k``, which is the share that
    :func:`captum_priors.metrics.top_k_intersection` reports, and only then by :math:`J`.

    Args:
        explainer: As in :class:`AttributionAttack`, like all options.
        k: Number of features, fewer than there are.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors.attacks import TopKAttack
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(),
        ...                             torch.nn.Linear(9, 2))
        >>> x = torch.rand(4, 6)
        >>> attacked = TopKAttack(Saliency(model), 2, radius=0.1, step_num=5).perturb(x)
        >>> torch.equal(model(attacked).argmax(1), model(x).argmax(1))
        True
        >>> bool(((attacked - x).abs() <= 0.1 + 1e-6).all())
        True
    """

    def __init__(self, explainer: Any, k: int, **options: Any) -> None:
        super().__init__(explainer, **options)
        self.k = count("k", k)

    def objective(self, attributions: Tensors, clean: Tensors) -> Tensor:
        """Minus the share of the clean map's top features."""
        rows = importance_rows(attributions, self.dim)
        total = rows.sum(1)
        return -(rows * self._top(clean)).sum(1) / torch.where(total > 0, total, 1)

    def score(self, attributions: Tensors, clean: Tensors) -> Tensor:
        """Minus the number of top features that stay, and less than one for their share."""
        stay = (self._top(attributions) * self._top(clean)).sum(1)
        return -stay + 0.5 * self.objective(attributions, clean)

    def _top(self, maps: Tensors) -> Tensor:
        rows = importance_rows(maps, self.dim)
        count("k", self.k, most=rows.shape[1] - 1)
        return torch.zeros_like(rows).scatter(1, rows.topk(self.k, dim=1).indices, 1.0)


class MassCenterAttack(AttributionAttack):
    r"""Move the centre of mass of the map as far as possible.

    .. math:: J = \lVert C(\tilde x) - C(x) \rVert^2, \qquad
        C(x) = \sum_p p\, |\phi_p(x)| \Big/ \sum_p |\phi_p(x)|

    with positions :math:`p` counted in pixels (Ghorbani, Abid, Zou 2019, mass-centre attack, whose
    norm is not squared: the square has a gradient where the centre has not moved yet). Tensors of
    a tuple count together.

    Args:
        explainer: As in :class:`AttributionAttack`, like all options.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_priors.attacks import MassCenterAttack
        >>> model, x = torch.nn.Linear(5, 1), torch.ones(1, 5)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> attack = MassCenterAttack(InputXGradient(model), radius=0.5, step_num=20, seed=0)
        >>> position = torch.arange(5.0)
        >>> moved = attack.perturb(x)  # the centre of five equal attributions is 2
        >>> abs((position * moved).sum() / moved.sum() - 2).item() > 0.5
        True
    """

    def objective(self, attributions: Tensors, clean: Tensors) -> Tensor:
        """Squared distance of the centres."""
        pairs = zip(attributions, clean, strict=True)
        moves = [(self._centre(a) - self._centre(c)).square().sum(1) for a, c in pairs]
        return torch.stack(moves).sum(0)

    def _centre(self, attributions: Tensor) -> Tensor:
        """Centre of mass, shape ``(batch, spatial dimensions)``."""
        mass = importance(attributions, self.dim)
        positions = torch.ones_like(mass[0]).nonzero()
        total = mass.flatten(1).sum(1, keepdim=True)
        return (mass.flatten(1).unsqueeze(2) * positions).sum(1) / torch.where(total > 0, total, 1)


class ManipulationAttack(AttributionAttack):
    r"""Make the map look like a given other one, while the output stays.

    .. math:: J = -\tfrac1p \sum_i \left(h_i(\tilde x) - h_i^t\right)^2
        - \gamma \lVert \mathrm{softmax} f(\tilde x) - \mathrm{softmax} f(x) \rVert^2,
        \qquad h = p\, |\phi| \Big/ \sum_i |\phi_i|

    (Dombrowski et al. 2019, whose maps sum to one rather than average one. Their weights
    1e11 and 1e6 on a VGG16 with 224 × 224 pixels and 1000 classes amount to :math:`\gamma` = 25,
    the default of ``output_weight``.) They let a small step keep the change invisible; here a ball
    does.

    Args:
        explainer: As in :class:`AttributionAttack`, like all options.
        target_map: What maps are to look like, in the shape of the attributions or of one example
            of them, or a tuple of these. By default each example imitates the clean map of the
            next one in the batch, as in the paper; a single example its own, reversed.
        output_weight: :math:`\gamma`.

    Raises:
        ValueError: If the target map does not fit the attributions.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_priors.attacks import ManipulationAttack
        >>> model, x = torch.nn.Linear(3, 1), torch.ones(2, 3)
        >>> wanted = torch.tensor([1.0, 2.0, 3.0])
        >>> attack = ManipulationAttack(
        ...     InputXGradient(model), wanted / model.weight[0].abs().detach(), radius=0.5)
        >>> attack.perturb(x).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        explainer: Any,
        target_map: TensorOrTuple | None = None,
        *,
        output_weight: float = 25.0,
        **options: Any,
    ) -> None:
        super().__init__(explainer, output_weight=output_weight, **options)
        self.target_map = target_map

    def objective(self, attributions: Tensors, clean: Tensors) -> Tensor:
        """Minus the mean squared difference to the target maps."""
        return -(self._normal(attributions) - self._wanted(clean)).square().mean(1)

    def _wanted(self, clean: Tensors) -> Tensor:
        """Target maps in their normal form, shape ``(batch, places)``."""
        if self.target_map is None:
            own = self._normal(clean)
            return own.roll(-1, 0) if own.shape[0] > 1 else own.flip(1)
        wanted = for_each("target_map", self.target_map, len(clean))
        return self._normal(
            tuple(broadcast("`target_map`", w, c) for w, c in zip(wanted, clean, strict=True))
        )

    def _normal(self, maps: Tensors) -> Tensor:
        rows = importance_rows(maps, self.dim)
        mean = rows.mean(1, keepdim=True)
        return rows / torch.where(mean > 0, mean, 1)


class RandomAttack(BoundedPerturbation):
    r"""A random point of the ball: the control that an attack at the same radius is compared with.

    ``"surface"`` draws :math:`x \pm r` in every entry (``"Linf"``; the random sign perturbation of
    Ghorbani, Abid, Zou 2019) or a direction of length :math:`r` (``"L2"``), as far
    from :math:`x` as an attack can go; ``"uniform"`` draws from the whole ball. A draw that
    changes the prediction is replaced by another, ``n_tries`` times in all, and then by the clean
    input.

    Args:
        explainer: An explainer, for its model alone, so that this is made as attacks are; or the
            model.
        radius: As in :class:`AttributionAttack`, like all that is not named here.
        distribution: ``"surface"`` or ``"uniform"``.
        n_tries: Draws for an example whose prediction changes.
        keep_prediction: Whether the prediction must stay. Without, one draw is final and no model
            is run: noise for :class:`captum_priors.StabilityPrior`.

    Example:
        >>> import torch
        >>> from captum_priors.attacks import RandomAttack
        >>> x = torch.zeros(2, 3)
        >>> noise = RandomAttack(torch.nn.Linear(3, 1), radius=0.1, keep_prediction=False)
        >>> torch.equal(noise.perturb(x).abs(), torch.full((2, 3), 0.1))
        True
    """

    def __init__(
        self,
        explainer: Any = None,
        *,
        radius: Sizes,
        norm: Norm = "Linf",
        distribution: Distribution = "surface",
        n_tries: int = 10,
        lower_bound: Any = float("-inf"),
        upper_bound: Any = float("inf"),
        keep_prediction: bool = True,
        forward_func: Any = None,
        seed: int | None = None,
    ) -> None:
        if forward_func is None and explainer is not None:
            explains = callable(getattr(explainer, "attribute", None))
            forward_func = forward_func_of(explainer) if explains else explainer
        bounds = (lower_bound, upper_bound)
        super().__init__(forward_func, radius, norm, bounds, keep_prediction, seed)
        one_of("distribution", distribution, ("surface", "uniform"))
        self.distribution, self.n_tries = distribution, count("n_tries", n_tries)

    def _visits(self, batch: Batch) -> Iterator[Tensors]:
        for _ in range(self.n_tries):
            yield draw(batch.region, self.distribution, batch.generator)

    def _rank(self, batch: Batch, points: Tensors) -> Tensor:
        """Every draw is as good as it gets, so the first that keeps the prediction stays."""
        rank = 0.0 if points is batch.clean else torch.inf
        return torch.full((batch.n,), rank, device=batch.clean[0].device)
