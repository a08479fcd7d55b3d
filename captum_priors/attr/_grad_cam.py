"""Grad-CAM with its graph, for the priors that are defined on it."""

from typing import Any

from torch import Tensor, nn

from captum_priors._captum import as_tuple, forward_args, run_forward, run_repeated
from captum_priors._checks import check_forward_func
from captum_priors._engine import Visit, input_gradients, keep_graph, recompute
from captum_priors._engine._first_order import marks_start
from captum_priors._engine._layers import only_activation, recorded, replaced
from captum_priors._engine._mismatch import names_mismatch
from captum_priors._errors import expected_found, one_of
from captum_priors._rows import tile
from captum_priors._types import DIFFERENTIATIONS, Differentiation, TensorOrTuple


class GradCam:
    r"""Rectified channel sum of a layer's activation, weighted by mean gradients.

    .. math:: \left(\sum_c \alpha_c A_c\right)^+, \qquad
        \alpha_c = \mathrm{mean}_{ij}\, \partial f / \partial A_{cij}

    (Selvaraju et al. 2017), as :class:`captum.attr.LayerGradCam` with ``relu_attributions=True``.
    """

    def __init__(
        self, forward_func: Any, layer: nn.Module, *, differentiation: Differentiation
    ) -> None:
        if not isinstance(layer, nn.Module):
            raise TypeError(
                expected_found(
                    "`layer`", "a torch.nn.Module", type(layer).__name__, "Pass model.some_layer."
                )
            )
        check_forward_func(forward_func)
        one_of("differentiation", differentiation, DIFFERENTIATIONS)
        self.forward_func, self.layer = forward_func, layer
        self.differentiation: Differentiation = differentiation

    @names_mismatch
    @marks_start
    def attribute(
        self, inputs: TensorOrTuple, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        """Return the map ``(batch, 1, height, width)`` at the layer's resolution."""
        tensors, args = as_tuple(inputs), forward_args(additional_forward_args)
        n = tensors[0].shape[0]
        with recorded(self.layer) as seen:
            run_forward(self.forward_func, tensors, None, args)
        activations = only_activation(seen)
        if len(activations) != 1 or activations[0].dim() < 3:
            raise ValueError(
                expected_found(
                    "`layer`",
                    "a layer that returns one tensor (batch, channels, ...)",
                    ", ".join(str(tuple(a.shape)) for a in activations),
                    "Pass a convolutional layer.",
                )
            )

        def field(points: tuple[Tensor, ...]) -> Tensor:
            repeated = tuple(tile(x, points[0].shape[0] // n, n) for x in tensors)
            with replaced(self.layer, points, to_input=False):
                return run_repeated(self.forward_func, repeated, target, args, n)

        def program(arguments: tuple[Tensor, ...], visit: Visit) -> tuple[Tensor, ...]:
            way = "double_backprop" if self.differentiation == "recompute" else self.differentiation
            (gradient,) = input_gradients(field, arguments, way)
            weights = gradient.mean(tuple(range(2, gradient.dim())), keepdim=True)
            return visit(((weights * arguments[0]).sum(1, keepdim=True).relu(),))

        if self.differentiation == "recompute":
            maps = recompute(program, activations, forward_func=field)
        else:
            maps = program(activations, keep_graph)
        return maps[0]
