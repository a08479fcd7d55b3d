r"""How far an explanation can be moved at most (Dombrowski et al. 2019, 2022)."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from captum_priors._captum import as_tuple, forward_args
from captum_priors._checks import check_floating, check_inputs, check_target, count
from captum_priors._errors import NotDifferentiableError, expected_found, one_of
from captum_priors._rows import Rows, selected
from captum_priors._types import TensorOrTuple
from captum_priors.engine import AttributionPass, check_rows, input_gradients
from captum_priors.engine.model import current_beta
from captum_priors.stability.base import Tensors, flat_rows, optional, square_norms
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
        forward_func: The model; for the product form a module, a chain of linear,
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
        n_samples: Path form with the Frobenius norm: estimate it from so many random vectors rather
            than from one for each input feature.

    Returns:
        The bound for each example, shape ``(batch,)``, without a graph.

    Raises:
        NotDifferentiableError: If the model has no bounded Hessian, or the gradient moves by
            more than the path form allows: it has kinks, or the path too few points.
        ValueError: If an argument does not fit the others.

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
    optional(count)("n_samples", n_samples)
    check_inputs(inputs)
    start, end = (tuple(t.detach() for t in ends) for ends in _ends(inputs, perturbed))
    check_floating(start)
    check_target(target, start[0].shape[0])
    args = forward_args(additional_forward_args)
    if n_samples is not None and (form, norm) != ("path", "frobenius"):
        raise ValueError(
            expected_found(
                "`n_samples`",
                "None, except with form='path' and norm='frobenius'",
                repr(n_samples),
                "Random vectors estimate the Frobenius norm of a Hessian.",
            )
        )
    if form == "product" and (len(start) > 1 or args):
        raise ValueError(
            expected_found(
                "`inputs`",
                "one tensor, and no additional arguments, for the product form",
                f"{len(start)} and {len(args)}",
                "Use form='path'.",
            )
        )
    distance = square_norms(tuple(b - a for a, b in zip(start, end, strict=True))).sqrt()
    with AttributionPass(forward_func):
        if form == "product":
            with torch.no_grad():
                curvature: Tensor = _curvature(forward_func, start[0], target, norm)
                return distance * curvature.to(distance)
        rows = Rows(forward_func, target, args, len(distance))
        with torch.enable_grad():
            return _along_path(rows, start, end, distance, norm, n_steps, n_samples)


def _ends(inputs: TensorOrTuple, perturbed: Any) -> tuple[Tensors, Tensors]:
    check_inputs(perturbed)
    start, end = as_tuple(inputs), as_tuple(perturbed)
    shapes = [tuple(t.shape) for t in start]
    if [tuple(t.shape) for t in end] != shapes:
        raise ValueError(
            expected_found(
                "`perturbed`",
                f"shapes {shapes} as of the inputs",
                str([tuple(t.shape) for t in end]),
                "Pass what the attack made of the inputs.",
            )
        )
    return start, tuple(b.to(a) for a, b in zip(start, end, strict=True))


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
        raise NotDifferentiableError(
            expected_found(
                "form='path'",
                "a gradient that moves by no more than the sampled Hessians allow",
                f"one that moves by {float((moved / bound).amax()):.3g} times that",
                "A network with ReLU or max-pooling has no bound: smooth it with "
                "smooth_activations. Otherwise raise n_steps or n_samples.",
            )
        )
    return bound


def _hessian_norms(
    gradients: Tensors, points: Tensors, norm: Norm, n_samples: int | None
) -> Tensor:
    """Norm of the Hessian of each example."""

    def product(vectors: Tensors) -> Tensor:
        return flat_rows(hessian_vector_product(gradients, points, vectors, create_graph=False))

    if n_samples is not None:
        squares = [product(rademacher(points)).square().sum(1) for _ in range(n_samples)]
        return torch.stack(squares).mean(0).sqrt()
    columns = []
    for which, point in enumerate(points):
        for feature in range(point[0].numel()):
            unit = tuple(torch.zeros_like(p, requires_grad=False) for p in points)
            unit[which].view(len(point), -1)[:, feature] = 1
            columns.append(product(unit))
    hessians = torch.stack(columns, 1)
    found: Tensor = torch.linalg.matrix_norm(hessians, _ORDERS[norm])
    return found


# ---- The product form ----------------------------------------------------------------------

Curve = tuple[float, float]
"""Largest slope and largest second derivative of an activation function."""

_ORDERS: dict[Norm, Any] = {"spectral": 2, "frobenius": "fro"}
_TANH: Curve = (1.0, 4 / (3 * math.sqrt(3)))
_SIGMOID: Curve = (1 / 4, 1 / (6 * math.sqrt(3)))
# Modules by their class, functions, and methods by their name.
_CURVES: dict[Any, Curve] = {
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh, "tanh"), _TANH),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), _SIGMOID),
}
_RELUS = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
_SHAPES = (
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze),
    *("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous"),
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MEANS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def _curvature(model: Any, x: Tensor, target: Any, norm: Norm) -> Tensor:
    """Bound on the Hessian's norm: of any output, of one, or for each example that of its own."""
    beta = current_beta()
    if isinstance(model, smooth_activations):
        model, beta = model.model, model.beta
    if not isinstance(model, nn.Module):
        raise NotDifferentiableError(_refusal(f"a {type(model).__name__}, no module"))
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the model's own code makes of symbols
        raise NotDifferentiableError(_refusal(f"one that cannot be traced ({error})")) from error
    chain = _Chain(model, graph, beta, norm)
    outputs = chain.run(x)
    if target is not None:
        check_rows(selected(outputs, target), len(x))
    return chain.bound(target if outputs.dim() == 2 else None)


class _Chain(fx.Interpreter):
    r"""Runs an example through a chain of layers, and multiplies the norms of those so far.

    With :math:`J_l = \partial z_l / \partial x` and :math:`\delta_l = \partial f / \partial a_l`
    for activations :math:`a_l = \sigma_l(z_l)`,

    .. math:: \nabla^2 f = \sum_l J_l^\top \mathrm{diag}(\delta_l \odot \sigma_l''(z_l)) J_l,
        \qquad \lVert\nabla^2 f\rVert_F \le \sum_l \lVert J_l\rVert_2^2 \max|\sigma_l''|\,
        \lVert\delta_l\rVert_2,

    and both norms are products of those of the layers. It is run because hooks may compute weights
    when a layer is called, as the older ``weight_norm`` does.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, beta: float | None, norm: Norm) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self._beta, self._norm = beta, norm
        self._end: fx.Node | None = None  # the operation whose result is the chain's so far
        self._slope: Any = 1.0  # of all layers so far
        self._terms: list[Any] = []  # of each activation, with the layers since
        self._before = self._terms  # without the last linear map
        self._last: nn.Linear | None = None  # the linear map whose outputs are the chain's

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, which is to take the result of the one before alone."""
        value = super().run_node(n)
        if n.op == "placeholder":
            self._end = self._end or n
        elif isinstance(value, Tensor):  # sizes pass
            if [i for i in n.all_input_nodes if isinstance(self.env[i], Tensor)] != [self._end]:
                raise NotDifferentiableError(_refusal(f"{n.op} {n.target} on something else"))
            if n.op != "output":
                self._add(n)
                self._end = n
        return value

    def _add(self, node: fx.Node) -> None:
        module = self.submodules[str(node.target)] if node.op == "call_module" else None
        kind: Any = node.target if module is None else type(module)
        if kind in _SHAPES or (kind is F.dropout and not _argument(node, 2, "training", True)):
            return  # entries are moved about
        curve = self._curve(node, module, kind)
        if curve is not None:
            slope, second = curve
            self._terms = [*(term * slope for term in self._terms), self._slope**2 * second]
            self._slope = self._slope * slope
            self._last = None
            return
        gain = _gain(
            module, self._norm, found=f"{node.op} {kind}" if module is None else f"{module}"
        )
        self._before, self._terms = self._terms, [term * gain for term in self._terms]
        self._slope = self._slope * gain
        self._last = module if isinstance(module, nn.Linear) else None

    def _curve(self, node: fx.Node, module: Any, kind: Any) -> Curve | None:
        """Slope and second derivative of an activation, None for anything else."""
        if kind in (nn.Softplus, F.softplus):
            beta = module.beta if module else _argument(node, 1, "beta", 1)
            threshold = module.threshold if module else _argument(node, 2, "threshold", 20)
            if threshold < 20:  # beyond which it is the identity: the slope jumps by exp(-20)
                raise NotDifferentiableError(_refusal(f"Softplus with threshold={threshold}"))
            return (1.0, float(beta) / 4)
        if kind in _RELUS:
            if self._beta is None:
                raise NotDifferentiableError(
                    _refusal("ReLU, whose gradient jumps; smooth_activations(model, beta) has one")
                )
            return (1.0, self._beta / 4)
        return _CURVES.get(kind)

    def bound(self, target: Any) -> Tensor:
        """Add up, with only the target's row of the last linear map where there is one."""
        if target is None or isinstance(target, tuple) or self._last is None:
            return torch.as_tensor(sum(self._terms))
        rows: Tensor = self._last.weight.norm(dim=1)
        return torch.as_tensor(sum(self._before)) * rows[torch.as_tensor(target).flatten()]


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _gain(layer: Any, norm: Norm, found: str) -> Any:
    """Bound on the operator norm of a linear layer."""
    if isinstance(layer, nn.Linear):
        return torch.linalg.matrix_norm(layer.weight, _ORDERS[norm])
    if isinstance(layer, _CONVOLUTIONS) and layer.padding_mode in ("zeros", "circular"):
        return _kernel_gain(layer, norm)
    if isinstance(layer, _BATCH_NORMS) and layer.running_var is not None:
        scale: Tensor = (layer.running_var + layer.eps).rsqrt()
        return (scale if layer.weight is None else scale * layer.weight).abs().max()
    if isinstance(layer, _AVERAGES) and not (
        layer.ceil_mode
        or getattr(layer, "divisor_override", None)
        or not getattr(layer, "count_include_pad", True)
    ):
        return _average_gain(layer)
    if isinstance(layer, _MEANS) and layer.output_size in (1, (1,), (1, 1), (1, 1, 1)):
        return 1.0  # of the mean: one over the root of its number of entries
    raise NotDifferentiableError(_refusal(found))


def _kernel_gain(conv: Any, norm: Norm) -> Tensor:
    r"""Bound on a convolution at any resolution.

    A convolution gathers patches, in which an entry occurs at most :math:`k` times for a kernel of
    :math:`k` positions, and multiplies them by its kernel as a matrix: at most
    :math:`\sqrt k \lVert W\rVert`. Also, the largest row and column sums bound any matrix,
    :math:`\lVert A\rVert_2^2 \le \lVert A\rVert_1 \lVert A\rVert_\infty`; the lesser one counts.
    """
    kernel = conv.weight.flatten(2)
    groups = kernel.reshape(conv.groups, -1, *kernel.shape[1:])
    norms = torch.linalg.matrix_norm(groups.flatten(2), _ORDERS[norm])
    gathered: Tensor = kernel.shape[2] ** 0.5 * norms.max()
    if norm == "frobenius":
        return gathered
    rows, columns = groups.abs().sum((2, 3)).max(), groups.abs().sum((1, 3)).max()
    return torch.minimum(gathered, (rows * columns).sqrt())


def _average_gain(pool: Any) -> float:
    """Row sums of 1; an entry counts 1/k in at most ceil(size / stride) windows a dimension."""
    rank = _AVERAGES.index(type(pool)) + 1
    sizes, strides = (
        (v,) * rank if isinstance(v, int) else v for v in (pool.kernel_size, pool.stride)
    )
    windows = zip(sizes, strides, strict=True)
    return math.sqrt(math.prod(math.ceil(size / stride) / size for size, stride in windows))


def _refusal(found: str) -> str:
    return expected_found(
        "the product form",
        "a chain of linear maps, average-pooling, BatchNorm and smooth activations",
        found,
        "Use form='path', which takes any twice differentiable model.",
    )
