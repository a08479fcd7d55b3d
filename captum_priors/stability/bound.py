r"""How far an explanation can be moved at most (Dombrowski et al. 2019, 2022)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_priors._captum import as_tuple, forward_args
from captum_priors._checks import check_floating, check_inputs, check_target, count
from captum_priors._errors import NotDifferentiableError, one_of, refusal
from captum_priors._rows import Rows, selected
from captum_priors._types import TensorOrTuple
from captum_priors.attacks.ball import Tensors, broadcast
from captum_priors.engine import AttributionPass, input_gradients
from captum_priors.engine.modules import current_beta
from captum_priors.stability.base import flat_rows, points_of
from captum_priors.stability.hessian import hessian_vector_product, rademacher
from captum_priors.stability.smooth import smooth_activations

Norm = Literal["spectral", "frobenius"]


def manipulability_bound(
    forward_func: Any,
    inputs: TensorOrTuple,
    perturbed: TensorOrTuple,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    form: Literal["product", "path"] = "product",
    norm: Norm = "spectral",
    n_steps: int = 20,
    n_samples: int | None = None,
) -> Tensor:
    r"""Bound how far the gradient of an output moves between two inputs.

    .. math:: \lVert\nabla f(\tilde x) - \nabla f(x)\rVert_2 \le
        \lVert\tilde x - x\rVert_2 \max_z \lVert\nabla^2 f(z)\rVert

    with the Hessian norm bounded in one of two ways (Dombrowski et al. 2019, 2022). The
    *product* form holds for all :math:`z`: a chain of linear maps :math:`W_l` and Softplus
    functions has :math:`0 \le \sigma' \le 1` and :math:`0 \le \sigma'' \le \beta / 4`, so

    .. math:: \lVert\nabla^2 f\rVert_F \le \frac\beta4 \sum_{l<L} \prod_{k \le l}
        \lVert W_k\rVert^2 \prod_{k > l} \lVert W_k\rVert,

    for spectral norms, and thus for Frobenius norms, which the paper has. It is a guarantee, and
    loose. The *path* form takes the largest Hessian norm at ``n_steps`` points of the straight line
    between the inputs, the shortest curve there is: much smaller, but an estimate, as the
    maximum over a curve that is sampled.

    The bound is for gradients as they are; a normalised map moves by as much relative to its size.
    The product form is the same for all ``perturbed`` at one distance, hence a bound for the ball.

    Args:
        forward_func: The model; for the product form an ``nn.Sequential`` (of others) of linear,
            convolutional, average-pooling and flattening layers, BatchNorm with its stored
            statistics, and smooth activations (Softplus, Tanh, Sigmoid), or
            :class:`smooth_activations` of one with ReLU. Any model for the path form.
        inputs: :math:`x`.
        perturbed: :math:`\tilde x`, of the same shapes.
        target: The output that is explained.
        additional_forward_args: As in Captum; for the path form.
        form: ``"product"`` or ``"path"``.
        norm: ``"spectral"``, tighter, or ``"frobenius"``, the paper's.
        n_steps: Points of the path, ends included; at least 2.
        n_samples: In the path form, estimate the Frobenius norm from so many random vectors rather
            than taking ``norm`` of the whole Hessian, a product for each input feature.

    Returns:
        The bound for each example, shape ``(batch,)``, without a graph.

    Raises:
        NotDifferentiableError: If the model has no bounded Hessian, or the gradient moves by
            more than the path form allows: it has kinks, or the path too few points.
        ValueError: If an argument has no such value, or ``perturbed`` another shape.

    Example:
        >>> import torch
        >>> from captum_priors.stability import manipulability_bound
        >>> wave = lambda x: torch.sin(2 * x).sum(1)
        >>> x = torch.zeros(1, 1)
        >>> bound = manipulability_bound(wave, x, x + 0.1, form="path")
        >>> moved = 2 - 2 * torch.cos(torch.tensor(0.2))
        >>> bool(moved < bound < 0.4)  # |f''| = 4 sin(2x) < 4
        True
    """
    one_of("form", form, ("product", "path"))
    one_of("norm", norm, ("spectral", "frobenius"))
    count("n_steps", n_steps, least=2)
    check_inputs(inputs)
    start = tuple(t.detach() for t in as_tuple(inputs))
    check_floating(start)
    check_target(target, len(start[0]), several=False)
    pairs = zip(as_tuple(perturbed), start, strict=True)
    end = tuple(broadcast("`perturbed`", b, a).detach() for b, a in pairs)
    distance = (flat_rows(end) - flat_rows(start)).norm(dim=1)
    args = forward_args(additional_forward_args)
    with AttributionPass(forward_func):
        if form == "product":
            with torch.no_grad():
                bound: Tensor = distance * _product(forward_func, (*start, *args), target, norm)
            return bound.to(distance)
        rows = Rows(forward_func, target, args, len(distance))
        with torch.enable_grad():
            return _along_path(rows, start, end, distance, norm, n_steps, n_samples)


# ---- The path form -------------------------------------------------------------------------


def _along_path(
    rows: Rows,
    start: Tensors,
    end: Tensors,
    distance: Tensor,
    norm: Norm,
    n_steps: int,
    n_samples: int | None,
) -> Tensor:
    largest, ends = torch.zeros_like(distance), []
    for alpha in torch.linspace(0, 1, n_steps).tolist():
        pairs = zip(start, end, strict=True)
        points = tuple(torch.lerp(a, b, alpha).requires_grad_() for a, b in pairs)
        gradients = input_gradients(rows, points)
        largest = torch.maximum(largest, _hessian_norms(gradients, points, norm, n_samples))
        if alpha in (0, 1):
            ends.append(flat_rows(gradients).detach())
    bound, moved = distance * largest, (ends[1] - ends[0]).norm(dim=1)
    # Rounding of the gradients, of which two are subtracted.
    slack = 100 * torch.finfo(moved.dtype).eps * (ends[1].norm(dim=1) + ends[0].norm(dim=1))
    if bool((moved > bound + slack).any()):
        raise refusal(
            NotDifferentiableError,
            "form='path'",
            "a gradient that moves by no more than the sampled Hessians allow",
            f"one that moves by {float((moved / bound).amax()):.3g} times that",
            "A network with ReLU or max-pooling has no bound: smooth it with "
            "smooth_activations. Otherwise raise n_steps or n_samples.",
        )
    return bound


def _hessian_norms(
    gradients: Tensors, points: Tensors, norm: Norm, n_samples: int | None
) -> Tensor:
    """Norm of the Hessian of each example, from its products with unit or random vectors."""
    rows = flat_rows(points).detach()
    if n_samples is None:
        units = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        vectors = (points_of(unit.expand_as(rows), points) for unit in units)
    else:
        vectors = (rademacher(points) for _ in range(count("n_samples", n_samples)))
    products = (hessian_vector_product(gradients, points, v, create_graph=False) for v in vectors)
    columns = torch.stack([flat_rows(product) for product in products], 1)
    if n_samples is None:
        return _matrix_norm(columns, norm)
    return columns.square().sum(2).mean(1).sqrt()


def _matrix_norm(matrices: Tensor, norm: Norm) -> Tensor:
    found: Tensor = torch.linalg.matrix_norm(matrices, 2 if norm == "spectral" else "fro")
    return found


# ---- The product form ----------------------------------------------------------------------

_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AVERAGES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)


def _product(model: Any, inputs: tuple[Any, ...], target: Any, norm: Norm) -> Tensor:
    r"""Bound on the Hessian's norm: of any output, or for each example that of its own.

    With :math:`J_l = \partial z_l / \partial x` and :math:`\delta_l = \partial f / \partial a_l`
    for activations :math:`a_l = \sigma_l(z_l)`,

    .. math:: \nabla^2 f = \sum_l J_l^\top \mathrm{diag}(\delta_l \odot \sigma_l''(z_l)) J_l,
        \qquad \lVert\nabla^2 f\rVert_F \le \sum_l \lVert J_l\rVert_2^2 \max|\sigma_l''|\,
        \lVert\delta_l\rVert_2,

    and both norms are products of those of the layers. The layers run, because hooks may compute
    weights when one is called, as the older ``weight_norm`` does.
    """
    beta = current_beta()
    if isinstance(model, smooth_activations):
        model, beta = model.model, model.beta
    before = curvature = torch.zeros((), device=inputs[0].device)
    slope: Any = 1.0
    for layer in _layers(model):
        outputs = layer(*inputs)
        gain, second = _slope_and_curvature(layer, inputs[0], beta, norm)
        before, curvature = curvature, curvature * gain + slope**2 * second
        slope, inputs = slope * gain, (outputs,)
    if target is not None:
        (weights,) = input_gradients(lambda z: selected(z[0], target), (outputs,))
        weights = weights.flatten(1)
        if isinstance(layer, nn.Linear) and outputs.dim() == 2:  # of its rows, these alone count
            curvature, weights = before, weights @ layer.weight
        curvature = curvature * weights.norm(dim=1)
    return curvature


def _layers(module: Any) -> list[Any]:
    if getattr(type(module), "forward", None) is nn.Sequential.forward:
        return [layer for child in module for layer in _layers(child)]
    return [module]


def _slope_and_curvature(layer: Any, x: Tensor, beta: float | None, norm: Norm) -> tuple[Any, Any]:
    """Bounds on a layer's Jacobian, in the operator norm, and on its second derivatives."""
    if isinstance(layer, _SHAPES):
        return 1.0, 0.0
    if isinstance(layer, nn.Tanh):
        return 1.0, 4 / (3 * math.sqrt(3))
    if isinstance(layer, nn.Sigmoid):
        return 1 / 4, 1 / (6 * math.sqrt(3))
    if isinstance(layer, nn.ReLU) and beta is not None:
        return 1.0, beta / 4
    # Beyond its threshold it is the identity: the slope jumps, by exp(-20) at 20.
    if isinstance(layer, nn.Softplus) and layer.threshold >= 20:
        return 1.0, layer.beta / 4
    if isinstance(layer, nn.Linear):
        return _matrix_norm(layer.weight, norm), 0.0
    if isinstance(layer, _CONVOLUTIONS) and layer.padding_mode in ("zeros", "circular"):
        return _kernel_gain(layer, norm), 0.0
    if isinstance(layer, _BATCH_NORMS) and layer.running_var is not None:
        scale: Tensor = (layer.running_var + layer.eps).rsqrt()
        return (scale if layer.weight is None else scale * layer.weight).abs().max(), 0.0
    if isinstance(layer, _AVERAGES):
        ones = torch.ones_like(x[:1])
        (columns,) = input_gradients(lambda z: layer(*z).flatten(1).sum(1), (ones,))
        return (layer(ones).max() * columns.max()).sqrt(), 0.0  # of its row and column sums
    raise refusal(
        NotDifferentiableError,
        "the product form",
        "an nn.Sequential of linear maps, average-pooling, BatchNorm and smooth activations",
        str(layer),
        "Use form='path', which takes any twice differentiable model; smooth_activations "
        "takes the kinks out of ReLU.",
    )


def _kernel_gain(conv: Any, norm: Norm) -> Tensor:
    r"""Bound on a convolution at any resolution.

    A convolution gathers patches, in which an entry occurs at most :math:`k` times for a kernel of
    :math:`k` positions, and multiplies them by its kernel as a matrix: at most
    :math:`\sqrt k \lVert W\rVert`. Also, the largest row and column sums bound any matrix,
    :math:`\lVert A\rVert_2^2 \le \lVert A\rVert_1 \lVert A\rVert_\infty`; the lesser one counts.
    """
    kernel = conv.weight.flatten(2)
    groups = kernel.reshape(conv.groups, -1, *kernel.shape[1:])
    norms = _matrix_norm(groups.flatten(2), norm)
    gathered: Tensor = kernel.shape[2] ** 0.5 * norms.max()
    if norm == "frobenius":
        return gathered
    rows, columns = groups.abs().sum((2, 3)).max(), groups.abs().sum((1, 3)).max()
    return torch.minimum(gathered, (rows * columns).sqrt())
