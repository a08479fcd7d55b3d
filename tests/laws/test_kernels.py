"""Which kernel computes a function is no part of it: fused attention and compiled models.

The oracle is the same model, run eagerly with attention in plain matrix products.
"""

import copy
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification

from captum_priors import AttributionPrior, ExpectedGradients, LayerExpectedGradients
from captum_priors.engine.gradients import nodes
from captum_priors.integrations.huggingface import LogitsOf
from captum_priors.penalties import l2
from tests.asserts import assert_slope, gradients_of, relative_error
from tests.cases import DIFFERENTIATIONS, EXACT, Cnn
from tests.laws.leaves import LEAVES_AND_WAYS, Leaf, way_options

LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}
# Truncation of a step of 0.2 %, and in single precision the rounding of what it divides.
OF_DIFFERENCES = {torch.float32: 1e-2, torch.float64: 1e-3}
LENGTH, FEATURES = 6, 8

# What dynamo warns of where it reads .grad of what it traces, and inductor's own use of torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def compiles_anew() -> Iterator[None]:
    """Torch runs eagerly what it has compiled too often."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---- Models --------------------------------------------------------------------------------


class StockEncoder(nn.Module):
    """Torch's own encoder, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 12, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Attention(nn.Module):
    """Causal attention by the functional, and what goes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.project(x).unflatten(2, (3, 2, FEATURES // 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        return self.head(torch.tanh(mixed.transpose(1, 2).flatten(2)).mean(1))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=20,
        hidden_size=FEATURES,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=LENGTH,
        num_labels=3,
        attn_implementation="sdpa",
    )
    return BertForSequenceClassification(config)


def sequences() -> Tensor:
    return torch.randn(4, LENGTH, FEATURES)


def with_samples(model: Any, trained: Any, way: Any, x: Tensor) -> AttributionPrior:
    explainer = ExpectedGradients(trained, differentiation=way)
    return AttributionPrior(explainer, l2, baselines=x, n_samples=2)


def of_words(model: Any, trained: Any, way: Any, x: Tensor) -> AttributionPrior:
    words = model.bert.embeddings.word_embeddings
    explainer = LayerExpectedGradients(LogitsOf(trained), words, differentiation=way)
    return AttributionPrior(explainer, l2, baselines=torch.zeros(1, LENGTH).long(), n_samples=2)


@dataclass(frozen=True)
class Network:
    """A model, a batch for it and a prior on it."""

    name: str
    make: Callable[[], Any]
    batch: Callable[[], Tensor]
    part: str  # a submodule
    prior: Callable[..., AttributionPrior] = with_samples
    attends: bool = True


def images() -> Tensor:
    return torch.randn(4, 1, 8, 8)


NETWORKS = [
    Network("cnn", lambda: Cnn(F.gelu, F.avg_pool2d), images, "conv2", attends=False),
    Network("stock", StockEncoder, sequences, "encoder"),
    Network("functional", Attention, sequences, "project"),
    Network("hugging_face", bert, lambda: torch.randint(1, 20, (4, LENGTH)), "bert", of_words),
]


def as_it_is(model: Any, part: str, backend: Any) -> Any:
    return model


def compiled(model: Any, part: str, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def compiled_in_place(model: Any, part: str, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def compiled_submodule(model: Any, part: str, backend: Any) -> Any:
    setattr(model, part, torch.compile(getattr(model, part), backend=backend))
    return model


def logits_of(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def check(
    network: Network, form: Callable[..., Any], backend: Any = None, dtypes: Any = tuple(LIMIT)
) -> None:
    """Gradients of a prior beside those of the eager model, in each precision and way."""
    for dtype in dtypes:
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        model, x = network.make().to(dtype), network.batch()
        eager = copy.deepcopy(model)
        trained = form(model, network.part, backend)
        logits_of(trained(x)).sum().backward()  # it is compiled by now
        for way in DIFFERENTIATIONS:
            limit = (LIMIT if way in EXACT else OF_DIFFERENCES)[dtype]
            torch.manual_seed(1)
            twin = network.prior(eager, eager, "double_backprop", x)
            prior = network.prior(model, trained, way, x)
            prior.load_state_dict(twin.state_dict())  # the same draws
            with sdpa_kernel(SDPBackend.MATH):
                expected = gradients_of(twin(x, target=1), [*eager.parameters()])
            found = gradients_of(prior(x, target=1), [*model.parameters()])
            assert relative_error(found, expected) <= limit, (dtype, way)


def networks(*, attends: bool = False) -> Any:
    those = [network for network in NETWORKS if network.attends or not attends]
    return pytest.mark.parametrize("network", those, ids=lambda network: network.name)


# ---- Laws ----------------------------------------------------------------------------------


@networks(attends=True)
def test_fused_attention(network: Network) -> None:
    check(network, as_it_is)


@networks()
@pytest.mark.parametrize("form", [compiled, compiled_in_place, compiled_submodule])
def test_compiled_models(network: Network, form: Any) -> None:
    check(network, form, "eager")


@pytest.mark.slow
@networks()
def test_ahead_of_time(network: Network) -> None:
    check(network, compiled, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a compiler"
)
@pytest.mark.parametrize("name", ["cnn", "functional"])
def test_inductor(name: str) -> None:
    (network,) = (network for network in NETWORKS if network.name == name)
    check(network, compiled, "inductor", [torch.float32])


@networks()
def test_training_stays_compiled(network: Network) -> None:
    """Explanations run nothing that is compiled, and training compiles nothing again."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append("compiled")

        def run(*args: Any) -> Any:
            graphs.append("run")
            return graph(*args)

        return run

    model, x = network.make(), network.batch()
    trained = torch.compile(model, backend=backend)
    trained(x)
    first, parts = list(graphs), graphs.count("run")
    for way in EXACT:
        network.prior(model, trained, way, x)(x, target=1).backward()
    assert graphs == first
    trained(x)
    assert graphs == [*first, *["run"] * parts]


@networks(attends=True)
def test_training_stays_fused(network: Network) -> None:
    """The kernel that has no second derivative is what trains, before and after a prior."""
    model, x = network.make(), network.batch()
    model.eval()  # dropout in attention is not fused on a CPU
    for _ in range(2):
        output = logits_of(model(x))
        names = {node.name() for node in nodes([output])}
        assert any("FlashAttention" in name for name in names), names
        network.prior(model, model, "double_backprop", x)(x, target=1).backward()


class Mixed(nn.Module):
    """Attention between the features of each example."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.randn(3, 1, 2))

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.flatten(1).unsqueeze(1).unsqueeze(3)  # (examples, 1 head, features, 1)
        query, key, value = (tokens * scale for scale in self.scales)
        mixed = F.scaled_dot_product_attention(query, key, value).sum(3)
        return h + mixed.reshape(h.shape)


@pytest.mark.parametrize("in_place", [False, True], ids=["fused", "fused_and_compiled"])
@pytest.mark.parametrize(
    ("leaf", "way"),
    [
        pytest.param(leaf, way, id=f"{leaf.name}-{way}")
        for leaf, way in LEAVES_AND_WAYS
        if way in EXACT and leaf.name != "Hessian-twice"  # differences of first derivatives
    ],
)
def test_every_prior(leaf: Leaf, way: str, in_place: bool) -> None:
    layers: Any = leaf.model()
    model = nn.Sequential(layers[0], Mixed(), *layers[1:]).eval()
    eager, x = copy.deepcopy(model), leaf.batch()
    if in_place:
        model.compile(backend="eager")
        model(x)
    twin, prior = leaf.make(eager), leaf.make(model, **way_options(leaf, way))
    prior.load_state_dict(twin.state_dict())
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients_of(twin(x, **leaf.call(x)), [*eager.parameters()])
    found = gradients_of(prior(x, **leaf.call(x)), [*model.parameters()])
    assert relative_error(found, expected) <= LIMIT[torch.float64]


# ---- Transforms ------------------------------------------------------------------------------


def ensemble(net: nn.Module, x: Tensor) -> Tensor:
    weights = {name: torch.stack([p, p.tanh()]) for name, p in net.named_parameters()}
    run = functools.partial(torch.func.functional_call, net)
    return torch.vmap(run, in_dims=(0, None))(weights, x).mean(0)


def force(net: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda z: net(z).square().sum()))(x)


def along(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(net, (x,), (x.cos(),))[1].square()


@pytest.mark.parametrize("transformed", [ensemble, force, along])
@pytest.mark.parametrize("way", EXACT)
def test_relu_inside_of_transforms(transformed: Any, way: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(3, 4)
    explainer = ExpectedGradients(lambda z: transformed(model, z), differentiation=way)
    prior = AttributionPrior(explainer, l2, baselines=torch.randn(5, 4), n_samples=2).eval()
    assert_slope(lambda: prior(x, target=1), [*model.parameters()])
