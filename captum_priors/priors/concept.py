"""The concept prior: outputs that do not change along a concept's direction in a layer."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from captum_priors._checks import check_forward_func, check_module
from captum_priors._errors import one_of, refusal, type_of
from captum_priors._rows import tile
from captum_priors._types import DIFFERENTIATIONS, Differentiation
from captum_priors.attr.layers import Layer
from captum_priors.concepts import over_places
from captum_priors.engine import derive, input_gradients, recompute
from captum_priors.penalties.maths import cosine_distance
from captum_priors.priors.base import Call
from captum_priors.priors.terms import TermOptions, Unannotated

Form = Literal["abs", "square", "cosine"]
Chosen = Literal["max", "all", "random"]
Tensors = tuple[Tensor, ...]


class ConceptPrior(Unannotated):
    r"""Penalise how much the output changes when a concept is added to a layer's activation.

    .. math:: \left|\langle \nabla_a f(a(x)),\, c\rangle\right|

    with the activation :math:`a` of a layer and a concept vector :math:`c` (RR-ClArC, Dreyer et al.
    2024), such as :func:`captum_priors.concepts.fit` finds: a shortcut that is known by examples
    and has no mask. Where the activation is a map and the concept has a number for each channel,
    the gradient is averaged over places first (the default of the authors' later code).

    The concept is that of the layer when it was found. The authors train only what comes after the
    layer; where what comes before is trained too, find it anew from time to time (``concept`` is a
    buffer, to be assigned). A call costs two forward passes, and a backward pass from the output to
    the layer.

    Args:
        forward_func: The model, whose outputs are logits in the paper.
        layer: A module that runs once in each forward pass and returns one tensor.
        concept: :math:`c`, of the shape of one activation (or flat), or one number for each channel
            of a map.
        target: Which output :math:`f` is: None, that of the call; or of all outputs the ``"max"``,
            the sum (``"all"``), or a sum with ``"random"`` signs, drawn for each example and step.
            These do not look at the target of the call. Softmax does not see the sum, which may
            stay the same along a concept that decides between classes: random signs find that.
        form: ``"abs"``, as above; its ``"square"``; or the absolute ``"cosine"`` of the two.
        channel_dim: The axis of the channels of a map: 1, or -1 for tokens.
        differentiation: As in :class:`ExpectedGradients`.
        options: ``reduction``, ``smooth``, ``batch_norm``, ``name`` of :class:`Term`.

    Raises:
        TypeError: If the layer is no module, or returns other than one tensor.
        ValueError: If the concept does not fit the activations, or an option is not one of those
            above.

    Example:
        >>> import torch
        >>> from captum_priors.priors import ConceptPrior
        >>> body, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        >>> concept = torch.tensor([0.6, 0.0, -0.8, 0.0])
        >>> prior = ConceptPrior(torch.nn.Sequential(body, head), body, concept)
        >>> value = prior(torch.randn(5, 3), target=1)
        >>> torch.allclose(value, (head.weight[1] @ concept).abs())
        True
    """

    concept: Tensor
    layer: nn.Module

    def __init__(
        self,
        forward_func: Any,
        layer: nn.Module,
        concept: Tensor,
        *,
        target: Chosen | None = None,
        form: Form = "abs",
        channel_dim: int = 1,
        differentiation: Differentiation = "double_backprop",
        **options: Unpack[TermOptions],
    ) -> None:
        check_forward_func(forward_func)
        check_module("layer", layer)
        _check_concept(concept)
        if target is not None:
            one_of("target", target, get_args(Chosen))
        one_of("form", form, get_args(Form))
        one_of("differentiation", differentiation, DIFFERENTIATIONS)
        super().__init__(forward_func, **options)
        self.target, self.form, self.channel_dim = target, form, channel_dim
        self.differentiation = differentiation
        self.replayed = differentiation != "double_backprop"
        self.__dict__["layer"] = layer  # past nn.Module's registration, as the model
        self.register_buffer("concept", concept.detach().clone())

    def _scores(self, call: Call) -> Tensor:
        if self.differentiation == "finite_difference":  # both sides in one batch
            call.refuse_coupled()  # now, because it would run with the layer replaced
        layer = Layer(call.forward_func, self.layer)
        activations, times = layer.activations(call.inputs, call.args)
        if len(activations) != 1:
            raise refusal(
                TypeError,
                "`layer`",
                "a layer that runs once in each forward pass and returns one tensor",
                f"{len(activations)}",
                "Choose the layer before or behind it.",
            )

        def field(points: Tensors) -> Tensor:
            repeats = len(points[0]) // call.n
            around = tuple(tile(x, repeats, call.n) for x in call.inputs)
            values = tuple(p.flatten(0, 1) for p in points) if times > 1 else points
            with layer.replaced(values):
                return self._explained_output(call, around)

        gradient = self._gradient(field, activations, call)
        rows = gradient.flatten(0, 1) if times > 1 else gradient
        return self._along(self._pooled(rows).reshape(call.n, times, -1).mean(1))

    def _gradient(self, field: Any, activations: Tensors, call: Call) -> Tensor:
        if self.differentiation != "recompute":
            return input_gradients(field, activations, self.differentiation)[0]
        once = recompute(
            lambda given, visit: visit(input_gradients(field, given)),
            activations,
            forward_func=call.forward_func,
        )
        return once[0]

    def _explained_output(self, call: Call, points: Tensors) -> Tensor:
        if self.target is None:
            return call.output(points)
        outputs = call.outputs(points)
        if self.target == "max":
            return outputs.amax(1)
        return (outputs if self.target == "all" else outputs * self._signs(outputs, call)).sum(1)

    def _signs(self, outputs: Tensor, call: Call) -> Tensor:
        """Signs of the outputs of each example, the same at every evaluation of a call."""
        generator = torch.Generator().manual_seed(derive(call.seed, 0))
        signs = 2 * torch.randint(2, (call.n, outputs.shape[1]), generator=generator) - 1
        return signs.repeat(len(outputs) // call.n, 1).to(outputs)

    def _along(self, gradient: Tensor) -> Tensor:
        concept = self.concept.to(gradient).flatten()
        if self.form == "cosine":
            return (1 - cosine_distance(gradient, concept.expand_as(gradient))).abs()
        along = (gradient * concept).sum(1)  # which autocast leaves in single precision
        return along.abs() if self.form == "abs" else along.square()

    def _pooled(self, gradient: Tensor) -> Tensor:
        """Gradients as rows of the concept's numbers."""
        shape, concept = gradient.shape[1:], self.concept.shape
        if gradient.dtype in (torch.float16, torch.bfloat16):
            gradient = gradient.float()
        if concept in (shape, (shape.numel(),)):
            return gradient.flatten(1)
        axis, n = self.channel_dim, gradient.dim()
        if n < 3 or not -n <= axis < n or concept != gradient.shape[axis : axis + 1 or None]:
            raise refusal(
                ValueError,
                "`concept`",
                f"the shape of one activation, {tuple(shape)}, or of the channels of a map",
                str(tuple(concept)),
                "Fit it on activations of this layer; channel_dim says which axis has channels.",
            )
        return over_places(gradient, axis)


def _check_concept(concept: Any) -> None:
    found = str(concept.dtype) if isinstance(concept, Tensor) else type_of(concept)
    if isinstance(concept, Tensor) and concept.is_floating_point():
        if concept.isfinite().all() and concept.any():
            return
        found = "others"
    raise refusal(
        ValueError if found == "others" else TypeError,
        "`concept`",
        "a tensor of finite floating-point numbers that are not all zero",
        found,
        "Pass what captum_priors.concepts.fit or from_captum returns.",
    )
