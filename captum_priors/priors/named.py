"""The papers' priors under the papers' names: each an explainer and a penalty.

All take the model (``forward_func``), ``differentiation`` as in :class:`ExpectedGradients`, and
further options as in :class:`AttributionPrior`. Those of expected gradients draw ``n_samples``
references for each example and step.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, LayerGradCam, Saliency
from torch import Tensor, nn

from captum_priors._captum import logits_of, select_error
from captum_priors._checks import check_forward_func, check_module
from captum_priors._errors import refusal
from captum_priors._rows import check_selects
from captum_priors._shown import same, shown_value
from captum_priors._types import Differentiation, OutputTarget
from captum_priors.adapters import differentiable
from captum_priors.attr import ExpectedGradients
from captum_priors.penalties import (
    GraphLaplacian,
    alignment,
    energy_outside,
    gini,
    outside,
    total_variation,
)
from captum_priors.penalties.annotation import resized
from captum_priors.priors.attribution import AttributionPrior
from captum_priors.priors.base import Call


class _Named(AttributionPrior):
    """A prior whose explainer, penalty and form of the maps its name says."""

    _penalty: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        explainer: Any,
        *,
        differentiation: Differentiation = "double_backprop",
        **options: Any,
    ) -> None:
        explainer = differentiable(explainer, differentiation=differentiation)
        super().__init__(explainer, self._penalty, **options)

    def _described(self) -> list[str]:
        own = inspect.signature(type(self).__init__).parameters
        options = [
            f"{name}={shown_value(value)}"
            for name, value in self.options.items()
            if name not in ("abs", "relu_attributions")
            and not (name in own and same(value, own[name].default))
        ]
        way = self._way()
        return options if way == "double_backprop" else [*options, f"differentiation={way!r}"]


class _OfExpectedGradients(_Named):
    def __init__(self, forward_func: Any, *, n_samples: int = 1, **options: Any) -> None:
        super().__init__(ExpectedGradients(forward_func), n_samples=n_samples, **options)


class PixelPrior(_OfExpectedGradients):
    r"""Smooth attribution maps: expected gradients with one reference, total variation.

    (Erion et al. 2021, pixel prior. They alternate two Adam optimisers, so their :math:`\lambda`
    does not transfer to a sum of losses.)

    Example:
        >>> import torch
        >>> from captum_priors.penalties import total_variation
        >>> from captum_priors.priors import PixelPrior
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, prior = torch.randn(5, 1, 4, 4), PixelPrior(model, baselines=torch.zeros(1, 1, 4, 4))
        >>> maps = model[1].weight[0].reshape(1, 4, 4) * x  # of a linear model
        >>> torch.allclose(prior(x, target=0), total_variation(maps).mean(), rtol=1e-4)
        True
    """

    _penalty = staticmethod(total_variation)


class SparsityPrior(_OfExpectedGradients):
    r"""Few features that matter: expected gradients, minus the Gini coefficient.

    (Erion et al. 2021, sparsity prior.)

    Example:
        >>> import torch
        >>> from captum_priors.penalties import gini
        >>> from captum_priors.priors import SparsityPrior
        >>> model, x = torch.nn.Linear(4, 1), torch.randn(9, 4)
        >>> prior = SparsityPrior(model, baselines=torch.zeros(1, 4))
        >>> torch.allclose(prior(x), gini(model.weight * x), atol=1e-5)
        True
    """

    _penalty = staticmethod(gini)


class GraphPrior(_Named):
    r"""Similar importance for features that a graph joins: expected gradients, Laplacian.

    (Erion et al. 2021, graph prior; 10 references in their experiment.) ``adjacency`` is that of
    :class:`captum_priors.penalties.GraphLaplacian`.

    Example:
        >>> import torch
        >>> from captum_priors.priors import GraphPrior
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
        >>> no_edges = torch.zeros(3, 3)
        >>> GraphPrior(model, no_edges, baselines=x)(x).item()
        0.0
    """

    def __init__(
        self, forward_func: Any, adjacency: Tensor, *, n_samples: int = 10, **options: Any
    ) -> None:
        self.__dict__["_penalty"] = GraphLaplacian(adjacency)  # nn.Module is not set up yet
        super().__init__(ExpectedGradients(forward_func), n_samples=n_samples, **options)


@dataclass(frozen=True, eq=False)
class _Given(OutputTarget):
    """The target of a call as one of its arguments: it is not what is explained."""

    target: Any

    def check(self, n_examples: int) -> None:
        """Nothing is left to check without the outputs."""

    def mapped(self, function: Callable[[Any], Any]) -> "_Given":
        """Apply a function to what has an entry for each example."""
        one = isinstance(self.target, tuple)
        return self if one else _Given(function(self.target))

    def select(self, outputs: Tensor) -> None:
        """Require one of the outputs."""
        check_selects(outputs, self.target)


class _SumOfLogProbabilities:
    def __init__(self, forward_func: Any) -> None:
        self.forward_func = forward_func

    def __call__(self, *args: Any) -> Tensor:
        given = args[-1] if isinstance(args[-1], _Given) else None
        logits = logits_of(self.forward_func(*(args if given is None else args[:-1])))
        if not isinstance(logits, Tensor):
            raise select_error(logits, None)
        if logits.dim() < 2 or logits.shape[1] < 2 or logits.shape[0] != args[0].shape[0]:
            raise refusal(
                ValueError,
                "`forward_func`",
                "logits of at least two classes, shape (batch, classes)",
                f"shape {tuple(logits.shape)}",
                "Return torch.stack([zeros, logit], 1) for a binary model with one logit.",
            )
        if given is not None:
            given.select(logits)
        return F.log_softmax(logits, dim=1).flatten(1).sum(1)


class RightForTheRightReasons(_Named):
    r"""No gradient where the annotation does not allow it.

    .. math:: \sum_i \Big((1 - M_i)\, \frac{\partial}{\partial x_i} \sum_k \log p_k(x)\Big)^2

    of a model that returns logits (Ross, Hughes, Doshi-Velez 2017; their mask is
    :math:`A = 1 - M`, and they sum over examples: divide their weight by the batch size, or pass
    ``reduction="sum"``). All classes take part, so ``target`` is checked and not used.

    Example:
        >>> import torch
        >>> from captum_priors.priors import RightForTheRightReasons
        >>> prior = RightForTheRightReasons(torch.nn.Linear(3, 2))
        >>> x = torch.randn(5, 3)
        >>> prior(x, annotation=torch.ones(5, 3)).item()  # everything is allowed
        0.0
    """

    _penalty = staticmethod(outside)

    def __init__(self, forward_func: Any, **options: Any) -> None:
        check_forward_func(forward_func)
        super().__init__(Saliency(_SumOfLogProbabilities(forward_func)), abs=False, **options)

    def _scores(self, call: Call) -> Any:
        args = call.args if call.target is None else (*call.args, _Given(call.target))
        return super()._scores(replace(call, target=None, args=args))

    def _scores_of_each(self, call: Call) -> Any:
        return self._scores(call)  # the same for each of them


class EnergyPrior(_Named):
    r"""Positive input × gradient attribution inside the annotation.

    (Rao et al. 2023, energy loss.)

    Example:
        >>> import torch
        >>> from captum_priors.priors import EnergyPrior
        >>> prior, x = EnergyPrior(torch.nn.Linear(3, 1)), torch.randn(5, 3)
        >>> prior(x, annotation=torch.ones(5, 3)).item()
        0.0
    """

    _penalty = staticmethod(energy_outside)

    def __init__(self, forward_func: Any, **options: Any) -> None:
        check_forward_func(forward_func)
        super().__init__(InputXGradient(forward_func), **options)


class _OfGradCAM(_Named):
    """A prior on Grad-CAM of a layer (Selvaraju et al. 2017)."""

    def __init__(self, forward_func: Any, layer: nn.Module, **options: Any) -> None:
        check_forward_func(forward_func)
        check_module("layer", layer)
        super().__init__(LayerGradCam(forward_func, layer), relu_attributions=True, **options)


def _scaled(cam: Tensor) -> Tensor:
    """Scale each map to a maximum of 1; a map of zeros stays one."""
    if cam.dim() < 3:
        raise refusal(
            ValueError,
            "`layer`",
            "a layer that returns one tensor (batch, channels, ...)",
            f"maps of shape {tuple(cam.shape)}",
            "Pass a convolutional layer.",
        )
    top = cam.flatten(1).amax(1).reshape(-1, *[1] * (cam.dim() - 1))
    counts = top > torch.finfo(cam.dtype).tiny ** 0.5
    return torch.where(counts, cam, 0) / torch.where(counts, top, 1)


def _like_annotation(cam: Tensor, *, annotation: Tensor) -> Tensor:
    maps = _scaled(cam)
    return alignment(maps, annotation=resized(maps, annotation, "finite"), measure="mse")


def _outside_annotation(cam: Tensor, *, annotation: Tensor) -> Tensor:
    maps = _scaled(cam)
    return outside(maps, annotation=resized(maps, annotation, "mask"))


class HINT(_OfGradCAM):
    r"""Grad-CAM maps of a convolutional ``layer`` like a person's importance map.

    The mean squared difference between the map, scaled to a maximum of 1, and the annotation at
    the layer's resolution, and the mean of its channels: the form that Friedrich et al. 2023 use
    for HINT. The ranking loss of the original (Selvaraju et al. 2019) is not implemented.

    Example:
        >>> import torch
        >>> from captum.attr import LayerGradCam
        >>> from captum_priors.priors import HINT
        >>> conv = torch.nn.Conv2d(1, 2, 3)
        >>> model = torch.nn.Sequential(conv, torch.nn.Flatten(), torch.nn.Linear(72, 3))
        >>> x = torch.randn(4, 1, 8, 8)
        >>> cam = LayerGradCam(model, conv).attribute(x, target=0, relu_attributions=True)
        >>> cam = cam / cam.amax((1, 2, 3), keepdim=True).clamp_min(1e-9)
        >>> HINT(model, conv)(x, target=0, annotation=cam.detach()).item() < 1e-9
        True
    """

    _penalty = staticmethod(_like_annotation)


class RRRGradCAM(_OfGradCAM):
    r"""No Grad-CAM attribution of a convolutional ``layer`` where the annotation forbids it.

    .. math:: \sum_i \left((1 - M_i)\, \mathrm{CAM}_i / \max_j \mathrm{CAM}_j\right)^2

    with the annotation at the layer's resolution, and the mean of its channels (Schramowski et al.
    2020).

    Example:
        >>> import torch
        >>> from captum_priors.priors import RRRGradCAM
        >>> conv = torch.nn.Conv2d(1, 2, 3)
        >>> model = torch.nn.Sequential(conv, torch.nn.Flatten(), torch.nn.Linear(72, 3))
        >>> x = torch.randn(4, 1, 8, 8)
        >>> RRRGradCAM(model, conv)(x, target=0, annotation=torch.ones(4, 1, 8, 8)).item()
        0.0
    """

    _penalty = staticmethod(_outside_annotation)
