"""Regularizers that compare predictions alone: ATEX and saliency-guided training."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from captum_priors._captum import as_tuple, forward_args
from captum_priors._checks import count, positive
from captum_priors._checks import fraction as check_fraction
from captum_priors._errors import refusal
from captum_priors._probe import Probe, check_explainer, check_options
from captum_priors._rows import Rows
from captum_priors._shown import shown, shown_options, shown_value
from captum_priors._types import TensorOrTuple
from captum_priors.attacks.ball import Tensors, unit
from captum_priors.engine import derive, input_gradients
from captum_priors.engine.model import BatchNorm
from captum_priors.engine.random import STREAMS
from captum_priors.priors.base import Call, Reduction
from captum_priors.priors.classes import logits_of
from captum_priors.priors.terms import TermOptions
from captum_priors.stability.base import Regularizer, flat_rows, points_of, repeated


class _SmoothGrad:
    """Mean input gradient at ten noisy copies of the inputs (Smilkov et al. 2017)."""

    def __init__(self, forward_func: Any, stdev: float) -> None:
        self.forward_func, self.stdev = forward_func, stdev

    @torch.no_grad()
    def attribute(
        self, inputs: TensorOrTuple, target: Any = None, additional_forward_args: Any = None
    ) -> Tensors:
        """Attribute; a tuple also for one tensor."""
        copies = repeated(as_tuple(inputs), 10)
        args, n = forward_args(additional_forward_args), len(copies[0]) // 10
        noisy = tuple(x + self.stdev * torch.randn_like(x) for x in copies)
        gradients = input_gradients(Rows(self.forward_func, target, args, n), noisy)
        return tuple(g.unflatten(0, (10, n)).mean(0) for g in gradients)


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

    The published code has ``positions=(-1, 0)``: never up the explanation. It takes an optimizer
    step for each :math:`t`, twice, with the student in train mode, averages the divergence over the
    classes, too, and projects each colour channel by itself.

    Args:
        forward_func: The student, which returns logits; a single one is a binary classifier's.
        explainer: Any object with Captum's ``attribute``; by default SmoothGrad of the student over
            10 samples with standard deviation ``radius / 4``, as in the published code.
        radius: :math:`r`, in units of the inputs; .32 is the paper's for images in [0, 1].
        temperature: :math:`T` of the teacher.
        n_samples: Draws of the noise for each :math:`t`.
        teacher: Module or function of the student's classes, which stays the caller's to save and
            move. By default a frozen copy of the student as it is now, which follows it to its
            device, and is in this prior's ``state_dict``, so that resumed training has the same.
            No teacher is ever trained.
        positions: Values of :math:`t`.
        reduction, smooth, batch_norm, name: As in :class:`Term`.
        attribute_options: What else ``explainer.attribute`` is given at every call.

    Raises:
        TypeError: If the explainer has no ``attribute``, or that does not take an option.
        ValueError: If there is no module to copy a teacher from.

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

    draws = STREAMS  # what an explainer from elsewhere draws from is not known
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
        batch_norm: BatchNorm = "batch",
        name: str | None = None,
        **attribute_options: Any,
    ) -> None:
        super().__init__(
            forward_func, reduction=reduction, smooth=smooth, batch_norm=batch_norm, name=name
        )
        self.radius = positive("radius", radius)
        self.temperature = positive("temperature", temperature)
        self.n_samples = count("n_samples", n_samples)
        self.positions = tuple(map(float, positions))
        count("len(positions)", len(self.positions))
        self._named = [] if explainer is None else [shown(explainer)]
        self._named += [f"{name}={shown_value(v)}" for name, v in attribute_options.items()]
        if explainer is None:
            explainer = _SmoothGrad(forward_func, radius / 4)
        check_explainer(explainer)
        check_options(explainer, attribute_options)
        self.options = attribute_options
        if teacher is None and not isinstance(forward_func, nn.Module):
            raise refusal(
                ValueError,
                "`teacher`",
                "one, unless `forward_func` is a module that can be copied",
                f"none for a {type(forward_func).__name__}",
                "Pass teacher=..., a module or function with the predictions to keep.",
            )
        self.__dict__["explainer"] = explainer  # past nn.Module's registration, like the model
        if teacher is None:
            self.teacher = copy.deepcopy(forward_func).eval().requires_grad_(False)
            self.teacher.zero_grad(set_to_none=True)
        else:
            self.__dict__["teacher"] = teacher

    def train(self, mode: bool = True) -> "ATEX":
        """Set the mode of the prior; the copy that teaches keeps its running statistics."""
        super().train(mode)
        if "teacher" in self._modules:
            self.teacher.eval()
        return self

    def takes(self, name: str) -> bool:
        """Whether the explainer takes baselines."""
        return (
            name == "baselines" and name in inspect.signature(self.explainer.attribute).parameters
        )

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

    def _scores(self, call: Call) -> Tensor:
        """Compare at (positions, samples, examples, features), all features side by side."""
        call.refuse_coupled()  # of the student; teacher and explainer are asked before it runs
        self._follow(call.inputs[0])
        with torch.no_grad():
            x, s = flat_rows(call.inputs), self._explanation(call)
            call.explaining.seed(derive(call.seed, 1))
            u, t = unit(s), x.new_tensor(self.positions).reshape(-1, 1, 1, 1)
            largest = u.abs().amax(1, keepdim=True)
            centres = x + t * self.radius * u / torch.where(largest > 0, largest, 1)
            soft = self._log_probabilities(self.teacher, call, centres, self.temperature)
            draws = torch.rand(len(t), self.n_samples, *x.shape, dtype=x.dtype, device=x.device)
            noise = (2 * draws - 1) * self.radius
            points = centres + noise - (noise * u).sum(-1, keepdim=True) * u
        student = self._log_probabilities(self.forward_func, call, points)
        soft = soft.expand_as(student)
        return F.kl_div(student, soft, reduction="none", log_target=True).sum(-1).mean((0, 1))

    def _follow(self, x: Tensor) -> None:
        """Move the copy to where the student has gone since."""
        if "teacher" in self._modules:
            ours, theirs = (next(m.parameters(), x) for m in (self.teacher, self.forward_func))
            if (ours.device, ours.dtype) != (theirs.device, theirs.dtype):
                self.teacher.to(theirs)

    def _explanation(self, call: Call) -> Tensor:
        """Explain the batch; the maps are constants."""
        given = {"target": call.target, "baselines": call.baselines}
        given["additional_forward_args"] = call.args or None
        probe = Probe(self.explainer, call.given, self.options, **given)
        # Leaves of our own that require gradients: Captum would set and unset that on others.
        leaves = tuple(x.detach().clone().requires_grad_() for x in call.inputs)
        maps = probe(leaves, derive(call.seed, 0))
        found, expected = ([tuple(m.shape) for m in each] for each in (maps, leaves))
        if found != expected:
            raise refusal(
                ValueError,
                "`explainer`",
                f"attributions of the shapes {expected} of the inputs",
                str(found),
                "Use an explainer of the inputs rather than of a layer.",
            )
        return flat_rows(maps)

    def _log_probabilities(
        self, model: Any, call: Call, rows: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Run a model at rows of features, shape (..., examples, features)."""
        call = replace(call, forward_func=model)
        logits = logits_of(call.outputs(points_of(rows, call.inputs)))
        return F.log_softmax(logits / temperature, 1).reshape(*rows.shape[:-1], -1)


class SaliencyGuided(Regularizer):
    r"""SGT: predictions that stay when the features of least saliency are replaced by noise.

    .. math:: \mathrm{KL}\left(\mathrm{softmax} f(x) \,\Vert\, \mathrm{softmax} f(\tilde x)\right)

    (Ismail et al. 2021), where :math:`\tilde x` has the features whose gradient of the target
    output is smallest replaced by numbers uniform between the smallest and largest entry of the
    example. Both predictions are trained; only first derivatives are taken. The paper adds it to
    the cross entropy with weight 1.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        fraction: Share of the features that is replaced, in (0, 1]; .5 in the paper.
        abs: Rank by absolute gradients; the public code ranks signed ones unless told otherwise,
            and so replaces the features that speak most against the class.
        options: ``reduction``, ``smooth``, ``batch_norm``, ``name`` of :class:`Term`.

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
        **options: Unpack[TermOptions],
    ) -> None:
        super().__init__(forward_func, **options)
        self.fraction, self.abs = check_fraction("fraction", fraction), abs

    def _scores(self, call: Call) -> Tensor:
        pairs = zip(call.inputs, self._masked(call), strict=True)
        points = tuple(map(torch.cat, pairs))
        here, there = F.log_softmax(logits_of(call.outputs(points)), 1).chunk(2)
        return F.kl_div(there, here, reduction="none", log_target=True).sum(1)

    def _masked(self, call: Call) -> Tensors:
        """Replace the least salient features, all tensors of an example ranked together."""
        with torch.no_grad():
            saliency = flat_rows(self._input_gradients(call, call.inputs))
        saliency = saliency.abs() if self.abs else saliency
        least = max(1, round(self.fraction * saliency.shape[1]))
        chosen = saliency.topk(least, dim=1, largest=False).indices
        mask = torch.zeros_like(saliency, dtype=torch.bool).scatter(1, chosen, True)
        masked = []
        masks = mask.split([x[0].numel() for x in call.inputs], 1)
        for x, own in zip(call.inputs, masks, strict=True):
            rows = x.flatten(1)
            low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
            noise = low + (high - low) * torch.rand_like(rows)
            masked.append(torch.where(own, noise, rows).reshape(x.shape))
        return tuple(masked)
