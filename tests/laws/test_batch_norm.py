"""BatchNorm in training mode is explained on the statistics of the explained batch, held.

The oracle is a network without BatchNorm that takes the statistics of the batch explicitly, as a
part of its function: values and gradients are equal, for every prior and way of differentiating.
"""

import copy
import warnings
from typing import Any

import captum.attr as ca
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    NotDifferentiableError,
    Subsample,
    differentiable,
)
from captum_priors.penalties import l2
from captum_priors.stability import ATEX
from tests.adapters.captum_table import MODELS, Explained, flat, in_double
from tests.adapters.captum_table import ROWS as CAPTUM
from tests.adapters.shap_cases import QUICK, adapted, mlp, stock, table
from tests.adapters.shap_cases import ROWS as SHAP
from tests.asserts import assert_slope, gradients_of, new_objects
from tests.laws.leaves import (
    FEATURES,
    WAYS,
    Leaf,
    background,
    every_leaf_and_way,
    leaves_and_ways_but,
    net,
    way_options,
)

CLOSE = {"rtol": 1e-8, "atol": 1e-11}  # sums in another order, some of which cancel
DIFFERENCE = {"rtol": 1e-5, "atol": 1e-7}  # of finite differences in double precision


def tolerance_of(way: str, leaf: str = "") -> dict[str, float]:
    """A difference of differences, too, divides rounding by its step."""
    return DIFFERENCE if way == "finite_difference" or leaf == "Hessian-twice" else CLOSE


def normalised(norm: Any, h: Tensor, batch: Tensor) -> Tensor:
    """What BatchNorm makes of h, on the statistics of a batch that are a part of the function."""
    dims, shape = [0, *range(2, h.dim())], [1, -1, *[1] * (h.dim() - 2)]
    mean, variance = batch.mean(dims), batch.var(dims, correction=0)
    h = (h - mean.reshape(shape)) / (variance.reshape(shape) + norm.eps).sqrt()
    return h * norm.weight.reshape(shape) + norm.bias.reshape(shape) if norm.affine else h


class OnStatisticsOf(nn.Module):
    """A layer and BatchNorm after it, on the statistics of a batch that is a part of the model."""

    def __init__(self, layer: Any, norm: Any, batch: Tensor) -> None:
        super().__init__()
        self.layer, self.norm, self.batch = layer, [norm], batch
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        run = F.conv2d if x.dim() == 4 else F.linear
        of_batch = run(self.batch, self.layer.weight, self.layer.bias)
        return normalised(self.norm[0], self.layer(x), of_batch)


def pair(leaf: Leaf, batch: Tensor) -> tuple[Any, Any]:
    """A network that normalises, in training mode, and the same with explicit statistics."""
    model: Any = leaf.model()
    norm = nn.BatchNorm2d(2) if leaf.images else nn.BatchNorm1d(7)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias)
    explicit = nn.Sequential(OnStatisticsOf(model[0], norm, batch), *model[1:])
    return nn.Sequential(nn.Sequential(model[0], norm), *model[1:]).train(), explicit.train()


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return gradients_of(value, sorted(model.parameters(), key=id))


def assert_same(value: Tensor, model: nn.Module, expected: Tensor, twin: nn.Module, **tol: Any):
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(value, model), gradients(expected, twin), strict=True):
        torch.testing.assert_close(a, b, **tol)


@every_leaf_and_way
def test_priors_explain_the_function_that_is_trained(leaf: Leaf, way: str) -> None:
    x = leaf.batch(6)
    model, explicit = pair(leaf, x)
    before = {name: b.clone() for name, b in model.named_buffers()}
    more: dict[str, Any] = {"teacher": net()} if leaf.cls is ATEX else {}
    prior = leaf.make(model, **way_options(leaf, way), **more)
    twin = leaf.make(explicit, **way_options(leaf, way), **more)
    twin.load_state_dict(prior.state_dict())  # the same draws
    value, expected = prior(x, **leaf.call(x)), twin(x, **leaf.call(x))
    assert_same(value, model, expected, explicit, **tolerance_of(way, leaf.name))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(m.training for m in model.modules())


def forward_passes(prior: Any, model: Any, x: Tensor, call: dict[str, Any]) -> Any:
    """Count those of a call; are the first rows the batch, and gradients recorded? Its value."""
    seen = []

    def see(model: nn.Module, args: Any) -> None:
        rows = args[0]
        same = isinstance(rows, Tensor) and rows.shape == x.shape and torch.equal(rows, x)
        seen.append(same and torch.is_grad_enabled())

    handle = model.register_forward_pre_hook(see)
    value = prior(x, **call)
    handle.remove()
    return len(seen), seen[0], value


def assert_one_or_none_for_statistics(
    prior: Any, model: Any, x: Tensor, call: dict[str, Any], *, before: bool = False, cost: int = 1
) -> None:
    """One forward pass is made for them, and none where the first rows are the batch.

    The first two calls look whether they are, and the values of those after them are the same.
    """
    prior = prior.eval()  # the same draws each time
    first, _ = prior(x, **call), prior(x, **call)
    trained, _, value = forward_passes(prior, model, x, call)
    assert_same(value, model, first, model, **CLOSE)
    alone, begins, _ = forward_passes(prior, model.eval(), x, call)
    assert trained - alone == (0 if begins and not before else cost)


# The first rows go through in code of others', or not in full precision as finite differences do.
_BEFORE = ("Stability-FGSM",)
_BEFORE_DIFFERENCES = ("CURE", "R2ET", "SSR", "LayerEG", "Concept")


@every_leaf_and_way
def test_one_forward_pass_for_the_statistics_or_none(leaf: Leaf, way: str) -> None:
    x = leaf.batch(6)
    model, _ = pair(leaf, x)
    model[1] = nn.Sequential(model[1], type(model[0][1])(2 if leaf.images else 7))
    prior = leaf.make(model, **way_options(leaf, way))
    names = _BEFORE_DIFFERENCES if way == "finite_difference" and "gap" not in leaf.name else ()
    before, runs = leaf.name.startswith((*_BEFORE, *names)), 2 if "two-runs" in leaf.name else 1
    assert_one_or_none_for_statistics(prior, model, x, leaf.call(x), before=before, cost=runs)


@every_leaf_and_way
def test_a_call_leaves_no_tensors_behind(leaf: Leaf, way: str) -> None:
    """No cycle of references, which only the garbage collector would find."""
    x = leaf.batch(6)
    model, _ = pair(leaf, x)
    prior = leaf.make(model, **way_options(leaf, way))
    alive = []
    with new_objects() as objects:
        for _ in range(4):
            prior(x, **leaf.call(x)).backward()
            alive.append(sum(type(each) is Tensor for each in objects()))
    assert alive[1:] == [alive[1]] * 3  # the first call checks more


# Those that are made of a function as they are of a module.
_LAYERS = ("LayerEG", "LayerEG-two-runs", "Sensitivity", "HINT", "RRR-CAM", "Concept")


@leaves_and_ways_but(*_LAYERS, "Concept-maps-random")
@pytest.mark.parametrize("detached", [False, True])
def test_buffers_given_by_functional_call(leaf: Leaf, way: str, detached: bool) -> None:
    x = leaf.batch(6)
    model, explicit = pair(leaf, x)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    own = {k: b.detach() for k, b in buffers.items()} if detached else buffers

    def forward(x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, (parameters, own), (x,))
        return found

    more: dict[str, Any] = {"teacher": net()} if leaf.cls is ATEX else {}
    prior, twin = (leaf.make(f, **way_options(leaf, way), **more) for f in (forward, explicit))
    twin.load_state_dict(prior.state_dict())
    value, expected = prior(x, **leaf.call(x)), twin(x, **leaf.call(x))
    assert_same(value, model, expected, explicit, **tolerance_of(way, leaf.name))
    assert all(b is buffers[name] for name, b in model.named_buffers())


class Block(nn.Module):
    """Convolution and BatchNorm, which run twice."""

    def __init__(self, dims: int, **options: Any) -> None:
        super().__init__()
        self.mix: Any = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims](2, 2, *[1] * (dims > 0))
        kinds = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        self.norm = kinds[dims](2, **options)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.norm(self.mix(x)))
        return self.head(x.flatten(2).mean(2) if x.dim() > 2 else x)


def explicit_block(model: Any, z: Tensor, batch: Tensor) -> Tensor:
    for _ in range(2):
        hz, hb = model.mix(z), model.mix(batch)
        z, batch = (torch.tanh(normalised(model.norm, h, hb)) for h in (hz, hb))
    return model.head(z.flatten(2).mean(2) if z.dim() > 2 else z)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}],
    ids=["plain", "cumulative", "untracked", "plain-scale"],
)
@pytest.mark.parametrize("dims", range(4))
def test_every_kind_of_layer(dims: int, options: dict[str, Any], way: str) -> None:
    model = Block(dims, **options).train()
    x = torch.randn(5, 2, *[3] * dims)
    made = differentiable(ca.Saliency(model), differentiation=way)
    value = AttributionPrior(made, l2, abs=False)(x, target=1)
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(explicit_block(model, z, x)[:, 1].sum(), z, create_graph=True)
    tolerance = tolerance_of(way)
    assert_same(value, model, l2(g).mean(), model, **tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_with_a_graph_have_one_by_the_statistics(way: str) -> None:
    model, x = Block(0).train(), torch.randn(5, 2).requires_grad_()
    made = differentiable(ca.Saliency(model), differentiation=way)
    prior, z = AttributionPrior(made, l2, abs=False), x.view_as(x)
    (g,) = torch.autograd.grad(explicit_block(model, z, x)[:, 1].sum(), z, create_graph=True)
    expected = torch.autograd.grad(l2(g).mean(), x)
    prior(x.detach(), target=1)  # what the first rows are is known by now
    found = torch.autograd.grad(prior(x, target=1), x)
    tolerance = tolerance_of(way)
    torch.testing.assert_close(found, expected, **tolerance)


def batch_norms(*, way: str = "double_backprop", **options: Any) -> tuple[Any, Any]:
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6), nn.BatchNorm1d(6),
        nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip
    with torch.no_grad():
        model(torch.randn(64, FEATURES) + 1)
    made = ExpectedGradients(model, differentiation=way)  # type: ignore[arg-type]  # one of WAYS
    return model.train(), AttributionPrior(made, l2, baselines=background(), **options)


@pytest.mark.parametrize("way", WAYS)
def test_chunks_agree(way: str) -> None:
    model, whole = batch_norms(way=way, n_samples=3)
    made = ExpectedGradients(model, differentiation=way)  # type: ignore[arg-type]  # one of WAYS
    parts = AttributionPrior(made, l2, baselines=background(), n_samples=3, internal_batch_size=4)
    parts.load_state_dict(whole.state_dict())
    x = torch.randn(6, FEATURES)
    tolerance = tolerance_of(way)
    assert_same(parts(x, target=1), model, whole(x, target=1), model, **tolerance)


def test_a_frozen_layer_and_a_model_in_evaluation_mode_keep_their_running_statistics() -> None:
    model, prior = batch_norms()
    prior = prior.eval()  # the same draws each time
    x, seen = torch.randn(6, FEATURES), []
    for frozen in ([], [1], [4], [1, 4]):
        model.train()
        for i in frozen:
            model[i].eval()
        seen.append(prior(x, target=0).item())
    assert len(set(seen)) == 4
    assert prior(x, target=0).item() == seen[3]
    model.eval()
    assert prior(x, target=0).item() == seen[3]


@pytest.mark.parametrize("way", WAYS)
def test_part_of_a_batch_keeps_the_statistics_of_the_whole(way: str) -> None:
    model, prior = batch_norms(way=way, n_samples=2, reduction="mean")
    x = torch.randn(8, FEATURES)
    with torch.no_grad():
        model.eval()
        model[1].running_mean[:] = (h := model[0](x)).mean(0)
        model[1].running_var[:] = h.var(0, correction=0)
        h = model[3](model[2](model[1](h)))
        model[4].running_mean[:], model[4].running_var[:] = h.mean(0), h.var(0, correction=0)
    # The same rows on the statistics of the whole batch, as running ones.
    again = Subsample(Subsample(prior, 0.5), 1.0)  # nested: the outermost batch counts

    def values(training: bool) -> Tensor:
        model.train(training)
        return torch.tensor([again(x, target=0).item() for _ in range(40)])

    running, own = values(False), values(True)
    assert abs(own.mean() - running.mean()) < 4 * running.std() * (2 / 40) ** 0.5


def test_batch_of_one_has_running_statistics_and_says_so_once() -> None:
    model, prior = batch_norms()
    prior, x = prior.eval(), torch.randn(1, FEATURES)
    with pytest.warns(UserWarning, match="batch of one"):
        value = prior(x, target=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior(x, target=0)
    model.eval()
    assert prior(x, target=0).item() == value.item()


def test_running_statistics_are_used_where_asked_for_and_differ_with_a_warning_once() -> None:
    model, _ = batch_norms()
    prior = AttributionPrior(ca.Saliency(model), l2, batch_norm="running")
    x = torch.randn(6, FEATURES)
    assert "batch_norm='running'" in repr(prior)
    model(x)
    model.eval()
    expected = prior(x, target=0).item()
    model.train()
    with torch.no_grad():
        for norm in (model[1], model[4]):  # as in the batch, more or less
            norm.momentum = 0.5
    for _ in range(8):
        model(x)
    model.eval()
    expected = prior(x, target=0).item()
    model.train()
    assert prior(x, target=0).item() == expected  # warnings are errors here
    model[4].running_mean += 50
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(9):
            prior(x, target=0)
    assert ["differ between running statistics" in str(w.message) for w in told] == [True]


def test_layer_that_the_explained_function_does_not_run_is_an_error() -> None:
    model, _ = batch_norms()

    class Own:
        """An explainer that does not say what it explains."""

        def __init__(self) -> None:
            self.net = model

        def attribute(self, inputs: Tensor, target: int) -> Tensor:
            z = inputs.detach().requires_grad_()
            found: Tensor = torch.autograd.grad(self.net(z)[:, 0].sum(), z, create_graph=True)[0]
            return found

    with pytest.raises(NotDifferentiableError, match="attribute forward_func"):
        AttributionPrior(Own(), l2)(torch.randn(4, FEATURES), target=0)
    model.eval()
    x = torch.randn(4, FEATURES)
    plain = AttributionPrior(ca.Saliency(model), l2, abs=False)
    assert_same(AttributionPrior(Own(), l2)(x, target=0), model, plain(x, target=0), model, **CLOSE)


def test_an_explainer_asked_directly_is_captums() -> None:
    model, _ = batch_norms()
    x = torch.randn(6, FEATURES)
    ours = differentiable(ca.Saliency(model)).attribute(x, target=0)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    torch.testing.assert_close(ours, ca.Saliency(model).attribute(x, target=0), rtol=0, atol=0)


@leaves_and_ways_but("ATEX")  # whose explanation is a constant, though the model makes it
def test_certificate_in_training_mode(leaf: Leaf, way: str) -> None:
    """The gradient is the slope of the value along a random direction of all parameters."""
    x = leaf.batch(6)
    model, _ = pair(leaf, x)
    prior = leaf.make(model, **way_options(leaf, way)).eval()  # the same draws each time
    assert_slope(lambda: prior(x, **leaf.call(x)), [*model.parameters()])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_models(way: str, backend: str) -> None:
    model, plain = batch_norms(way=way, n_samples=2)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(6, FEATURES)
    compiled(x)
    made = ExpectedGradients(compiled, differentiation=way)  # type: ignore[arg-type]  # of WAYS
    prior = AttributionPrior(made, l2, baselines=background(), n_samples=2)
    prior.load_state_dict(plain.state_dict())
    tolerance = tolerance_of(way)
    assert_same(prior(x, target=1), model, plain(x, target=1), model, **tolerance)


# ---- Adapters ------------------------------------------------------------------------------

# Every class of Captum that explains a network of tensors: but language models have no BatchNorm.
NETWORKS = {
    name: next(m for m in (row.model, *row.models) if m.endswith(("cnn", "mlp")))
    for name, row in CAPTUM.items()
    if any(m.endswith(("cnn", "mlp")) for m in row.models) and name != "LimeBase"  # one example
}


def size(result: Any) -> Tensor:
    """Mean square of each example's attributions, whatever tensors there are."""
    return torch.stack([t.double().square().flatten(1).mean(1) for t in flat(result)]).sum(0)


def assert_of_the_batch(prior: Any, model: Any, x: Tensor, norm: Any, **call: Any) -> None:
    """The value is that of running statistics set to those of the batch; the gradient its slope."""
    prior = prior.eval()  # the same draws each time
    value = prior(x, **call)
    seen = []
    handle = norm.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        state = copy.deepcopy(model.state_dict())
        model(x)
        model.load_state_dict(state)
    handle.remove()
    dims = [0, *range(2, seen[0].dim())]
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm.running_mean[:], norm.running_var[:] = seen[0].mean(dims), seen[0].var(dims, correction=0)
    model.eval()
    torch.testing.assert_close(prior(x, **call), value, rtol=1e-6, atol=1e-12)
    norm.running_mean[:], norm.running_var[:] = before
    model.train()
    assert_slope(lambda: prior(x, **call), [*model.parameters()], rtol=1e-3, atol=1e-6)


def of_captum(name: str) -> Any:
    """A prior on a class of Captum's, its model in training mode, a batch, and the call."""
    row, model = CAPTUM[name], MODELS[NETWORKS[name]]()
    x = torch.randn(4, *model.shape)
    if x.dim() == 4:
        norm: Any = nn.BatchNorm2d(2)
        model.pool = nn.Sequential(model.pool, norm)
    else:
        norm = nn.BatchNorm1d(model.second.in_features)
        model.second = nn.Sequential(norm, model.second)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    made = Explained(differentiable(row.make(model.train())), row)
    made.forward_func = model  # type: ignore[attr-defined]  # of the explainer inside
    call = row.call(model)
    target = call.pop("target", None)
    prior = AttributionPrior(made, size, **call)
    return prior, model, norm, x, {} if target is None else {"target": target}


@pytest.mark.filterwarnings("ignore:You are providing multiple inputs for Lime")
@pytest.mark.parametrize("name", NETWORKS)
def test_explainers_of_captum_inside_a_prior(name: str) -> None:
    prior, model, norm, x, call = of_captum(name)
    with in_double(needed=CAPTUM[name].single_precision):
        assert_of_the_batch(prior, model, x, norm, **call)


@pytest.mark.filterwarnings("ignore:You are providing multiple inputs for Lime")
@pytest.mark.parametrize("name", NETWORKS)
def test_explainers_of_captum_need_one_forward_pass_or_none(name: str) -> None:
    prior, model, _, x, call = of_captum(name)
    model.last = nn.Sequential(nn.BatchNorm2d(3) if x.dim() == 4 else nn.BatchNorm1d(5), model.last)
    function = not isinstance(getattr(prior.explainer.explainer, "forward_func", model), nn.Module)
    with in_double(needed=CAPTUM[name].single_precision):
        assert_one_or_none_for_statistics(prior, model, x, call, before=function)


@pytest.mark.parametrize(
    "name", [name for name in SHAP if name not in ("LinearExplainer", "AdditiveExplainer")]
)
def test_explainers_of_shap_inside_a_prior(name: str) -> None:
    norm = nn.BatchNorm1d(6)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    plain = mlp(3)
    model = nn.Sequential(plain[0], norm, *plain[1:]).eval()
    explainer = adapted(name, stock(name, model), model)
    prior = AttributionPrior(explainer, size, **QUICK.get(name, {}))
    model.train()
    assert_of_the_batch(prior, model, torch.as_tensor(table(4, 1)), norm, target=1)
