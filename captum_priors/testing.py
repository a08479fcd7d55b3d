"""Certificates: is the gradient of an attribution, or of a loss, the derivative of its value?"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._captum import as_tuple
from captum_priors._checks import check_number, check_tensors
from captum_priors._errors import NotDifferentiableError, refusal, type_of
from captum_priors._probe import check_explainer, check_options
from captum_priors._slopes import beside, judged, random_like, rows_of_padding
from captum_priors._state import one_state
from captum_priors.engine import modules_of, run_modules
from captum_priors.engine.random import STREAMS, seed_global

__all__ = ["Certificate", "GradientReport", "check_differentiable", "check_gradient"]

Named = list[tuple[str, Tensor]]


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
    directions = torch.Generator().manual_seed(seed)
    weights: list[Tensor] = []

    def value() -> Tensor:
        back()
        seed_global(seed, STREAMS)
        with torch.enable_grad():  # some explainers of users need it for their values
            found = explainer.attribute(inputs, **attribute_options)
        attributions = as_tuple(found)
        if not weights:
            weights.extend(random_like(a, directions) for a in attributions)
        pairs = zip(weights, attributions, strict=True)
        return torch.stack([(w * a).sum() for w, a in pairs]).sum()

    with one_state(modules_of(explainer), as_tuple(inputs)) as back:
        if parameters is None:
            parameters = _parameters_behind(explainer, value)
        own = [(f"inputs[{i}]", tensor) for i, tensor in enumerate(as_tuple(inputs))]
        named = _leaves([*_pairs(parameters), *own], (torch.float64,))
        with run_modules() as running:
            gradients = _gradients(value(), named)
        still = rows_of_padding(running)
        analytic, numeric = [], []
        for (_, tensor), gradient in zip(named, gradients, strict=True):
            direction = random_like(tensor, directions, still)
            analytic.append(0.0 if gradient is None else float((gradient * direction).sum()))
            size, largest = (max(1.0, float(t.detach().abs().max())) for t in (tensor, direction))
            h = step * size / largest
            above, below = beside(value, (tensor, h * direction))
            numeric.append((above - below) / (2 * h))
    scale = max([abs(v) for v in (*analytic, *numeric) if math.isfinite(v)], default=1.0)
    # Whatever is not a number is no derivative, wherever it stands.
    gaps = [a - n for a, n in zip(analytic, numeric, strict=True)]
    errors = [abs(gap) / (scale or 1.0) if math.isfinite(gap) else math.inf for gap in gaps]
    if scale == max(errors) == 0:
        raise _certifies_nothing("`explainer`")
    names = [name for name, _ in named]
    certificate = Certificate(max(errors), dict(zip(names, errors, strict=True)), tolerance)
    if raise_exception and not certificate.passed:
        worst = names[errors.index(max(errors))]
        raise refusal(
            NotDifferentiableError,
            "`explainer`",
            f"a gradient within {tolerance:g} of central differences",
            f"an error of {certificate.error:.2g}, the largest at {worst!r}",
            "Captum's own classes drop the graph: wrap them, differentiable(explainer). Otherwise "
            "do not train on it: a part of the computation is missing from its graph, or is "
            "random, or has a kink within the step.",
        )
    return certificate


def _parameters_behind(explainer: Any, value: Callable[[], Tensor]) -> Named:
    with run_modules() as running:  # what a function hides shows when it runs
        value()
    modules = modules_of(explainer)
    known = {m for root in modules for m in root.modules()}
    modules = (*modules, *(m for m in running if m not in known))
    return [
        # Several modules may have parameters of one name.
        (f"{i}:{type(module).__name__}.{name}" if len(modules) > 1 else name, parameter)
        for i, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    ]


def _pairs(parameters: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        parameters = parameters.named_parameters()
    elif isinstance(parameters, Tensor):
        parameters = [parameters]
    for i, entry in enumerate(parameters):
        name, tensor = entry if isinstance(entry, tuple) else (f"parameters[{i}]", entry)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            remedy = "Pass the model, model.parameters() or model.named_parameters()."
            expected = "tensors, or pairs of a name and a tensor"
            raise refusal(TypeError, "`parameters`", expected, type_of(entry), remedy)
        yield name, tensor


def _leaves(pairs: Named, dtypes: Sequence[torch.dtype]) -> Named:
    """Return what requires a gradient, each tensor once, under the last of its names."""
    names = {tensor: name for name, tensor in pairs if tensor.requires_grad}
    for tensor, name in names.items():
        if tensor.dtype not in dtypes or not tensor.is_leaf:
            raise refusal(
                TypeError,
                f"`{name}`",
                f"a leaf tensor in {' or '.join(map(str, dtypes))}",
                f"{tensor.dtype}, leaf: {tensor.is_leaf}",
                "Certify copy.deepcopy(model).double(): in lower precision a difference quotient "
                "often cannot tell right from wrong.",
            )
    if not names:
        remedy = "Pass parameters=model.named_parameters()."
        expected = "parameters that require gradients"
        raise refusal(ValueError, "`parameters`", expected, "none", remedy)
    return [(name, tensor) for tensor, name in names.items()]


def _gradients(value: Tensor, named: Named) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(named)
    found = torch.autograd.grad(value, [tensor for _, tensor in named], allow_unused=True)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in found]


def _certifies_nothing(what: str) -> Exception:
    return refusal(
        ValueError,
        what,
        "a value that depends on at least one of the parameters",
        "derivatives that are all zero, which certifies nothing",
        "Choose a nonlinear model, or other parameters.",
    )


# ---- Any loss ---------------------------------------------------------------------------------

_FAULTS = ("missing", "wrong", "not finite")


@dataclass(frozen=True)
class GradientReport:
    """What :func:`check_gradient` found for each parameter; printed, it is a sentence for each.

    ``verdicts`` are ``"right"``, ``"constant"`` (neither a gradient nor a slope), ``"missing"``
    (no gradient, though the value has a slope), ``"wrong"``, ``"not finite"`` and ``"undecided"``
    (differences that contradict each other: a kink or a jump beside the point, or rounding).
    ``slopes`` are the derivative by the gradient, and by the value's differences, along the
    direction in which they differ most; ``errors`` their difference, relative to the latter.

    Example:
        >>> from captum_priors.testing import GradientReport
        >>> report = GradientReport(0.5, {"bias": "wrong"}, {"bias": 1.0}, {"bias": (0.2, 0.1)})
        >>> print(report)
        wrong: bias (derivative 0.2 where the slope is 0.1, off by 1e+02 %)
        >>> report.passed, report.faults
        (False, ('bias',))
    """

    value: float
    verdicts: dict[str, str]
    errors: dict[str, float]
    slopes: dict[str, tuple[float, float]]

    @property
    def passed(self) -> bool:
        """Whether some gradients are right and all others are of constants."""
        return {"right"} <= {*self.verdicts.values()} <= {"right", "constant"}

    @property
    def faults(self) -> tuple[str, ...]:
        """Names of the parameters whose gradient is missing, wrong or not finite."""
        return tuple(name for name, verdict in self.verdicts.items() if verdict in _FAULTS)

    def __str__(self) -> str:
        said = {"constant": "constant in", "undecided": "not decidable here"}
        lines = []
        for verdict in (*_FAULTS, "undecided", "constant", "right"):
            those = [
                f"{name} ({self._detail(name)})" if verdict in _FAULTS[:2] else name
                for name, found in self.verdicts.items()
                if found == verdict
            ]
            lines += [f"{said.get(verdict, verdict)}: {', '.join(those)}"] if those else []
        return "\n".join(lines)

    def _detail(self, name: str) -> str:
        (derivative, slope), off = self.slopes[name], 100 * self.errors[name]
        return f"derivative {derivative:.2g} where the slope is {slope:.2g}, off by {off:.2g} %"


def check_gradient(
    loss_fn: Any,
    parameters: Any,
    *,
    inputs: Any = None,
    tolerance: float | None = None,
    seed: int = 0,
    raise_exception: bool = True,
) -> GradientReport:
    r"""Compare the gradient of any loss, one's own or another's, with its slopes.

    Each parameter tensor :math:`\theta` is moved along a random direction :math:`u`, and along one
    that is mostly the gradient's own,

    .. math:: \langle u, \nabla_\theta L\rangle \approx
        \frac{L(\theta + h u) - L(\theta - h u)}{2h},

    with a step :math:`h` that suits its precision. Where the two differ, more steps tell a wrong
    gradient from a kink (steps, or the two sides, contradict each other): that is "undecided".

    Each evaluation has the same random numbers, running statistics and streams of priors, and
    nothing is left changed: no parameter, no ``.grad``, no buffer, no generator. The row of an
    embedding's ``padding_idx``, to which torch gives no gradient, is left out.

    Args:
        loss_fn: Returns the loss, one number: called as ``loss_fn()``, or with the inputs.
            Check a penalty alone: beside a larger loss, its missing gradient is a small error.
        parameters: A module, a tensor, tensors, or pairs of a name and a tensor, in float64 or
            float32; those that require no gradient are left out. In float64 more is decided.
        inputs: Passed to ``loss_fn``, a tuple as its arguments.
        tolerance: Largest accepted difference, relative to the slope; by default 0.001 in float64,
            0.01 in float32.
        seed: Seed of the directions.
        raise_exception: Raise where a gradient is missing, wrong or not finite. What could not be
            decided raises nothing, but does not pass.

    Returns:
        What was found for each parameter.

    Raises:
        NotDifferentiableError: If a gradient is missing, wrong or not finite.
        TypeError: If the loss is no function, or a parameter no leaf in float64 or float32.
        ValueError: If the loss is not one number, or not the same from the same state, if no
            parameter requires a gradient, or the loss is constant in all.

    Example:
        >>> import torch
        >>> from captum_priors.testing import check_gradient
        >>> model, x = torch.nn.Linear(3, 1).double(), torch.randn(8, 3).double()
        >>> def right(x):
        ...     x = x.requires_grad_()
        ...     gradient, = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        ...     return gradient.square().mean()
        >>> check_gradient(right, model, inputs=x).passed
        True
        >>> def through_grad_data(x):
        ...     x = x.detach().requires_grad_()
        ...     model(x).tanh().sum().backward()
        ...     return x.grad.data.square().mean()
        >>> report = check_gradient(through_grad_data, model, inputs=x, raise_exception=False)
        >>> report.verdicts
        {'weight': 'missing', 'bias': 'missing'}
    """
    if not callable(loss_fn):
        remedy = "Pass lambda: ..., which computes it anew."
        raise refusal(TypeError, "`loss_fn`", "a function", type_of(loss_fn), remedy)
    named = _leaves([*_pairs(parameters)], (torch.float64, torch.float32))
    given = () if inputs is None else as_tuple(inputs)
    tensors = [*(t for _, t in named), *(t for t in given if isinstance(t, Tensor))]
    with one_state(modules_of(parameters, loss_fn), tensors) as back, torch.enable_grad():

        def evaluate() -> Tensor:
            back()
            return check_number("`loss_fn()`", loss_fn(*given))

        with run_modules() as running:
            value, again = evaluate(), evaluate()
        gap = abs(float(value.detach()) - float(again.detach()))
        # Sums on a GPU come in any order; other differences are no rounding.
        if gap > 1e3 * torch.finfo(value.dtype).eps * abs(float(again.detach())):
            raise refusal(
                ValueError,
                "`loss_fn`",
                "the same value from the same state",
                f"{float(value.detach()):.6g}, then {float(again.detach()):.6g}",
                "Make a generator of your own inside of it, and accumulate nothing.",
            )
        start, gradients = again.detach().clone(), _gradients(again, named)
        del value, again
        found = judged(evaluate, start, named, gradients, tolerance, seed, rows_of_padding(running))
    report = GradientReport(
        float(start),
        verdicts={name: finding.verdict for name, finding in found.items()},
        errors={name: finding.error for name, finding in found.items()},
        slopes={name: finding.slopes for name, finding in found.items()},
    )
    if set(report.verdicts.values()) == {"constant"}:
        raise _certifies_nothing("`loss_fn`")
    if raise_exception and report.faults:
        raise refusal(
            NotDifferentiableError,
            "`loss_fn`",
            "a gradient that is the slope of the loss",
            str(report).replace("\n", "; "),
            "Look for .data, .detach(), torch.autograd.grad without create_graph=True, explainers "
            "of Captum's without differentiable(...), and for square roots and divisions at zero.",
        )
    return report
