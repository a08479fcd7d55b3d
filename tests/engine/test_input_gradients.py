"""The seam: what reaches the parameters, and the errors where nothing correct can."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from captum_priors import ExpectedGradients, NotDifferentiableError
from captum_priors.engine import input_gradients
from captum_priors.penalties import l2
from tests.asserts import parameter_gradients, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, mlp


def attribute(
    model: Any, x: Tensor, way: str = "double_backprop", *, n_samples: int = 2, **call: Any
) -> Any:
    explainer = ExpectedGradients(model, differentiation=way)
    return explainer.attribute(x, x, n_samples, generator=torch.Generator().manual_seed(0), **call)


def backward(value: Tensor, model: nn.Module) -> list[Tensor]:
    return parameter_gradients(value, list(model.parameters()))


class Attention(nn.Module):
    """Fused attention, whose CPU kernel has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


class Hard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.head(x))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Cdist(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centres, p=1.0)


class OnceModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.head(x))


def obstacles() -> list[Any]:
    torch.manual_seed(0)
    return [
        pytest.param(Hard, (3, 4), None, "hardsigmoid_backward", id="hardsigmoid"),
        pytest.param(Cdist, (3, 4), 0, "CdistBackward", id="cdist"),
        pytest.param(OnceModel, (3, 4), None, "once_differentiable", id="once"),
    ]


@pytest.mark.parametrize(("make", "shape", "target", "name"), obstacles())
def test_missing_second_derivative_is_named(
    make: Any, shape: tuple[int, ...], target: Any, name: str
) -> None:
    model, x = make(), torch.randn(shape)
    with pytest.raises(NotDifferentiableError, match=name) as raised:
        attribute(model, x, target=target)
    assert "differentiation='finite_difference' needs first derivatives only" in str(raised.value)
    # Recompute tries it on its first chunk, before there is anything to differentiate.
    with pytest.raises(NotDifferentiableError, match=name):
        attribute(model, x, "recompute", target=target)
    with torch.no_grad():
        attribute(model, x, target=target)  # values need first derivatives only


def test_fused_attention_under_finite_difference_and_the_math_kernel() -> None:
    model, x = Attention(), torch.randn(3, 5, 8)
    fused = backward(attribute(model, x, "finite_difference", target=1), model)
    with sdpa_kernel(SDPBackend.MATH):
        exact = backward(attribute(model, x, target=1), model)
    assert relative_error(fused, exact) < 1e-3  # truncation error of a 0.2 % step


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_modules_and_fused_attention_are_exact(way: str, compiled: bool) -> None:
    """Which kernel computes a function is no part of it."""
    if compiled:
        case = mlp()
        eager, x = case.model, case.inputs
        model = torch.compile(eager, backend="aot_eager")
        model(x)
    else:
        eager = model = Attention()
        x = torch.randn(3, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):
        exact = backward(attribute(eager, x, target=1), eager)
    assert relative_error(backward(attribute(model, x, way, target=1), eager), exact) < 1e-12


def test_compiled_module_under_finite_difference() -> None:
    case = mlp()
    compiled = torch.compile(case.model, backend="aot_eager")
    found = backward(attribute(compiled, case.inputs, "finite_difference", target=1), case.model)
    exact = backward(attribute(case.model, case.inputs, target=1), case.model)
    assert relative_error(found, exact) < 1e-3  # truncation error of a 0.2 % step


def test_reentrant_checkpointing_is_refused_and_the_other_works() -> None:
    case = mlp()
    exact = backward(attribute(case.model, case.inputs, target=1), case.model)

    def model(x: Tensor, *, reentrant: bool) -> Tensor:
        return checkpoint(case.model, x, use_reentrant=reentrant)

    for way in DIFFERENTIATIONS:
        with pytest.raises(NotDifferentiableError, match="use_reentrant=False"):
            attribute(lambda x: model(x, reentrant=True), case.inputs, way, target=1)
        value = attribute(lambda x: model(x, reentrant=False), case.inputs, way, target=1)
        tolerance = 1e-12 if way in EXACT else 1e-3  # rounding; truncation of a 0.2 % step
        assert relative_error(backward(value, case.model), exact) < tolerance


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_any_callable_and_closed_over_parameters(way: str) -> None:
    """The leaves come from the graph, not from a module: functions of loose tensors work."""
    weight = torch.randn(4, 5, requires_grad=True)
    loose = torch.randn(5, requires_grad=True)
    x = torch.randn(3, 4)
    value = attribute(lambda z: torch.tanh(z @ weight) @ loose.square(), x, way)
    found = parameter_gradients(value, [weight, loose])
    assert min(float(g.abs().max()) for g in found) > 0
    exact = parameter_gradients(
        attribute(lambda z: torch.tanh(z @ weight) @ loose.square(), x), [weight, loose]
    )
    assert relative_error(found, exact) < (1e-12 if way in EXACT else 1e-3)


@pytest.mark.parametrize("way", ["recompute", "finite_difference"])
def test_tensors_with_an_earlier_graph_are_refused(way: str) -> None:
    """Fast weights, encoded conditions: their own gradient would miss this part of the loss."""
    seed = torch.randn(4, requires_grad=True)
    made = seed.exp()
    x = torch.randn(3, 4)
    with pytest.raises(NotDifferentiableError, match="computed before the call"):
        attribute(lambda z: torch.tanh(z @ made), x, way)
    with pytest.raises(NotDifferentiableError, match="computed before the call"):
        attribute(
            lambda z, h: torch.tanh(z * h).sum(1), x, way, additional_forward_args=made.expand(3, 4)
        )
    # Inside the function, as a constant, or with double backpropagation it works.
    inside = attribute(lambda z: torch.tanh(z @ seed.exp()), x, way)
    exact = attribute(lambda z: torch.tanh(z @ made), x)
    gradients = [torch.autograd.grad(v.square().sum(), seed)[0] for v in (inside, exact)]
    assert relative_error(gradients[:1], gradients[1:]) < 1e-3  # truncation error
    assert not attribute(lambda z: torch.tanh(z @ made.detach()), x, way).requires_grad


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_detached_and_unused_inputs_are_refused(way: str) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(NotDifferentiableError, match=r"detach\(\)"):
        attribute(lambda z: z.detach().sum(1), x, way)
    with pytest.raises(NotDifferentiableError, match=r"inputs\[1\].*additional_forward_args"):
        ExpectedGradients(lambda a, b: a.sum(1), differentiation=way).attribute((x, x), (x, x))
    ids = torch.zeros(2, 3).long()
    with pytest.raises(TypeError, match="LayerExpectedGradients"):
        ExpectedGradients(nn.Embedding(3, 2)).attribute(ids, ids)
    with pytest.raises(
        TypeError, match=r"returns the logits alone; .*huggingface\.LogitsOf\(model\)"
    ):
        attribute(lambda z: (z,), x, way)
    with pytest.raises(ValueError, match=r"outputs of shape \(\d, 4\)"):
        attribute(lambda z: z, x, way)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_only_the_argument_counts(way: str) -> None:
    """A function that also closes over the input: the partial derivative by its argument."""
    x = torch.randn(3, 4, requires_grad=True)
    one = torch.zeros(1, 4)
    explainer = ExpectedGradients(
        lambda z: (z * x.repeat(len(z) // 3, 1)).sum(1),
        differentiation=way,
    )
    assert torch.allclose(explainer.attribute(x, one, 2), x.square())


def test_only_the_argument_counts_at_the_seam() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = input_gradients(lambda points: (points[0] * x).sum(1), (x,))
    assert torch.equal(gradient, x)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_no_leaf_left_means_no_graph(way: str) -> None:
    case = mlp()
    case.model.requires_grad_(False)
    value = attribute(case.model, case.inputs, way, target=1)
    # Double backpropagation keeps a graph to its own copy of the points, and to nothing else.
    assert way == "double_backprop" or not value.requires_grad
    x = case.inputs.requires_grad_()
    value = attribute(case.model, x, way, target=1)
    assert float(torch.autograd.grad(l2(value).sum(), x)[0].abs().max()) > 0
