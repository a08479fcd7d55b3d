"""The certificate: is the gradient of an attribution the derivative of its value?"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor

from captum_priors._captum import as_tuple
from captum_priors._checks import check_tensors
from captum_priors._errors import NotDifferentiableError, refusal
from captum_priors._probe import check_explainer, check_options
from captum_priors.engine import modules_of, run_modules
from captum_priors.engine.random import STREAMS, GlobalState, seed_global

__all__ = ["Certificate", "check_differentiable"]


@dataclass(frozen=True)
class Certificate:
    """What :func:`check_differentiable` measured.

    Example:
        >>> from captum_priors.testing import Certificate
        >>> Certificate(error=3e-10, errors={"weight": 3e-10}, tolerance=1e-6).passed
        True
    """

    error: float
    errors: dict[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the largest error is within the tolerance."""
        return self.error <= self.tolerance


def check_differentiable(
    explainer: Any,
    inputs: Any,
    *,
    parameters: Iterable[tuple[str, Tensor]] | None = None,
    tolerance: float = 1e-6,
    step: float = 1e-6,
    seed: int = 0,
    raise_exception: bool = True,
    **attribute_options: Any,
) -> Certificate:
    r"""Compare the gradient of an explainer's attributions with central differences.

    For random directions :math:`u` and weights :math:`w`, and each parameter tensor :math:`\theta`,

    .. math:: \langle u, \nabla_\theta \langle w, \Phi(\theta)\rangle\rangle \approx
        \frac{\langle w, \Phi(\theta + h u)\rangle - \langle w, \Phi(\theta - h u)\rangle}{2h},

    and likewise for inputs that require gradients. That a result has a ``grad_fn`` proves nothing:
    graphs that miss a part of the computation are common, and their gradients are wrong by half.
    Explainers that draw random numbers from the global generators are given the same ones at each
    evaluation. Nothing is left changed.

    Args:
        explainer: Any object with Captum's ``attribute``.
        inputs: A batch in float64.
        parameters: Named tensors to check; by default every parameter that requires a gradient of
            every module that the explainer refers to, reached by the graph or not.
        tolerance: Largest accepted difference, relative to the largest derivative of any tensor.
        step: :math:`h`, relative to the size of the tensor's entries.
        seed: Seed of the directions and of the explainer's own draws.
        raise_exception: Raise when the certificate fails.
        attribute_options: Passed to ``attribute``.

    Returns:
        The errors, over all and for each tensor.

    Raises:
        NotDifferentiableError: If the error exceeds the tolerance, or there is no graph at all.
        TypeError: If the inputs or parameters are not float64.
        ValueError: If there are no parameters to check.

    Example:
        >>> import torch
        >>> from captum.attr import IntegratedGradients
        >>> from captum_priors import differentiable
        >>> from captum_priors.testing import check_differentiable
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).double()
        >>> x = torch.randn(2, 3, dtype=torch.float64)
        >>> explainer = differentiable(IntegratedGradients(model))
        >>> check_differentiable(explainer, x, target=1, n_steps=8).passed
        True
        >>> check_differentiable(
        ...     IntegratedGradients(model), x, target=1, raise_exception=False
        ... ).passed
        False
    """
    check_explainer(explainer)
    check_options(explainer, attribute_options)
    check_tensors(inputs)
    state = GlobalState.now(STREAMS)
    directions = torch.Generator().manual_seed(seed)
    weights: list[Tensor] = []

    def value() -> Tensor:
        seed_global(seed, STREAMS)
        attributions = as_tuple(explainer.attribute(inputs, **attribute_options))
        if not weights:
            weights.extend(_random_like(a, directions) for a in attributions)
        pairs = zip(weights, attributions, strict=True)
        return torch.stack([(w * a).sum() for w, a in pairs]).sum()

    try:
        named = _checked(explainer, inputs, parameters, attribute_options)
        with torch.enable_grad():  # throughout: some explainers of users need it for their values
            attributed = value()
            gradients: Sequence[Tensor | None] = [None] * len(named)
            if attributed.requires_grad:
                gradients = torch.autograd.grad(
                    attributed, [tensor for _, tensor in named], allow_unused=True
                )
            analytic, numeric = [], []
            for (_, tensor), gradient in zip(named, gradients, strict=True):
                direction = _random_like(tensor, directions)
                analytic.append(0.0 if gradient is None else float((gradient * direction).sum()))
                numeric.append(_central_difference(value, tensor, direction, step))
    finally:
        state.restore()
    scale = max([abs(v) for v in (*analytic, *numeric) if math.isfinite(v)], default=1.0)
    # Whatever is not a number is no derivative, wherever it stands.
    gaps = [a - n for a, n in zip(analytic, numeric, strict=True)]
    errors = [abs(gap) / (scale or 1.0) if math.isfinite(gap) else math.inf for gap in gaps]
    if scale == max(errors) == 0:
        raise refusal(
            ValueError,
            "`explainer`",
            "attributions that depend on at least one of the parameters",
            "derivatives that are all zero, which certifies nothing",
            "Choose a nonlinear model, or other parameters.",
        )
    names = [name for name, _ in named]
    certificate = Certificate(max(errors), dict(zip(names, errors, strict=True)), tolerance)
    if raise_exception and not certificate.passed:
        stock = isinstance(explainer, Attribution)
        stock = stock and type(explainer).__module__.startswith("captum.")
        worst = names[errors.index(max(errors))]
        raise refusal(
            NotDifferentiableError,
            "`explainer`",
            f"a gradient within {tolerance:g} of central differences",
            f"an error of {certificate.error:.2g}, the largest at {worst!r}",
            "Captum's own classes drop the graph: wrap it, differentiable(explainer)."
            if stock
            else "Do not train on it: a part of the computation is missing from its graph, or "
            "is random, or has a kink within the step.",
        )
    return certificate


def _checked(
    explainer: Any,
    inputs: Any,
    parameters: Iterable[tuple[str, Tensor]] | None,
    options: dict[str, Any],
) -> list[tuple[str, Tensor]]:
    if parameters is None:
        with run_modules() as running:  # what a function hides shows when it runs
            explainer.attribute(inputs, **options)
        modules = modules_of(explainer)
        known = {m for root in modules for m in root.modules()}
        modules = (*modules, *(m for m in running if m not in known))
        parameters = [
            # Several modules may have parameters of one name.
            (f"{i}:{type(module).__name__}.{name}" if len(modules) > 1 else name, parameter)
            for i, module in enumerate(modules)
            for name, parameter in module.named_parameters()
        ]
    pairs = list(parameters)
    if any(not isinstance(entry, tuple) for entry in pairs):
        raise refusal(
            TypeError,
            "`parameters`",
            "pairs of a name and a tensor",
            "tensors alone",
            "Pass model.named_parameters().",
        )
    pairs += [(f"inputs[{i}]", tensor) for i, tensor in enumerate(as_tuple(inputs))]
    # Each tensor once, under the last of its names.
    names = {tensor: name for name, tensor in pairs if tensor.requires_grad}
    for tensor, name in names.items():
        if tensor.dtype != torch.float64 or not tensor.is_leaf:
            raise refusal(
                TypeError,
                f"`{name}`",
                "a leaf tensor in torch.float64",
                f"{tensor.dtype}, leaf: {tensor.is_leaf}",
                "Certify a copy of the model made with copy.deepcopy(model).double(): in lower "
                "precision a difference quotient cannot tell right from wrong.",
            )
    if not names:
        raise refusal(
            ValueError,
            "`parameters`",
            f"parameters behind {type(explainer).__name__} that require gradients",
            "none",
            "Pass parameters=model.named_parameters().",
        )
    return [(name, tensor) for tensor, name in names.items()]


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return random.to(device=tensor.device, dtype=tensor.dtype)


def _central_difference(value: Any, tensor: Tensor, direction: Tensor, step: float) -> float:
    original = tensor.detach().clone()
    h = step * max(1.0, float(original.abs().max())) / max(1.0, float(direction.abs().max()))
    try:
        _write(tensor, original + h * direction)
        above = float(value().detach())
        _write(tensor, original - h * direction)
        below = float(value().detach())
    finally:
        _write(tensor, original)
    return (above - below) / (2 * h)


@torch.no_grad()
def _write(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)
