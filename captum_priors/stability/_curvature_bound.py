r"""Bound the Hessian of a chain of linear maps and smooth activations from its weights.

With :math:`J_l = \partial z_l / \partial x` and :math:`\delta_l = \partial f / \partial a_l` for
activations :math:`a_l = \sigma_l(z_l)`,

.. math:: \nabla^2 f = \sum_l J_l^\top \mathrm{diag}(\delta_l \odot \sigma_l''(z_l)) J_l, \qquad
    \lVert\nabla^2 f\rVert_F \le \sum_l \lVert J_l\rVert_2^2 \max|\sigma_l''|\,
    \lVert\delta_l\rVert_2,

and both norms are products of those of the layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors.stability._smooth_activations import smooth_activations

Curve = tuple[float, float]
"""Largest slope and largest second derivative of an activation function."""

_TANH: Curve = (1.0, 4 / (3 * math.sqrt(3)))
_SIGMOID: Curve = (1 / 4, 1 / (6 * math.sqrt(3)))
_SHAPES = (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, F.dropout)
_SHAPE_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)
_SHAPE_METHODS = ("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous")
_RELU_METHODS = ("relu", "relu_")
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def curvature_bound(model: Any, target: Any, norm: str) -> Tensor:
    """Bound on the Hessian's norm: of any output, of one, or for each example that of its own."""
    model, beta = (
        (model.model, model.beta) if isinstance(model, smooth_activations) else (model, None)
    )
    if not isinstance(model, nn.Module):
        raise NotDifferentiableError(_refusal(f"a {type(model).__name__}, no module"))
    chain = _Chain(model, beta, norm)
    for node in _nodes(model):
        chain.add(node)
    return chain.bound(target)


class _Chain:
    """Running products of the layers passed so far."""

    def __init__(self, model: nn.Module, beta: float | None, norm: str) -> None:
        self._modules = dict(model.named_modules())
        self._beta, self._norm = beta, norm
        self._slope: Any = 1.0  # of all layers so far
        self._terms: list[Any] = []  # of each activation, with the layers since
        self._before = self._terms  # without the last linear map
        self._last: nn.Linear | None = None  # the linear map whose outputs are the chain's

    def add(self, node: fx.Node) -> None:
        """Pass one more operation."""
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        curve = self._curve(node, module)
        if curve is not None:
            self._bend(curve)
        elif isinstance(module, _SHAPE_MODULES) or (
            node.target in (_SHAPE_METHODS if node.op == "call_method" else _SHAPES)
        ):
            return  # entries are moved about
        elif module is not None:
            self._stretch(_gain(module, self._norm))
            self._last = module if isinstance(module, nn.Linear) else None
        else:
            raise NotDifferentiableError(_refusal(f"{node.op} {node.target}"))

    def _bend(self, curve: Curve) -> None:
        slope, second = curve
        self._terms = [term * slope for term in self._terms]
        self._terms.append(self._slope**2 * second)
        self._slope = self._slope * slope
        self._last = None

    def _stretch(self, gain: Any) -> None:
        self._before = self._terms
        self._slope = self._slope * gain
        self._terms = [term * gain for term in self._terms]

    def bound(self, target: Any) -> Tensor:
        """Add up, with only the target's row of the last linear map where there is one."""
        if target is None or isinstance(target, tuple) or self._last is None:
            return torch.as_tensor(sum(self._terms))
        rows = self._last.weight.norm(dim=1)
        index = torch.as_tensor(target, device=rows.device).long()
        if int(index.min()) < 0 or int(index.max()) >= len(rows):
            raise ValueError(
                expected_found(
                    "`target`",
                    f"outputs below {len(rows)}",
                    f"from {int(index.min())} to {int(index.max())}",
                    "Check which output of the model this is.",
                )
            )
        total = torch.as_tensor(sum(self._before))
        chosen: Tensor = rows[index.flatten()] if index.dim() else rows[index]
        return total * chosen

    def _curve(self, node: fx.Node, module: nn.Module | None) -> Curve | None:
        """Slope and second derivative of an activation, None for anything else."""
        function: Any = module if module is not None else node.target
        if isinstance(module, nn.Softplus) or function is F.softplus:
            beta, threshold = (
                (module.beta, module.threshold)
                if isinstance(module, nn.Softplus)
                else (_argument(node, 1, "beta", 1), _argument(node, 2, "threshold", 20))
            )
            if threshold < 20:  # beyond which it is the identity: the slope jumps by exp(-20)
                raise NotDifferentiableError(_refusal(f"Softplus with threshold={threshold}"))
            return (1.0, float(beta) / 4)
        if isinstance(module, nn.Tanh) or function in (torch.tanh, F.tanh, "tanh"):
            return _TANH
        if isinstance(module, nn.Sigmoid) or function in (torch.sigmoid, F.sigmoid, "sigmoid"):
            return _SIGMOID
        if isinstance(module, nn.ReLU) or function in (F.relu, torch.relu, *_RELU_METHODS):
            if self._beta is None:
                raise NotDifferentiableError(
                    _refusal("ReLU, whose gradient jumps; smooth_activations(model, beta) has one")
                )
            return (1.0, self._beta / 4)
        return None


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _nodes(model: nn.Module) -> list[fx.Node]:
    """Operations of the model in order, each on the result of the one before."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the model's own code makes of symbols
        raise NotDifferentiableError(_refusal(f"one that cannot be traced ({error})")) from error
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    chain, sizes = placeholders[:1], set[fx.Node]()
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if _is_size(node, sizes):
            sizes.add(node)
        elif [n for n in node.all_input_nodes if n not in sizes] == chain[-1:]:
            chain.append(node)
        else:
            raise NotDifferentiableError(_refusal(f"{node.op} {node.target} on something else"))
    return chain[1:]


def _is_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """Whether the node is no tensor, but what a tensor is reshaped by."""
    if node.op == "call_method":
        return node.target == "size"
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return bool(node.all_input_nodes) and all(n in sizes for n in node.all_input_nodes)


def _gain(module: nn.Module, norm: str) -> Any:
    """Bound on the operator norm of a linear layer."""
    if isinstance(module, nn.Linear):
        return _matrix_norm(module.weight, norm)
    if isinstance(module, _ConvNd):
        return _kernel_gain(module, norm)
    if isinstance(module, _BatchNorm) and module.running_var is not None:
        scale: Any = (module.running_var + module.eps).rsqrt()
        return (scale if module.weight is None else scale * module.weight).abs().max()
    if isinstance(module, _AVERAGES):
        return _average_gain(module)
    if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        size: Any = module.output_size
        if all(s == 1 for s in (size if isinstance(size, tuple) else (size,))):
            return 1.0  # of the mean: one over the root of its number of entries
    raise NotDifferentiableError(_refusal(type(module).__name__))


def _matrix_norm(matrix: Tensor, norm: str) -> Tensor:
    found: Tensor = torch.linalg.matrix_norm(matrix, 2 if norm == "spectral" else "fro")
    return found


def _kernel_gain(conv: _ConvNd, norm: str) -> Tensor:
    r"""Bound on a convolution at any resolution.

    A convolution gathers patches, in which an entry occurs at most :math:`k` times for a kernel of
    :math:`k` positions, and multiplies them by its kernel as a matrix: at most
    :math:`\sqrt k \lVert W\rVert`. Also, the largest row and column sums bound any matrix,
    :math:`\lVert A\rVert_2^2 \le \lVert A\rVert_1 \lVert A\rVert_\infty`; the lesser one counts.
    """
    if isinstance(conv, _ConvTransposeNd) or conv.padding_mode not in ("zeros", "circular"):
        raise NotDifferentiableError(_refusal(f"{conv}"))
    kernel = conv.weight
    positions = kernel[0, 0].numel()
    groups = kernel.reshape(conv.groups, kernel.shape[0] // conv.groups, -1)
    gathered: Tensor = positions**0.5 * torch.stack([_matrix_norm(g, norm) for g in groups]).max()
    if norm == "frobenius":
        return gathered
    sums = kernel.abs().reshape(*groups.shape[:2], kernel.shape[1], positions)
    rows, columns = sums.sum((2, 3)).max(), sums.sum((1, 3)).max()
    found: Tensor = torch.minimum(gathered, (rows * columns).sqrt())
    return found


def _average_gain(pool: Any) -> float:
    """Row sums of 1; an entry counts 1/k in at most ceil(size / stride) windows a dimension."""
    rank = _AVERAGES.index(type(pool)) + 1
    sizes, strides = (
        tuple(v) * (rank // len(v)) if isinstance(v, (tuple, list)) else (v,) * rank
        for v in (pool.kernel_size, pool.stride)
    )
    if getattr(pool, "divisor_override", None) or not getattr(pool, "count_include_pad", True):
        raise NotDifferentiableError(_refusal(f"{pool} with a divisor of its own"))
    if pool.ceil_mode:
        raise NotDifferentiableError(_refusal(f"{pool} with ceil_mode"))
    columns = math.prod(
        math.ceil(size / stride) / size for size, stride in zip(sizes, strides, strict=True)
    )
    return float(columns**0.5)


def _refusal(found: str) -> str:
    return expected_found(
        "the product form",
        "a chain of linear maps, average-pooling, BatchNorm and smooth activations",
        found,
        "Use form='path', which takes any twice differentiable model.",
    )
