"""Scores of an explainer on a model: how fast its maps change, and whether they add up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_priors._captum import as_tuple, forward_args, run_forward
from captum_priors._checks import check_count, check_forward_func, check_inputs, check_target
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._engine._mismatch import names_mismatch
from captum_priors._errors import expected_found
from captum_priors._probe import (
    Probe,
    check_explainer,
    check_options,
    check_outputs,
    seed_from_global_state,
    undisturbed,
)
from captum_priors._types import TensorOrTuple
from captum_priors.metrics._rows import joined, tensors_of


@names_mismatch
@leaves_inference_mode
def local_lipschitz(
    explainer: Any,
    inputs: TensorOrTuple,
    *,
    radius: float,
    n_samples: int = 10,
    target: Any = None,
    additional_forward_args: Any = None,
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
        radius: :math:`r`, in units of the inputs.
        n_samples: Points around each input.
        target: As in ``attribute``.
        additional_forward_args: As in ``attribute``.
        seed: Seed of the draws; by default read off torch's global generator, which does not move.
        attribute_options: Further keywords of ``explainer.attribute``.

    Returns:
        Shape ``(batch,)``.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If an argument is out of range.

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
    check_explainer(explainer)
    check_options(explainer, attribute_options)
    check_inputs(inputs)
    tensors = tuple(t.detach() for t in as_tuple(inputs))
    check_target(target, tensors[0].shape[0])
    check_count("n_samples", n_samples)
    check_count("seed", seed, least=0, optional=True)
    if isinstance(radius, bool) or not isinstance(radius, (int, float)) or not radius > 0:
        raise ValueError(
            expected_found("`radius`", "a positive number", repr(radius), "Pass for example 0.1.")
        )
    seed = seed_from_global_state() if seed is None else seed
    given = {"target": target, "additional_forward_args": additional_forward_args}
    with undisturbed(seed, explainer):
        probe = Probe(explainer, inputs, {**attribute_options, **given})
        noise = torch.Generator().manual_seed(seed)
        here = joined(probe(tensors, seed))
        largest = torch.zeros(tensors[0].shape[0], dtype=here.dtype, device=here.device)
        for _ in range(n_samples):
            points = tuple(t + _uniform(t, radius, noise) for t in tensors)
            moved = (joined(probe(points, seed)) - here).norm(dim=1)
            # The step that was taken, after rounding.
            step = joined(tuple(p - t for p, t in zip(points, tensors, strict=True))).norm(dim=1)
            largest = torch.maximum(largest, moved / step.clamp_min(torch.finfo(step.dtype).tiny))
    return largest


def _uniform(like: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    draw = 2 * torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu") - 1
    return radius * draw.to(like)


@names_mismatch
@leaves_inference_mode
@torch.no_grad()
def completeness_gap(
    forward_func: Any,
    inputs: TensorOrTuple,
    attributions: TensorOrTuple,
    baselines: Any = None,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    distribution: bool = False,
) -> Tensor:
    r"""How far attributions are from adding up to the change of the output.

    .. math:: \left| \sum_i \phi_i - (f(x) - f(x')) \right|

    Args:
        forward_func: The model.
        inputs: The explained inputs.
        attributions: Their attributions, ``(batch, ...)`` or a tuple of them.
        baselines: :math:`x'`: a number, one row, one for each example, or a tuple of these; zero by
            default.
        target: The explained output.
        additional_forward_args: Further arguments of the model.
        distribution: Whether baselines are rows of a distribution to average :math:`f(x')` over,
            as :class:`captum_priors.ExpectedGradients` takes them.

    Returns:
        Shape ``(batch,)``, at least 0, in units of the output.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If shapes do not match.

    Example:
        >>> import torch
        >>> from captum.attr import IntegratedGradients
        >>> from captum_priors import differentiable
        >>> from captum_priors.metrics import completeness_gap
        >>> model, x = torch.nn.Linear(3, 1), torch.rand(4, 3)
        >>> attributions = differentiable(IntegratedGradients(model)).attribute(x)
        >>> bool((completeness_gap(model, x, attributions) < 1e-5).all())
        True
    """
    check_forward_func(forward_func)
    check_inputs(inputs)
    tensors = as_tuple(inputs)
    n = tensors[0].shape[0]
    check_target(target, n)
    args = forward_args(additional_forward_args)
    each = tensors_of(attributions)
    if each[0].shape[0] != n:
        raise ValueError(
            expected_found(
                "`attributions`",
                f"those of the {n} examples",
                f"{each[0].shape[0]} rows",
                "Pass what explainer.attribute(inputs, ...) returned for these inputs.",
            )
        )
    rows = baselines if isinstance(baselines, tuple) else (baselines,) * len(tensors)
    with undisturbed(0, forward_func):
        here = _selected(forward_func, tensors, target, args, n)
        if not distribution:
            there = _selected(forward_func, _one_each(rows, tensors), target, args, n)
        else:
            there = torch.zeros_like(here)
            table = _table(rows, tensors)
            for row in range(table[0].shape[0]):
                points = tuple(b[row].expand_as(t) for b, t in zip(table, tensors, strict=True))
                there += _selected(forward_func, points, target, args, n) / table[0].shape[0]
    return (joined(each).sum(1) - (here - there)).abs()


def _selected(
    forward_func: Any, points: tuple[Tensor, ...], target: Any, args: tuple[Any, ...], n: int
) -> Tensor:
    outputs = check_outputs(run_forward(forward_func, points, target, args), n)
    if outputs.numel() != n:
        raise ValueError(
            expected_found(
                "`target`",
                "it to select one output for each example",
                f"outputs of shape {tuple(outputs.shape)}",
                "Pass target=... as in attribute.",
            )
        )
    return outputs.reshape(n)


def _one_each(rows: Sequence[Any], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    try:
        return tuple(
            torch.as_tensor(0 if row is None else row, dtype=t.dtype, device=t.device).expand_as(t)
            for row, t in zip(rows, tensors, strict=True)
        )
    except (RuntimeError, ValueError) as error:
        raise _misfit(rows, tensors) from error


def _table(rows: Sequence[Any], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    table = tuple(row for row in rows if isinstance(row, Tensor) and row.dim() > 0)
    fits = len(table) == len(tensors) and all(
        b.shape[1:] == t.shape[1:] and b.shape[0] == table[0].shape[0] > 0
        for b, t in zip(table, tensors, strict=True)
    )
    if not fits:
        raise _misfit(rows, tensors)
    return table


def _misfit(rows: Sequence[Any], tensors: tuple[Tensor, ...]) -> ValueError:
    found = [tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__ for r in rows]
    return ValueError(
        expected_found(
            "`baselines`",
            f"rows that fit inputs of shapes {[tuple(t.shape) for t in tensors]}",
            str(found),
            "Pass one row, one for each example, or distribution=True with rows to average over.",
        )
    )
