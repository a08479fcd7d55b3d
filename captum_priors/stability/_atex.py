"""ATEX: predictions that stay the same across the explanation's direction."""

import copy
import inspect
from dataclasses import replace
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from captum_priors._captum import as_tuple, like_inputs
from captum_priors._checks import check_count
from captum_priors.engine import input_gradients
from captum_priors._errors import expected_found
from captum_priors._types import TensorOrTuple
from captum_priors.priors.base import Reduction
from captum_priors.stability._classes import logits_of
from captum_priors.stability._regularizer import (
    Call,
    Regularizer,
    Tensors,
    check_number,
    flat_rows,
    repeated,
)

_POSITIONS = (-1.0, 0.0, 1.0)
_POSITIONS_PUBLISHED = (-1.0, 0.0)


class ATEX(Regularizer):
    r"""Match a teacher's softened predictions on hyperplanes across the explanation's direction.

    .. math:: \mathbb E_{t, n}\; \mathrm{KL}\left(\mathrm{softmax}(f_0(x_t) / T) \,\Vert\,
        \mathrm{softmax}(f(x_t + n - \langle n, u\rangle u))\right), \qquad
        x_t = x + t\, r\, s / \lVert s\rVert_\infty,\quad u = s / \lVert s\rVert_2,

    with the explanation :math:`s` of the student :math:`f`, noise :math:`n` uniform in
    :math:`[-r, r]`, and a teacher :math:`f_0` (Tang et al. 2022). The prediction may change along
    the explanation and not across it, so the explanation is where it points, whatever explainer is
    asked later. Only predictions are matched: no derivative of an explanation is taken, and the
    explainer need not be differentiable. The paper trains on this term alone, from the teacher's
    parameters.

    With ``paper_compat`` the published code's conventions hold where they differ:

    - :math:`t \in \{-1, 0\}` rather than :math:`\{-1, 0, 1\}`: never up the explanation;
    - norm and projection over the dimensions after the second, hence for each colour channel by
      itself (over all dimensions of tabular inputs);
    - the divergence averaged over the classes, too: a factor of one over their number;
    - :math:`10^{-6}` added to :math:`\lVert s\rVert_\infty`, and noisy inputs of its SmoothGrad
      clamped to :math:`[0, 255]`.

    It takes an optimizer step for each :math:`t`, twice, with the student in train mode; here one
    value averages over :math:`t`, and the student is held still as by every prior.

    Args:
        model: The student.
        explainer: Any object with Captum's ``attribute``; by default SmoothGrad of the student over
            10 samples with standard deviation ``radius / 4``, as in the published code.
        radius: :math:`r`, in units of the inputs; .32 is the paper's for images in [0, 1].
        temperature: :math:`T` of the teacher.
        n_samples: Draws of the noise for each :math:`t`.
        teacher: Module or function that predicts as the student does; by default a frozen copy of
            the student as it is now. The copy is part of this prior's ``state_dict``, so that
            resumed training has the same teacher, and moves to the student's device; a teacher that
            is passed stays the caller's, who saves and moves it. No teacher is ever trained.
        student_temperature: Temperature of the student, 1 in the paper. Equal temperatures ask for
            the teacher's logits; unequal ones also shrink them.
        positions: Values of :math:`t`.
        paper_compat: Follow the published code.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Run student and teacher with ReLU as Softplus of this steepness.
        attribute_options: What else ``explainer.attribute`` is given at every call.

    Raises:
        TypeError: If the model or teacher is not callable, or the explainer has no ``attribute``.
        ValueError: If there is nothing to copy a teacher from, or an option is out of range.

    Example:
        >>> import torch
        >>> from captum_priors.stability import ATEX
        >>> _ = torch.manual_seed(0)
        >>> w = torch.randn(3)
        >>> ridge = lambda x: torch.stack([torch.sin(x @ w), torch.cos(x @ w)], 1)
        >>> atex = ATEX(ridge, temperature=1, teacher=ridge)  # varies along its gradient alone
        >>> atex(torch.randn(4, 3), target=0).item() < 1e-6
        True
    """

    def __init__(
        self,
        model: Any,
        explainer: Any = None,
        *,
        radius: float = 0.32,
        temperature: float = 4.0,
        n_samples: int = 8,
        teacher: Any = None,
        student_temperature: float = 1.0,
        positions: Sequence[float] | None = None,
        paper_compat: bool = False,
        reduction: Reduction = "mean",
        smooth: float | None = None,
        **attribute_options: Any,
    ) -> None:
        super().__init__(model, reduction=reduction, smooth=smooth)
        self.radius = check_number("radius", radius)
        self.temperature = check_number("temperature", temperature)
        self.student_temperature = check_number("student_temperature", student_temperature)
        check_count("n_samples", n_samples)
        self.n_samples = n_samples
        if positions is None:
            positions = _POSITIONS_PUBLISHED if paper_compat else _POSITIONS
        self.positions = _checked_positions(positions)
        self.paper_compat = paper_compat
        if explainer is None:
            explainer = SmoothGrad(model, self.radius / 4, clamp=paper_compat)
        self.options = attribute_options
        self.__dict__["explainer"] = _checked_explainer(explainer, attribute_options)
        self._owns_teacher = teacher is None
        if teacher is None:
            self.teacher = _frozen_copy(model)
        elif callable(teacher):
            self.__dict__["teacher"] = teacher
        else:
            raise TypeError(
                expected_found(
                    "`teacher`",
                    "a module or a function that returns logits",
                    type(teacher).__name__,
                    "Leave it out for a frozen copy of the model.",
                )
            )

    explainer: Any

    def _scores(self, call: Call) -> Tensor:
        with torch.no_grad():
            maps = self._explanation(call)
            centres = self._centres(call.inputs, maps)
            soft = self._teacher_log_probabilities(call, centres)
            points = self._tangent_points(centres, maps, call.n)
        logits = logits_of(call.outputs(points)) / self.student_temperature
        shape = (len(self.positions), self.n_samples, call.n, logits.shape[1])
        student = F.log_softmax(logits, 1).reshape(shape)
        if soft.shape[1] != logits.shape[1]:
            raise ValueError(
                expected_found(
                    "`teacher`",
                    f"{logits.shape[1]} classes as the student's",
                    str(soft.shape[1]),
                    "Pass a teacher for the same classes.",
                )
            )
        teacher = soft.reshape(shape[0], 1, *shape[2:]).expand(shape)
        divergences = F.kl_div(student, teacher, reduction="none", log_target=True)
        # The published code's reduction="mean" averages over the classes.
        each = divergences.mean(3) if self.paper_compat else divergences.sum(3)
        return each.mean((0, 1))

    def _explanation(self, call: Call) -> Tensors:
        """Explain the batch; the maps are constants."""
        # Leaves of our own that require gradients: Captum would set and unset that on the user's.
        given = tuple(x.detach().clone().requires_grad_() for x in call.inputs)
        keywords = {
            "target": call.target,
            "additional_forward_args": call.args or None,
            "baselines": call.baselines,
        }
        maps = self.explainer.attribute(
            given if len(given) > 1 else given[0],
            **self.options,
            **{name: value for name, value in keywords.items() if value is not None},
        )
        found = [tuple(m.shape) for m in as_tuple(maps)]
        expected = [tuple(x.shape) for x in call.inputs]
        if found != expected:
            raise ValueError(
                expected_found(
                    "`explainer`",
                    f"attributions of the shapes {expected} of the inputs",
                    str(found),
                    "Use an explainer of the inputs rather than of a layer.",
                )
            )
        return tuple(m.detach() for m in as_tuple(maps))

    def _centres(self, inputs: Tensors, maps: Tensors) -> Tensors:
        """Points along the explanation, position by position: (positions * batch, ...)."""
        top = flat_rows(maps).abs().amax(1)
        if self.paper_compat:
            top = top + 1e-6
        scale = torch.where(top > 0, self.radius / torch.where(top > 0, top, 1), 0)
        return tuple(
            torch.cat([x.detach() + t * _each(scale, m) * m for t in self.positions])
            for x, m in zip(inputs, maps, strict=True)
        )

    def _tangent_points(self, centres: Tensors, maps: Tensors, n: int) -> Tensors:
        """Add noise without its part along the explanation: (positions * samples * batch, ...)."""
        shape = (len(self.positions), self.n_samples, n)
        noise = tuple(
            (2 * torch.rand(*shape, *c.shape[1:], dtype=c.dtype, device=c.device) - 1) * self.radius
            for c in centres
        )
        across = _across_each_channel if self.paper_compat else _across
        return tuple(
            (c.reshape(shape[0], 1, *v.shape[2:]) + v).flatten(0, 2)
            for c, v in zip(centres, across(noise, maps), strict=True)
        )

    def _teacher_log_probabilities(self, call: Call, centres: Tensors) -> Tensor:
        if self._owns_teacher:
            self._follow()
        outputs = replace(call, forward_func=self.teacher, target=None).outputs(centres)
        return F.log_softmax(logits_of(outputs) / self.temperature, 1)

    def _follow(self) -> None:
        """Move the copy to where the student has gone since."""
        ours, theirs = (next(m.parameters(), None) for m in (self.teacher, self.forward_func))
        if (
            ours is not None
            and theirs is not None
            and (ours.device, ours.dtype) != (theirs.device, theirs.dtype)
        ):
            self.teacher.to(theirs)

    def _explained(self) -> tuple[Any, ...]:
        return (self.forward_func, self.explainer, self.teacher)

    @property
    def draws_baselines(self) -> bool:
        """Whether baselines are a distribution to draw from, rather than one for each example."""
        return bool(getattr(self.explainer, "draws_baselines", False))

    def takes(self, name: str) -> bool:
        """Whether the explainer takes baselines."""
        return (
            name == "baselines" and name in inspect.signature(self.explainer.attribute).parameters
        )

    def _options(self) -> dict[str, Any]:
        return {
            "radius": self.radius,
            "temperature": self.temperature,
            "n_samples": self.n_samples,
            **({"paper_compat": True} if self.paper_compat else {}),
        }


class SmoothGrad:
    """Mean input gradient at noisy copies of the inputs (Smilkov et al. 2017)."""

    def __init__(
        self, forward_func: Any, stdev: float, *, n_samples: int = 10, clamp: bool
    ) -> None:
        self.forward_func, self.stdev, self.n_samples = forward_func, stdev, n_samples
        self.clamp = clamp

    def attribute(
        self, inputs: TensorOrTuple, target: Any = None, additional_forward_args: Any = None
    ) -> TensorOrTuple:
        """Return the smoothed signed gradients."""
        tensors = as_tuple(inputs)
        call = Call(self.forward_func, tensors, target, additional_forward_args or ())
        noisy = tuple(
            x.detach() + self.stdev * torch.randn_like(x) for x in repeated(tensors, self.n_samples)
        )
        if self.clamp:
            noisy = tuple(x.clamp(0, 255) for x in noisy)
        gradients = input_gradients(call.output, noisy)
        means = tuple(g.reshape(self.n_samples, call.n, *g.shape[1:]).mean(0) for g in gradients)
        return like_inputs(inputs, means)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """Give one number for each example as many dimensions as the tensor has."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _across(noise: Tensors, maps: Tensors) -> Tensors:
    """Take away the part of the noise along the maps, all features of an example together."""
    norm = flat_rows(maps).norm(dim=1)
    along = tuple(m / _each(torch.where(norm > 0, norm, 1), m) for m in maps)
    products = torch.stack([(v * u).flatten(3).sum(3) for v, u in zip(noise, along, strict=True)])
    size = products.sum(0)
    return tuple(
        v - size.reshape(*size.shape, *[1] * (u.dim() - 1)) * u
        for v, u in zip(noise, along, strict=True)
    )


def _across_each_channel(noise: Tensors, maps: Tensors) -> Tensors:
    """Do so for each channel by itself, as the published code does; zero maps stay out of it."""
    across = []
    for v, m in zip(noise, maps, strict=True):
        dims = tuple(range(2, m.dim())) or (1,)
        norm = m.square().sum(dims, keepdim=True).sqrt()
        along = m / torch.where(norm > 0, norm, 1)
        product = (v * along).sum(tuple(d + 2 for d in dims), keepdim=True)
        across.append(v - product * along)
    return tuple(across)


def _checked_positions(positions: Any) -> tuple[float, ...]:
    found = tuple(positions) if isinstance(positions, (list, tuple)) else ()
    if not found or any(
        not isinstance(t, (int, float)) or not abs(t) < float("inf") for t in found
    ):
        raise ValueError(
            expected_found(
                "`positions`",
                "at least one finite number",
                repr(positions),
                "Pass for example (-1, 0, 1).",
            )
        )
    return tuple(map(float, found))


def _checked_explainer(explainer: Any, options: dict[str, Any]) -> Any:
    if isinstance(explainer, type) or not callable(getattr(explainer, "attribute", None)):
        raise TypeError(
            expected_found(
                "`explainer`",
                "an object with Captum's attribute(inputs, ...)",
                repr(explainer) if isinstance(explainer, type) else type(explainer).__name__,
                "Pass for example captum.attr.IntegratedGradients(model).",
            )
        )
    parameters = inspect.signature(explainer.attribute).parameters
    is_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name in ("inputs", "target", "additional_forward_args") or not (
            is_open or name in parameters
        ):
            raise TypeError(
                expected_found(
                    f"`{name}`",
                    f"an option of ATEX or of {type(explainer).__name__}.attribute",
                    "something else",
                    "Check the spelling; inputs and target go into the call.",
                )
            )
    return explainer


def _frozen_copy(model: Any) -> nn.Module:
    """Copy the eager module behind wrappers, to be evaluated and never trained."""
    module = model
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
    if not isinstance(module, nn.Module):
        raise ValueError(
            expected_found(
                "`teacher`",
                "one, because only a module can be copied",
                f"none for a {type(model).__name__}",
                "Pass teacher=..., a module or function with the predictions to keep.",
            )
        )
    try:
        teacher = copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            expected_found(
                "`model`",
                "a module that copy.deepcopy can copy",
                str(error),
                "Pass teacher=..., a module or function with the predictions to keep.",
            )
        ) from error
    teacher.zero_grad(set_to_none=True)
    return teacher.eval().requires_grad_(False)
