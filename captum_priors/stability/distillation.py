"""Regularizers that compare predictions alone: ATEX and saliency-guided training."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors._captum import as_tuple, like_inputs
from captum_priors._checks import count, positive
from captum_priors._checks import fraction as check_fraction
from captum_priors._errors import expected_found
from captum_priors._probe import check_explainer, check_options
from captum_priors._shown import shown, shown_options, shown_value
from captum_priors.engine import derive
from captum_priors.engine.random import STREAMS
from captum_priors.priors.base import Call, Reduction
from captum_priors.stability.base import Regularizer, Tensors, flat_rows, logits_of, repeated


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

    The published code has :math:`t \in \{-1, 0\}`, ``positions=(-1, 0)``: never up the explanation.
    It takes an optimizer step for each :math:`t`, twice, with the student in train mode, averages
    the divergence over the classes, too, and projects each colour channel by itself; here one value
    averages over :math:`t`, the student is held still as by every prior, and all features of an
    example count together.

    Args:
        forward_func: The student, which returns logits; a single one is a binary classifier's.
        explainer: Any object with Captum's ``attribute``; by default SmoothGrad of the student over
            10 samples with standard deviation ``radius / 4``, as in the published code.
        radius: :math:`r`, in units of the inputs; .32 is the paper's for images in [0, 1].
        temperature: :math:`T` of the teacher.
        n_samples: Draws of the noise for each :math:`t`.
        teacher: Module or function that predicts as the student does; by default a frozen copy of
            the student as it is now. The copy is part of this prior's ``state_dict``, so that
            resumed training has the same teacher, and moves to the student's device; a teacher that
            is passed stays the caller's, who saves and moves it. No teacher is ever trained.
        positions: Values of :math:`t`.
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

    explainer: Any
    teacher: Any

    def __init__(
        self,
        forward_func: Any,
        explainer: Any = None,
        *,
        radius: float = 0.32,
        temperature: float = 4.0,
        n_samples: int = 8,
        teacher: Any = None,
        positions: Sequence[float] = (-1.0, 0.0, 1.0),
        reduction: Reduction = "mean",
        smooth: float | None = None,
        **attribute_options: Any,
    ) -> None:
        super().__init__(forward_func, reduction=reduction, smooth=smooth)
        self.radius = positive("radius", radius)
        self.temperature = positive("temperature", temperature)
        self.n_samples = count("n_samples", n_samples)
        self.positions = _finite_numbers("positions", positions)
        self._named = [] if explainer is None else [shown(explainer)]
        self._named += [f"{name}={shown_value(v)}" for name, v in attribute_options.items()]
        if explainer is not None:
            check_explainer(explainer)
            check_options(explainer, attribute_options)
        elif attribute_options:
            raise TypeError(
                expected_found(
                    f"`{next(iter(attribute_options))}`",
                    "an option of ATEX",
                    "something else",
                    "Options of an explainer go with explainer=....",
                )
            )
        self.options = attribute_options
        # What an explainer from elsewhere draws from is not known.
        self.draws: Sequence[str] = getattr(explainer, "draws", STREAMS if explainer else ())
        self.__dict__["explainer"] = explainer
        self._owns_teacher = teacher is None
        if teacher is None:
            self.teacher = _frozen_copy(forward_func)
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

    def train(self, mode: bool = True) -> "ATEX":
        """Set the mode of the prior; the copy that teaches keeps its running statistics."""
        super().train(mode)
        if self._owns_teacher:
            self.teacher.eval()
        return self

    def takes(self, name: str) -> bool:
        """Whether the explainer takes baselines."""
        attribute = getattr(self.explainer, "attribute", self._smooth_gradients)
        return name == "baselines" and name in inspect.signature(attribute).parameters

    @property
    def draws_baselines(self) -> bool:
        """Whether baselines are a distribution to draw from, rather than one for each example."""
        return bool(getattr(self.explainer, "draws_baselines", False))

    def formula(self) -> str:
        """Return the prior as it would be written."""
        options = shown_options(self, skip=("explainer", "teacher"))
        return f"{type(self).__name__}({', '.join([*self._named, *options])})"

    def _explained(self) -> tuple[Any, ...]:
        return (self.forward_func, self.explainer, self.teacher)

    def _follow(self, x: Tensor) -> None:
        """Move the copy to where the student has gone since."""
        ours, theirs = (next(m.parameters(), x) for m in (self.teacher, self.forward_func))
        if (ours.device, ours.dtype) != (theirs.device, theirs.dtype):
            self.teacher.to(theirs)

    def _scores(self, call: Call) -> Tensor:
        """Compare at (positions, samples, examples, features), all features side by side."""
        if self._owns_teacher:
            self._follow(call.inputs[0])
        with torch.no_grad():
            x, s = flat_rows(call.inputs), self._explanation(call)
            top, norm = s.abs().amax(1, keepdim=True), s.norm(dim=1, keepdim=True)
            t = x.new_tensor(self.positions).reshape(-1, 1, 1, 1)
            centres = x + t * (self.radius / torch.where(top > 0, top, 1)) * s
            soft = self._log_probabilities(self.teacher, call, centres, self.temperature)
            generator = torch.Generator(x.device).manual_seed(derive(call.seed, 1))
            shape = (len(t), self.n_samples, *x.shape)
            draws = torch.rand(shape, dtype=x.dtype, device=x.device, generator=generator)
            noise, u = (2 * draws - 1) * self.radius, s / torch.where(norm > 0, norm, 1)
            points = centres + noise - (noise * u).sum(-1, keepdim=True) * u
        student = self._log_probabilities(self.forward_func, call, points)
        if soft.shape[-1] != student.shape[-1]:
            raise ValueError(
                expected_found(
                    "`teacher`",
                    f"{student.shape[-1]} classes as the student's",
                    str(soft.shape[-1]),
                    "Pass a teacher for the same classes.",
                )
            )
        soft = soft.expand_as(student)
        return F.kl_div(student, soft, reduction="none", log_target=True).sum(-1).mean((0, 1))

    def _explanation(self, call: Call) -> Tensor:
        """Explain the batch; the maps are constants."""
        if self.explainer is None:
            return flat_rows(self._smooth_gradients(call))
        # Leaves of our own that require gradients: Captum would set and unset that on others.
        given = tuple(x.detach().clone().requires_grad_() for x in call.inputs)
        keywords = {
            "target": call.target,
            "additional_forward_args": call.args or None,
            "baselines": call.baselines,
        }
        call.explaining.seed(derive(call.seed, 0))
        maps = self.explainer.attribute(
            like_inputs(call.given, given),
            **self.options,
            **{name: value for name, value in keywords.items() if value is not None},
        )
        found, expected = ([tuple(m.shape) for m in as_tuple(each)] for each in (maps, given))
        if found != expected:
            raise ValueError(
                expected_found(
                    "`explainer`",
                    f"attributions of the shapes {expected} of the inputs",
                    str(found),
                    "Use an explainer of the inputs rather than of a layer.",
                )
            )
        return flat_rows(as_tuple(maps)).detach()

    def _smooth_gradients(self, call: Call, n: int = 10) -> Tensors:
        """Mean input gradient at n noisy copies of the inputs (Smilkov et al. 2017)."""
        stdev, device = self.radius / 4, call.inputs[0].device
        generator = torch.Generator(device).manual_seed(derive(call.seed, 0))
        noisy = tuple(
            x + stdev * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            for x in repeated(call.inputs, n)
        )
        gradients = self._input_gradients(call, noisy)
        return tuple(g.unflatten(0, (n, -1)).mean(0) for g in gradients)

    def _log_probabilities(
        self, model: Any, call: Call, rows: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Run a model at rows of features, shape (..., examples, features)."""
        widths = [x[0].numel() for x in call.inputs]
        pairs = zip(rows.flatten(0, -2).split(widths, 1), call.inputs, strict=True)
        points = tuple(part.reshape(-1, *x.shape[1:]).to(x.dtype) for part, x in pairs)
        outputs = replace(call, forward_func=model, target=None).outputs(points)
        found = F.log_softmax(logits_of(outputs) / temperature, 1)
        return found.reshape(*rows.shape[:-1], -1)


class SaliencyGuided(Regularizer):
    r"""SGT: predictions that stay when the features of least saliency are replaced by noise.

    .. math:: \mathrm{KL}\left(\mathrm{softmax} f(x) \,\Vert\, \mathrm{softmax} f(\tilde x)\right)

    (Ismail et al. 2021), where :math:`\tilde x` has the features whose gradient of the target
    output is smallest replaced by numbers uniform between the smallest and largest entry of the
    example. Both predictions are trained; only first derivatives are taken. The paper adds it to
    the cross entropy with weight 1.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        fraction: Share of the features that is replaced, .5 in the paper.
        abs: Rank by absolute gradients; the public code ranks signed ones unless told otherwise,
            and so replaces the features that speak most against the class.
        reduction: ``"mean"`` or ``"sum"`` over the examples.
        smooth: Run the model with ReLU as Softplus of this steepness.

    Raises:
        ValueError: If ``fraction`` is not in (0, 1].

    Example:
        >>> import torch
        >>> from captum_priors.stability import SaliencyGuided
        >>> weight = torch.tensor([[1.0, 0.0], [2.0, 0.0]])  # the second feature does not count
        >>> model = lambda x: x @ weight.T
        >>> SaliencyGuided(model, fraction=0.5)(torch.randn(4, 2), target=0).item()
        0.0
    """

    def __init__(
        self,
        forward_func: Any,
        fraction: float = 0.5,
        *,
        abs: bool = True,  # noqa: A002  # Captum's name for it
        reduction: Reduction = "mean",
        smooth: float | None = None,
    ) -> None:
        super().__init__(forward_func, reduction=reduction, smooth=smooth)
        self.fraction, self.abs = check_fraction("fraction", fraction), abs

    def _scores(self, call: Call) -> Tensor:
        with torch.no_grad():
            masked = self._masked(call)
        points = tuple(torch.cat(pair) for pair in zip(call.inputs, masked, strict=True))
        here, there = F.log_softmax(logits_of(call.outputs(points)), 1).chunk(2)
        return F.kl_div(there, here, reduction="none", log_target=True).sum(1)

    def _masked(self, call: Call) -> Tensors:
        """Replace the least salient features, all tensors of an example ranked together."""
        saliency = flat_rows(self._input_gradients(call, call.inputs))
        saliency = saliency.abs() if self.abs else saliency
        least = max(1, round(self.fraction * saliency.shape[1]))
        chosen = saliency.topk(least, dim=1, largest=False).indices
        mask = torch.zeros_like(saliency, dtype=torch.bool).scatter(1, chosen, True)
        masked = []
        generator = torch.Generator(saliency.device).manual_seed(derive(call.seed, 0))
        for x, own in zip(
            call.inputs, mask.split([x[0].numel() for x in call.inputs], 1), strict=True
        ):
            rows = x.flatten(1)
            low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
            draws = torch.rand(rows.shape, dtype=x.dtype, device=x.device, generator=generator)
            masked.append(torch.where(own, low + (high - low) * draws, rows).reshape(x.shape))
        return tuple(masked)


def _finite_numbers(name: str, value: Any) -> tuple[float, ...]:
    found = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not found or any(not isinstance(t, (int, float)) or not abs(t) < torch.inf for t in found):
        raise ValueError(
            expected_found(
                f"`{name}`",
                "at least one finite number",
                repr(value),
                f"Pass for example {name}=(-1, 0, 1).",
            )
        )
    return tuple(map(float, found))


def _frozen_copy(model: Any) -> nn.Module:
    """Copy a module, to be evaluated and never trained."""
    try:
        if not isinstance(model, nn.Module):
            raise TypeError(f"a {type(model).__name__}")
        teacher = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            expected_found(
                "`teacher`",
                "one, unless the model is a module that copy.deepcopy can copy",
                f"none for {error}",
                "Pass teacher=..., a module or function with the predictions to keep.",
            )
        ) from error
    teacher.zero_grad(set_to_none=True)
    return teacher.eval().requires_grad_(False)
