"""Scores of an explainer on a model."""

from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._checks import check_inputs, check_target, count
from captum_priors._probe import Probe, seed_or_global_state
from captum_priors._types import TensorOrTuple
from captum_priors.attacks.ball import Sizes, balls, check_sizes, draw
from captum_priors.engine import AttributionPass, derive
from captum_priors.engine._torch import out_of_inference
from captum_priors.engine.random import STREAMS
from captum_priors.penalties.maths import joined, tensors_of


def local_lipschitz(
    explainer: Any,
    inputs: TensorOrTuple,
    *,
    radius: Sizes,
    n_samples: int = 10,
    target: Any = None,
    seed: int | None = None,
    **attribute_options: Any,
) -> Tensor:
    r"""Estimate how fast attributions change around each input.

    .. math:: \max_{k}\; \frac{\lVert \Phi(x) - \Phi(x + \delta_k) \rVert_2}
        {\lVert \delta_k \rVert_2}, \qquad \delta_k \sim U[-r, r]^p

    (Alvarez-Melis, Jaakkola 2018, over random points.) All points use the same draws of
    the explainer, and the model is held still. :func:`captum.metrics.sensitivity_max` divides by
    the size of the map instead.

    Args:
        explainer: An object with Captum's ``attribute``.
        inputs: Tensor ``(batch, ...)`` or a tuple of them.
        radius: :math:`r`, in units of the inputs; a tuple has one for each input.
        n_samples: Points around each input.
        target: As in ``attribute``.
        seed: Seed of the draws; by default read off torch's global generator, which does not move.
        attribute_options: Further keywords of ``explainer.attribute``.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> import torch
        >>> from captum.attr import InputXGradient
        >>> from captum_priors import differentiable
        >>> from captum_priors.metrics import local_lipschitz
        >>> model = torch.nn.Linear(3, 1)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> explainer = differentiable(InputXGradient(model))
        >>> local_lipschitz(explainer, torch.zeros(2, 3), radius=0.1).tolist()
        [2.0, 2.0]
    """
    n = check_inputs(inputs)
    check_target(target, n, several=False)
    count("n_samples", n_samples)
    seed = seed_or_global_state(seed)
    given = {"inputs": inputs, "target": target, **attribute_options}
    with held_still(explainer, seed=seed, given=given):
        target, options = out_of_inference((target, attribute_options))
        tensors = tuple(t.detach() for t in out_of_inference(as_tuple(inputs)))
        probe = Probe(explainer, inputs, options, target=target)
        region = balls(tensors, check_sizes("radius", radius))
        noise = torch.Generator(tensors[0].device).manual_seed(derive(seed, 1))
        here = joined(tensors_of(probe(tensors, seed)))
        largest = torch.zeros(n, dtype=here.dtype, device=here.device)
        for _ in range(n_samples):
            points = draw(region, "uniform", noise)
            moved = (joined(tensors_of(probe(points, seed))) - here).norm(dim=1)
            # The step that was taken, after rounding.
            step = joined(tuple(p - t for p, t in zip(points, tensors, strict=True))).norm(dim=1)
            largest = torch.maximum(largest, moved / step.clamp_min(torch.finfo(step.dtype).tiny))
    return largest


def held_still(*explained: Any, seed: int, given: dict[str, Any]) -> AttributionPass:
    """Return a pass whose global streams are its own, for maps that nothing is trained on."""
    return AttributionPass(*explained, seed=seed, streams=STREAMS, replayed=True, given=given)
