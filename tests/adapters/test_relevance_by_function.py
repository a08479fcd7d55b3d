"""LRP by function: against explicit propagation, against Captum, conserved and certified."""

import math
from typing import Any

import captum.attr as ca
import pytest
import torch
import torch.nn.functional as F
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import GammaRule
from torch import Tensor, nn

from captum_priors import AttnLRP, AttributionPrior, NotDifferentiableError, differentiable
from captum_priors.adapters.attention_relevance import Relevance
from captum_priors.engine import with_second_derivative
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import ROWS, seeded, set_up
from tests.adapters.relevance_networks import NETWORKS, Encoder, ResNet, made
from tests.asserts import assert_same_numbers, assert_slope, leaves_no_trace, parameter_gradients

every_network = pytest.mark.parametrize("name", NETWORKS)
WAYS = ("double_backprop", "recompute")
# Captum divides by what its rules multiply by, and adds 1e-9 for that: by numbers of about 1.
STABILISER = 1e-6


# ---- Values --------------------------------------------------------------------------------


def linear(relevance: Tensor, a: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    return a * ((relevance / z) @ weight)


def normalised(relevance: Tensor, x: Tensor, norm: nn.LayerNorm, y: Tensor) -> Tensor:
    """The shift keeps its share; scaling is the identity; centring is linear."""
    without_shift = relevance * (y - norm.bias) / y
    centring = torch.eye(x.shape[-1]) - 1 / x.shape[-1]
    return linear(without_shift, x, centring, x @ centring)


def product(relevance: Tensor, a: Tensor, b: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Half of what each term of each sum has to each of its factors."""
    terms = a.unsqueeze(-1) * b.unsqueeze(-3)  # (..., i, j, k), summed over j
    parts = 0.5 * terms * (relevance / z).unsqueeze(-2)
    return parts.sum(-1), parts.sum(-3)


def by_hand(model: Encoder, x: Tensor, target: int) -> Tensor:
    """Relevance step by step through torch's encoder of one layer, without gradients."""
    layer: Any = model.encoder.layers[0]
    width, heads = 8, layer.self_attn.num_heads
    e = model.embed(x)
    projected = F.linear(e, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in projected.chunk(3, -1))
    q = q / math.sqrt(width // heads)
    logits = q @ k.mT
    weights = logits.masked_fill(torch.arange(x.shape[1]) == x.shape[1] - 1, -math.inf).softmax(-1)
    mixed = weights @ v
    joined = mixed.transpose(1, 2).flatten(2)
    attended = layer.self_attn.out_proj(joined)
    one = layer.norm1(e + attended)
    inner = layer.linear1(one)
    bent = F.gelu(inner)
    outer = layer.linear2(bent)
    two = layer.norm2(one + outer)
    output = model.head(two[:, 0])

    # The output's relevance is itself.
    r = torch.zeros_like(two)
    r[:, 0] = two[:, 0] * model.head.weight[target]
    assert_same_numbers(r.sum((1, 2)) + model.head.bias[target], output[:, target])
    r = normalised(r, one + outer, layer.norm2, two)
    r_one, r_outer = r * one / (one + outer), r * outer / (one + outer)
    r_bent = linear(r_outer, bent, layer.linear2.weight, outer)
    r_one = r_one + linear(r_bent, one, layer.linear1.weight, inner)
    r = normalised(r_one, e + attended, layer.norm1, one)
    r_e, r_attended = r * e / (e + attended), r * attended / (e + attended)
    r_joined = linear(r_attended, joined, layer.self_attn.out_proj.weight, attended)
    r_mixed = r_joined.unflatten(2, (heads, -1)).transpose(1, 2)
    r_weights, r_v = product(r_mixed, weights, v, mixed)
    r_logits = logits * (r_weights - weights * r_weights.sum(-1, keepdim=True))  # Taylor
    r_q, r_k = product(r_logits, q, k.mT, logits)
    r_all = [t.transpose(1, 2).flatten(2) for t in (r_q, r_k.mT, r_v)]
    r_e = r_e + linear(torch.cat(r_all, -1), e, layer.self_attn.in_proj_weight, projected)
    return linear(r_e, x, model.embed.weight, e)


def test_encoder_by_explicit_propagation() -> None:
    model, x = made("encoder")
    model.encoder.layers = model.encoder.layers[:1]
    with torch.no_grad():
        expected = by_hand(model, x, 1)
        assert_same_numbers(differentiable(ca.LRP(model)).attribute(x, target=1), expected)
    found = differentiable(ca.LRP(model)).attribute(x, target=1)
    assert_same_numbers(found, expected)
    # What would be found without rules.
    plain = ca.InputXGradient(model).attribute(x, target=1)
    assert not torch.allclose(plain, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


@pytest.mark.parametrize("pair", [("vit", "vit-eager"), ("bert", "bert-eager")], ids="-".join)
def test_attention_is_the_same_however_it_is_spelled(pair: tuple[str, str]) -> None:
    (one, x), (other, _) = map(made, pair)
    other.load_state_dict(one.state_dict())
    values = [AttnLRP(m).attribute(x, target=1) for m in (one, other)]
    assert_same_numbers(*values)


@pytest.mark.parametrize("name", ROWS["LRP"].models)
def test_where_captum_covers_everything_functions_give_its_numbers(name: str) -> None:
    row, model, x = set_up("LRP", name)
    found = AttnLRP(model).attribute(x, **row.call(model))
    expected = seeded(ca.LRP(model), x.clone(), row.call(model), row)
    assert_same_numbers(found, expected.detach(), STABILISER)


def test_sums_and_normalisation_are_those_of_captums_modules() -> None:
    model, x = made("resnet")
    modules = ResNet(Addition_Module).double().eval()
    modules.load_state_dict(model.state_dict())
    expected = ca.LRP(modules).attribute(x.clone().requires_grad_(), target=1).detach()
    assert_same_numbers(AttnLRP(model).attribute(x, target=1), expected, STABILISER)


def test_captums_numbers_are_kept_where_it_runs_and_sums_are_named() -> None:
    model, x = made("resnet")
    explainer = differentiable(ca.LRP(model))
    with pytest.warns(UserWarning, match=r"found add_ in blocks\.0 \(Residual\).*AttnLRP") as seen:
        found = explainer.attribute(x, target=1)
    assert len([w for w in seen if "Addition_Module" in str(w.message)]) == 1
    explainer.attribute(x, target=1)  # which says nothing again
    stock = ca.LRP(model).attribute(x.clone().requires_grad_(), target=1)
    assert_same_numbers(found, stock.detach())


class Recording(Relevance):
    """Also notes what softmax is given and returns, and what LayerNorm returns and adds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.shifts: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        if func in (torch.softmax, F.softmax):
            self.steps.append((args[0], found))
        if func is F.layer_norm:
            self.shifts.append((found, (kwargs or {})["bias"]))
        return found


@pytest.mark.parametrize("name", ["resnet", "vit-eager", "bert-eager"])
def test_relevance_is_conserved(name: str) -> None:
    """Inputs, what is added, and what softmax keeps make up the output."""
    model, x = made(name)
    x.requires_grad_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()  # its part is no parameter
    mode = Recording(model)
    with mode:
        output = model(mode.carrying(x))[:, 1]
    added = [p for n, p in model.named_parameters() if "bias" in n or n in ("token", "positions")]
    added += [p for n, p in model.named_parameters() if "type_emb" in n or "position_emb" in n]
    pairs = [(t, t) for t in (x, *added)] + mode.shifts
    pairs += [(a, a) for _, a in mode.steps] + [(z, -z) for z, _ in mode.steps]
    gradients = with_second_derivative(output, [t for t, _ in pairs], allow_unused=True)
    parts = zip(pairs, gradients, strict=True)
    shares = [0.0 if g is None else float((value * g).detach().sum()) for (_, value), g in parts]
    # Some hundred steps, each exact but for rounding.
    assert sum(shares) == pytest.approx(float(output.detach().sum()), rel=1e-11)
    assert len(mode.steps) == (0 if name == "resnet" else 2)
    relevance = AttnLRP(model).attribute(x.detach(), target=1)
    assert float(relevance.detach().sum()) == pytest.approx(shares[0], rel=1e-11)


def test_without_constants_and_softmax_nothing_is_lost() -> None:
    model, x = made("resnet")
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    relevance, delta = AttnLRP(model).attribute(x, target=1, return_convergence_delta=True)
    output = model(x)[:, 1]
    assert_same_numbers(relevance.sum((1, 2, 3)), output)
    assert torch.allclose(delta, torch.zeros(3), atol=1e-12)


def test_activations_near_zero_have_the_slope_there() -> None:
    x = torch.tensor([[0.0, 1e-300, 1e-9, -1e-9, 1e-6, 3.0]]).double()
    for bend, slope in ((F.gelu, 0.5), (F.silu, 0.5), (torch.tanh, 1.0), (torch.sigmoid, 0.25)):
        explainer = AttnLRP(lambda x, bend=bend: bend(x).sum(1))
        found = explainer.attribute(x)
        # Their second derivatives are at most 1, and the points at most 1.5e-8 apart.
        assert_same_numbers(found[:, :5], slope * x[:, :5], 1e-6)
        assert found[0, 5].item() == pytest.approx(float((bend(x) - bend(0 * x))[0, 5]))


class Step(nn.Module):
    """One function of a hidden layer, without anything that is added."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.first, self.step = nn.Linear(5, 8, bias=False), step
        self.weight, self.last = nn.Parameter(torch.rand(4) + 0.5), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).reshape(-1, 4, 2)
        return self.last(self.step(hidden, self.weight).flatten(1))


STEPS: dict[str, Any] = {
    "rms_norm": lambda h, w: F.rms_norm(h.mT, (4,), w),
    "rms_norm-eps": lambda h, w: F.rms_norm(h.mT, (4,), weight=w, eps=0.1),
    "layer_norm": lambda h, w: F.layer_norm(h.mT, (4,), weight=w, eps=0.1),
    "group_norm": lambda h, w: F.group_norm(h, 2, w, eps=0.1),
    "instance_norm": lambda h, w: F.instance_norm(h, weight=w, eps=0.1),
    "normalize": lambda h, w: F.normalize(h, 3.0, (1, 2)),
    "by hand": lambda h, w: h * (h.square().mean(1, keepdim=True) + 0.1).pow(-0.5),
    "reciprocal": lambda h, w: h * (1 / (1 + h.norm(dim=1, keepdim=True))),
    "in-place quotient": lambda h, w: h.clone().div_(1 + h.exp().sum(1, keepdim=True)),
    "powers": lambda h, w: h**3 + (h.pow(2.0) * h).erf(),
    "three factors": lambda h, w: torch.einsum("bij,bij,bkj->bij", [h, h.tanh(), h]),
    "keywords": lambda h, w: torch.matmul(input=h @ h.mT, other=h).mul(other=h.abs()),
    "made matrix": lambda h, w: torch.bmm(h, h.mT.relu() @ h),
    "attention": lambda h, w: F.scaled_dot_product_attention(
        w.reshape(1, 1, 4, 1).expand(len(h), 1, 4, 2).detach(),
        key=torch.ones(1, 1, 3, 2),
        value=h[:, None, :3],
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_each_rule_conserves_relevance_and_is_certified(name: str) -> None:
    model, x = Step(STEPS[name]).double(), torch.randn(4, 5)
    relevance = AttnLRP(model).attribute(x, target=1)
    assert_same_numbers(relevance.sum(1), model(x)[:, 1])
    assert check_differentiable(AttnLRP(model), x, target=1).passed


# ---- The graph -----------------------------------------------------------------------------


@every_network
def test_certificate(name: str) -> None:
    model, x = made(name)
    for way in WAYS:
        explainer = AttnLRP(model, differentiation=way)
        assert check_differentiable(explainer, x, target=1).passed
    x.requires_grad_()
    assert check_differentiable(AttnLRP(model), x, target=1).passed


@every_network
def test_values_leave_no_trace_and_have_no_graph(name: str) -> None:
    model, x = made(name)
    explainer = AttnLRP(model)
    with leaves_no_trace(model, tensors=[x]):
        recorded = explainer.attribute(x, target=1)
        gradients = parameter_gradients(recorded, list(model.parameters()))
        with torch.no_grad():
            values = explainer.attribute(x, target=1)
    assert not values.requires_grad
    assert_same_numbers(values, recorded)
    assert any(float(g.abs().max()) > 0 for g in gradients)
    alone = explainer.attribute(x[:1], target=1)
    assert_same_numbers(alone, recorded[:1])


class TwoInputs(nn.Module):
    """A gate of one input on the other, and an argument that is not explained."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return torch.sigmoid(self.one(a)) * self.two(b) * scale


def test_several_inputs_and_additional_arguments() -> None:
    model, scale = TwoInputs().double(), torch.rand(3, 1)
    a, b = torch.randn(3, 4), torch.randn(3, 2)
    found = AttnLRP(model).attribute((a, b), target=0, additional_forward_args=scale)
    half = 0.5 * model(a, b, scale)[:, :1]  # the gate's bias, sigmoid(0), keeps a part of one half
    z_a, z_b = model.one(a)[:, :1], model.two(b)[:, :1]
    moved = 1 - 0.5 / torch.sigmoid(z_a)
    expected = (a * model.one.weight[0] / z_a * moved * half, b * model.two.weight[0] / z_b * half)
    assert_same_numbers(found, expected)
    options = {"target": 0, "additional_forward_args": scale}
    assert check_differentiable(AttnLRP(model), (a, b), **options).passed


def test_at_a_layer_token_ids_are_explained_as_their_embeddings() -> None:
    model, _ = made("bert")
    ids = torch.randint(1, 20, (3, 5))  # not BERT's padding, whose gradient torch leaves out
    words = model.bert.bert.embeddings.word_embeddings
    explainer = differentiable(ca.LayerLRP(model, words))
    found, delta = explainer.attribute(ids, target=1, return_convergence_delta=True)
    expected = AttnLRP(model).attribute(words(ids), target=1)
    assert_same_numbers(found, expected)
    assert_same_numbers(delta, model(ids)[:, 1] - expected.sum((1, 2)))
    assert check_differentiable(
        explainer, ids, parameters=model.named_parameters(), target=1
    ).passed
    block = model.bert.bert.encoder.layer[0]
    at = [
        differentiable(ca.LayerLRP(model, layer)).attribute(
            ids, target=1, attribute_to_layer_input=to_input
        )
        for layer, to_input in ((block.intermediate, False), (block.output.dense, True))
    ]
    assert_same_numbers(*at)


def test_batch_norm_in_training_mode_inside_a_prior() -> None:
    """Held statistics are constants that have a graph: as in a model that is given them."""
    model, x = made("resnet", 6)
    model.train()
    prior = AttributionPrior(AttnLRP(model), l2)
    y = torch.ones(6, dtype=torch.long)
    assert_slope(lambda: prior(x, target=y), list(model.parameters()))


@pytest.mark.parametrize("name", ["vit", "gated", "bert"])
def test_autocast_is_near_single_precision(name: str) -> None:
    model, x = made(name)
    model, x = model.float(), x.float()
    expected = AttnLRP(model).attribute(x, target=1).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = AttnLRP(model).attribute(x, target=1)
    (found.float().square().sum()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    # bfloat16 has three digits, and relevance is a sum of terms that cancel.
    found = found.detach()
    assert float((found - expected).norm()) < 0.1 * float(expected.norm())


def test_functions_without_a_rule_are_named() -> None:
    lstm = nn.LSTM(3, 4, batch_first=True)
    explainer = AttnLRP(lambda x: lstm(x)[0][:, -1])
    with pytest.warns(UserWarning, match="LRP: .* found lstm"):
        explainer.attribute(torch.randn(2, 5, 3), target=1)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * gradient


def test_what_cannot_be_certified_is_refused() -> None:
    model, x = made("vit")
    with pytest.raises(NotDifferentiableError, match="finite_difference"):
        AttnLRP(model, differentiation="finite_difference")
    several = differentiable(ca.LayerLRP(model, [model.patches, model.norms[0]]))
    with pytest.raises(TypeError, match=r"`layer`: expected a torch.nn.Module, found list"):
        several.attribute(x, target=1)
    model.patches.rule = GammaRule()
    with pytest.raises(NotDifferentiableError, match=r"`rule`: .* found GammaRule on a Conv2d"):
        differentiable(ca.LRP(model)).attribute(x, target=1)
    del model.patches.rule
    with pytest.raises(NotDifferentiableError, match="ProductBackward"):
        AttnLRP(lambda x: Product.apply(model(x))).attribute(x, target=1)
