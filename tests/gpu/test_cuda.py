"""The engine on a GPU, where backward passes run in threads of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    NotDifferentiableError,
    differentiable,
)
from captum_priors.penalties import l2
from captum_priors.stability import ATEX
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import ROWS as CAPTUM
from tests.adapters.captum_table import Flat, in_double, set_up
from tests.adapters.relevance_networks import Attention
from tests.asserts import (
    assert_same_numbers,
    assert_slope,
    draw_alike,
    parameter_gradients,
    relative_error,
)
from tests.cases import (
    DIFFERENTIATIONS,
    EXACT,
    EXPLAINERS,
    NONLINEAR,
    Case,
    Recurrent,
    Row,
    rows,
    tokens,
)
from tests.gpu.device import DEVICE, eg_prior, needs_cuda, needs_device, on_device
from tests.laws.leaves import Leaf, background, every_leaf_and_way, leaves_and_ways_but, net
from tests.laws.leaves import way_options as options_of_way
from tests.laws.test_batch_norm import CLOSE, DIFFERENCE, assert_same, pair
from tests.priors.test_mixed_precision import prior_of

pytestmark = needs_device


def moved(case: Case, dtype: torch.dtype = torch.float64) -> Case:
    each = (case.model, case.inputs, case.baselines, case.target, case.args)
    return Case(*(on_device(value, dtype) for value in each), case.layer, case.smooth)


def attribute(model: Any, x: Tensor, way: str, **call: Any) -> Tensor:
    explainer = ExpectedGradients(model, differentiation=way)
    value: Tensor = explainer.attribute(x, x, 3, generator=torch.Generator().manual_seed(0), **call)
    return value


# Certificates


@pytest.mark.parametrize("row", rows(EXPLAINERS))
@pytest.mark.parametrize("make_case", rows(NONLINEAR))
@pytest.mark.parametrize("way", EXACT)
def test_certificate(row: Row, make_case: Any, way: str) -> None:
    case = moved(make_case())
    check_differentiable(row.make(case, way), case.inputs, **row.call(case))


@pytest.mark.parametrize("row", rows([row for row in EXPLAINERS if "noise" not in row.name]))
@pytest.mark.parametrize("make_case", rows(NONLINEAR))
@pytest.mark.parametrize("way", EXACT)
def test_certificate_in_single_precision(row: Row, make_case: Any, way: str) -> None:
    """Gradients are those of double precision, which are certified."""
    case, gradients = make_case(), []
    for dtype in (torch.float64, torch.float32):
        case = moved(case, dtype)
        call = row.call(case)
        if row.name.startswith("EG"):
            call["generator"] = torch.Generator().manual_seed(0)
        value = row.make(case, way).attribute(case.inputs, **call)
        gradients.append(parameter_gradients(value, list(case.model.parameters())))
    expected, found = gradients
    assert all(g.dtype == torch.float32 for g in found)
    assert relative_error([g.double() for g in found], expected) < 1e-4


# What is no batch of tensors, and one that draws on the CPU.
_ELSEWHERE = ("LLM", "DataLoader", "LimeBase")


@pytest.mark.filterwarnings("ignore:You are providing multiple inputs for Lime / Kernel SHAP")
@pytest.mark.filterwarnings("ignore:Objective did not converge")
@pytest.mark.parametrize("name", [n for n in CAPTUM if not n.startswith(_ELSEWHERE)])
def test_captum_classes(name: str) -> None:
    row, model, x = set_up(name, CAPTUM[name].model)
    model, x, call = (on_device(each) for each in (model, x, row.call(model)))
    explainer = Flat(differentiable(row.make(model)), row)
    with in_double(needed=row.single_precision):
        check_differentiable(explainer, x, parameters=model.named_parameters(), **call)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_same_numbers_and_gradients_as_on_the_cpu(way: str) -> None:
    """Draws come from the CPU generator, so a seed means the same on both."""
    case = NONLINEAR[2]()
    here = attribute(case.model, case.inputs, way, target=case.target)
    gradients = parameter_gradients(here, list(case.model.parameters()))
    gpu = moved(case)
    there = attribute(gpu.model, gpu.inputs, way, target=gpu.target)
    assert_same_numbers(there.cpu(), here, 1e-10)
    found = parameter_gradients(there, list(gpu.model.parameters()))
    assert relative_error([g.cpu() for g in found], gradients) < 1e-8  # other summation order


# BatchNorm in training mode, and every prior


def normalising(leaf: Leaf, x: Tensor) -> tuple[Any, Any, Callable[[Any, str], Any], Any]:
    """A model that normalises, its explicit twin, their priors, and the call."""
    model, explicit = (on_device(each) for each in pair(leaf, x))
    call = on_device(leaf.call(x))

    def prior_of(model: Any, way: str) -> Any:
        more: dict[str, Any] = {"teacher": on_device(net())} if leaf.cls is ATEX else {}
        prior = leaf.make(model, **options_of_way(leaf, way), **more)
        if getattr(prior, "draws_baselines", False):
            call["baselines"] = on_device(background())
        return prior

    return model, explicit, prior_of, call


@every_leaf_and_way
def test_priors_explain_the_function_that_is_trained(leaf: Leaf, way: str) -> None:
    """On the statistics of the batch, as the network that takes them explicitly."""
    x = on_device(leaf.batch(6))
    model, explicit, prior_of, call = normalising(leaf, x)
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(0)
    prior = prior_of(model, way)
    torch.manual_seed(0)  # a teacher with the same weights
    twin = prior_of(explicit, way)
    twin.load_state_dict(prior.state_dict())  # the same draws
    tolerance = DIFFERENCE if way == "finite_difference" else CLOSE
    assert_same(prior(x, **call), model, twin(x, **call), explicit, **tolerance)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(m.training for m in model.modules())


@leaves_and_ways_but("ATEX")  # whose explanation is a constant, though the model makes it
def test_certificate_in_training_mode(leaf: Leaf, way: str) -> None:
    """The gradient is the slope of the value along a random direction of all parameters."""
    x = on_device(leaf.batch(6))
    model, _, prior_of, call = normalising(leaf, x)
    prior = prior_of(model, way).eval()  # the same draws each time
    assert_slope(lambda: prior(x, **call), [*model.parameters()])


# Kernels without a second derivative


def explained(model: Any, way: Any, x: Tensor, how: str) -> Tensor:
    """The value of a prior on the module, on a function that hides it, or of the explainer."""
    if how == "hidden":
        return prior_of(lambda z: model(1 * z), way)(x, target=1)
    prior = prior_of(model, way)
    if how == "prior":
        return prior(x, target=1)
    attributions = prior.explainer.attribute(x, target=1, n_steps=4)
    return l2(attributions).mean()


@pytest.mark.parametrize("how", ["prior", "hidden", "explainer"])
@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_cudnn_recurrent_modules(cell: Any, way: str, how: str) -> None:
    """They are explained without cuDNN, with no choice for the user to make, and train with it."""
    model, x = on_device(Recurrent(cell)), torch.randn(5, 6, 4, device=DEVICE)
    if how == "explainer":  # which explains the model as it is, dropout and all
        model.cell.dropout = 0.0
    parameters = list(model.parameters())
    enabled = torch.backends.cudnn.enabled
    found = torch.autograd.grad(explained(model, way, x, how), parameters, allow_unused=True)
    assert torch.backends.cudnn.enabled == enabled
    torch.backends.cudnn.enabled = False
    try:
        value = prior_of(model, "double_backprop")(x, target=1)
        expected = torch.autograd.grad(value, parameters, allow_unused=True)
    finally:
        torch.backends.cudnn.enabled = enabled
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    limit = 1e-8 if way in EXACT else 1e-3  # truncation of a 0.2 % step
    assert relative_error([f for f, _ in pairs], [e for _, e in pairs]) < limit


def test_cudnn_recurrent_layers_of_token_ids() -> None:
    case = moved(tokens())
    explainer = LayerExpectedGradients(case.model, case.layer)
    prior = AttributionPrior(explainer, l2, baselines=case.baselines)
    with torch.no_grad():
        value = prior.eval()(case.inputs, target=1)
    assert prior(case.inputs, target=1).item() == pytest.approx(value.item())
    prior(case.inputs, target=1).backward()
    assert float(case.model.lstm.weight_hh_l0.grad.abs().max()) > 0


@needs_cuda
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch 2.9 has it")
def test_precision_of_convolutions_is_left_alone() -> None:
    """As the newer spelling says it, which not every part of torch's own code goes with."""
    model, x = on_device(Recurrent(nn.LSTM)), torch.randn(5, 6, 4, device=DEVICE)
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        prior_of(model, "double_backprop")(x, target=1).backward()
        assert convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before


def attention() -> nn.Module:
    return nn.Sequential(Attention(32, 2, fused=True), nn.Flatten(), nn.Linear(256, 2))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(256, 2))


def by_way(model: Any, x: Tensor, way: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of a way as things are, and by double backpropagation in plain products."""
    parameters = list(model.parameters())
    prior, plain = eg_prior(model, way, x), eg_prior(model, "double_backprop", x)
    draw_alike(prior, plain)
    found = parameter_gradients(prior(x, target=1), parameters)
    with sdpa_kernel(SDPBackend.MATH):
        return found, parameter_gradients(plain(x, target=1), parameters)


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [attention, encoder])
def test_fused_attention(make: Any, dtype: torch.dtype, way: str) -> None:
    """Exact, though the kernel that trains has no second derivative."""
    model = on_device(make(), dtype)
    found, expected = by_way(model, torch.randn(4, 8, 32, device=DEVICE, dtype=dtype), way)
    exact = 1e-6 if dtype == torch.float32 else 1e-12
    assert relative_error(found, expected) < (exact if way in EXACT else 1e-2)


@needs_cuda
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_fused_attention_in_bfloat16(kernel: Any, way: str) -> None:
    model, x = attention().to(DEVICE).float(), torch.randn(4, 8, 32, device=DEVICE).float()
    exact, _ = by_way(model, x, "double_backprop")
    # finite_difference computes in float32, which flash attention does not take.
    allowed = [kernel] if way in EXACT else [kernel, SDPBackend.EFFICIENT_ATTENTION]
    with torch.autocast("cuda", dtype=torch.bfloat16), sdpa_kernel(allowed):
        found, plain = by_way(model, x, way)
        model(x).sum().backward()  # the fused kernel trains
    if way in EXACT:
        assert relative_error(found, plain) < 1e-6
    flat, flat_exact = (torch.cat([g.flatten() for g in each]) for each in (found, exact))
    assert float(torch.cosine_similarity(flat, flat_exact, dim=0)) > 0.95


def convolutions() -> nn.Module:
    """On tokens as on pixels of one channel."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, -1)), nn.Conv2d(1, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3)),
        *(nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 2)),
    )


@needs_cuda
@pytest.mark.parametrize("make", [convolutions, encoder])
@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_tf32(make: Any, way: str) -> None:
    """Eleven bits, which cuDNN's convolutions have by default: near, or refused."""
    model, x = on_device(make(), torch.float32), torch.randn(16, 8, 32, device=DEVICE).float()
    expected, _ = by_way(model, x, "double_backprop")
    for owner in (torch.backends.cuda.matmul, torch.backends.cudnn):
        owner.allow_tf32 = True  # the fixture of these tests puts it back
    try:
        found, _ = by_way(model, x, way)
    except NotDifferentiableError:
        assert way == "finite_difference"
        return
    assert relative_error(found, expected) < (0.02 if way in EXACT else 0.1)


# What lies elsewhere


@needs_cuda
def test_baselines_elsewhere_are_an_error() -> None:
    model = on_device(nn.Linear(3, 1))
    with pytest.raises(TypeError, match=r"on cuda:0 as in the inputs, found .* on cpu"):
        ExpectedGradients(model).attribute(torch.randn(2, 3, device=DEVICE), torch.randn(4, 3))


@needs_cuda
def test_a_batch_elsewhere_is_an_error() -> None:
    model, x = on_device(nn.Linear(3, 2)), torch.randn(2, 3)
    prior = AttributionPrior(differentiable(Saliency(model)), l2)
    with pytest.raises(ValueError, match=r"parameters, cuda:0, found cpu.*\.to\(device\)"):
        prior(x, target=1)
    with pytest.raises(ValueError, match="device"):
        prior(x.to(DEVICE), target=torch.tensor([0, 1]))
