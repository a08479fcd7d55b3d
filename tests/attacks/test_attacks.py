"""Attacks × laws: in the ball, the best of all points, no trace; a new attack is a row."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import (
    DeepLift,
    GradientShap,
    Occlusion,
    Saliency,
)
from captum.robust import Perturbation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_priors import ExpectedGradients, NotDifferentiableError, differentiable
from captum_priors.attacks import (
    AttributionAttack,
    DistanceAttack,
    ManipulationAttack,
    MassCenterAttack,
    RandomAttack,
    TopKAttack,
)
from captum_priors.distances import mse
from tests.asserts import as_tuple, leaves_no_trace
from tests.cases import Case, Everything, mlp, relu_cnn, relu_mlp, tuple_inputs

Make = Callable[..., Any]
FEW: dict[str, Any] = {"step_num": 4}
GRADIENT: dict[str, Make] = {
    "top-k": lambda explainer, **options: TopKAttack(explainer, 2, **FEW | options),
    "manipulation": lambda explainer, **options: ManipulationAttack(explainer, **FEW | options),
    "mass center": lambda explainer, **options: MassCenterAttack(explainer, **FEW | options),
    "distance": lambda explainer, **options: DistanceAttack(explainer, mse, **FEW | options),
}
top_k, manipulation, mass_center, distance = GRADIENT.values()
noise = RandomAttack
every_attack = pytest.mark.parametrize(
    "make", [*GRADIENT.values(), noise], ids=[*GRADIENT, "noise"]
)
gradient_attack = pytest.mark.parametrize("make", GRADIENT.values(), ids=GRADIENT)


def tuple_options(make: Make, **options: Any) -> dict[str, Any]:
    """What attacks on maps need to know of matrices: which axis is places."""
    return {} if make is noise else {"dim": 1, **options}


def size(offset: Tensor, norm: str) -> Tensor:
    return offset.flatten(1).norm(dim=1, p=float("inf") if norm == "Linf" else 2)


def outputs(case: Case, inputs: Any) -> Tensor:
    return case.model(*as_tuple(inputs), *(case.args or ()))


@every_attack
@settings(max_examples=12, deadline=None)
@given(
    radius=st.floats(1e-3, 3),
    norm=st.sampled_from(["Linf", "L2"]),
    width=st.floats(0.0, 1.0),
    start=st.booleans(),
    stays=st.booleans(),
    seed=st.integers(0, 2**32),
    model=st.sampled_from([relu_mlp, tuple_inputs, relu_cnn]),
)
def test_stays_in_ball_and_range_and_keeps_evidence_and_prediction(
    make: Make,
    radius: float,
    norm: Any,
    width: float,
    start: bool,
    stays: bool,
    seed: int,
    model: Any,
) -> None:
    torch.manual_seed(seed)
    case = model()
    clean = as_tuple(copy.deepcopy(case.inputs))
    low, high = (
        min(float(t.min()) for t in clean) - width,
        max(float(t.max()) for t in clean) + width,
    )
    options: dict[str, Any] = {} if make is noise else {"random_start": start}
    if model is tuple_inputs:
        options = tuple_options(make, **options)
    bounds = {"lower_bound": low, "upper_bound": high}
    attack = make(Saliency(case.model), radius=radius, norm=norm, **bounds, **options)
    masks = tuple((torch.rand_like(t) < 0.5).float() * stays for t in clean)
    moved = attack.perturb(
        case.inputs,
        target=1,
        additional_forward_args=case.args,
        annotation=masks if isinstance(case.inputs, tuple) else masks[0],
    )
    assert isinstance(moved, tuple) == isinstance(case.inputs, tuple)
    for now, x, z, mask in zip(as_tuple(case.inputs), clean, as_tuple(moved), masks, strict=True):
        assert torch.equal(now, x)
        assert (z.shape, z.dtype, z.requires_grad) == (x.shape, x.dtype, False)
        # x + d - x differs from d by the rounding of the sum.
        rounding = 1e-12 * (1 + float(x.abs().max()))
        assert float(size(z - x, norm).max()) <= radius + rounding
        assert low <= float(z.min()) <= float(z.max()) <= high
        assert torch.equal(z[mask > 0], x[mask > 0])
    assert torch.equal(outputs(case, moved).argmax(1), outputs(case, case.inputs).argmax(1))


@gradient_attack
def test_never_ends_below_the_clean_input_and_more_restarts_never_below_fewer(make: Make) -> None:
    gains = []
    for case in (mlp(), relu_cnn()):
        explainer = differentiable(Saliency(case.model))
        attacks = [make(explainer, radius=0.4, n_restarts=n, seed=0) for n in (1, 4)]
        points = [case.inputs, *(a.perturb(case.inputs, target=case.target) for a in attacks)]
        maps = [as_tuple(explainer.attribute(x, target=case.target).detach()) for x in points]
        clean, once, often = (attacks[0].score(m, maps[0]) for m in maps)
        gains += [once - clean, often - once]
    assert all(bool((gain >= 0).all()) for gain in gains)
    assert max(map(float, gains[0])) > 0
    assert max(map(float, gains[1] if gains[1].any() else gains[3])) > 0  # they start elsewhere


def test_restarts_begin_again() -> None:
    case = mlp()
    options = {"radius": 0.4, "norm": "L2", "random_start": False, "output_weight": 1.0}
    once, often = (top_k(Saliency(case.model), n_restarts=n, **options) for n in (1, 3))
    assert torch.equal(once.perturb(case.inputs), often.perturb(case.inputs))


class Noisy:
    """An explainer that draws, and works in place on what it is given."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.comparisons: list[float] = []

    def attribute(self, inputs: Tensor) -> Tensor:
        (self.steps if inputs.requires_grad else self.comparisons).append(torch.rand(()).item())
        inputs *= 2
        return inputs.square() + torch.rand(())


def test_points_are_compared_under_one_draw_and_steps_draw_anew() -> None:
    explainer, x = Noisy(), torch.ones(2, 4)
    attack = distance(explainer, radius=0.5, n_restarts=2, keep_prediction=False)
    torch.testing.assert_close((attack.perturb(x) - 1).abs(), torch.full((2, 4), 0.5))
    assert len(set(explainer.comparisons)) == 1
    assert len({*explainer.steps, *explainer.comparisons}) == 2 * 4 + 1


def test_points_that_rank_below_the_clean_input_are_not_taken() -> None:
    class Misjudged(DistanceAttack):
        def score(self, attributions: Any, clean: Any) -> Tensor:
            return -self.objective(attributions, clean)

    case = mlp()
    attack = Misjudged(Saliency(case.model), mse, radius=0.3, step_num=3)
    assert torch.equal(attack.perturb(case.inputs, target=1), case.inputs)


def in_training() -> tuple[Everything, Tensor]:
    model, x = Everything(), torch.randn(7, 6, 4)
    model(x).square().sum().backward()
    return model, x


@every_attack
@pytest.mark.parametrize("block", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_leaves_no_trace(make: Make, block: Any) -> None:
    model, x = in_training()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    attack = make(Saliency(model), radius=0.3, **tuple_options(make))
    if make is not noise:
        options = tuple_options(make, generator=generator)
        attack = make(ExpectedGradients(model), radius=0.3, **options)
    with leaves_no_trace(model, tensors=[x]), block():
        moved = attack.perturb(x, baselines=x.clone())  # made in the block
    assert not torch.equal(moved, x)
    assert torch.equal(generator.get_state(), before)


@every_attack
def test_takes_what_inference_mode_made(make: Make) -> None:
    case = tuple_inputs()
    attack = make(Saliency(case.model), radius=0.3, seed=1, **tuple_options(make))
    expected = attack.perturb(case.inputs, 1, case.args)
    with torch.inference_mode():
        inputs, scale = tuple(x.clone() for x in case.inputs), case.args[0].clone()
        found = attack.perturb(inputs, 1, (scale, case.args[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_attack
@pytest.mark.parametrize("fails_after", [0, 1])
def test_leaves_no_trace_when_the_model_raises(make: Make, fails_after: int) -> None:
    model, x = in_training()
    attack = make(Saliency(model), radius=0.3, **tuple_options(make))
    model.fails_after = fails_after
    with leaves_no_trace(model, tensors=[x]), pytest.raises(RuntimeError, match="fails midway"):
        attack.perturb(x)
    assert torch.relu(-torch.ones(1)).item() == 0


@every_attack
def test_judges_the_model_as_in_evaluation(make: Make) -> None:
    model, x = in_training()
    twin = copy.deepcopy(model).eval()
    options = tuple_options(make)
    moved, expected = (
        make(Saliency(m), radius=0.3, seed=1, **options).perturb(x) for m in (model, twin)
    )
    torch.testing.assert_close(moved, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [top_k, mass_center, distance])
def test_examples_do_not_depend_on_their_batch(make: Make) -> None:
    case, targets = relu_mlp(), [0, 1, 2, 1, 0]
    attack = make(Saliency(case.model), radius=0.3, random_start=False)
    together = attack.perturb(case.inputs, target=targets)
    alone = [attack.perturb(case.inputs[i : i + 1], target=t) for i, t in enumerate(targets)]
    # Sums over a batch of another size round otherwise; steps are by sign.
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)


@every_attack
def test_draws_follow_the_seed_or_the_global_generator(make: Make) -> None:
    case = relu_mlp()
    fixed, free = (make(Saliency(case.model), radius=0.3, seed=seed) for seed in (5, None))
    found = []
    for seed in (8, 8, 9):
        torch.manual_seed(seed)
        found.append([a.perturb(case.inputs, target=1) for a in (fixed, free)])
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])


@every_attack
def test_signatures_agree_with_captum_s(make: Make) -> None:
    case = mlp()
    attack = make(Saliency(case.model), radius=0.1)
    assert isinstance(attack, Perturbation)
    parameters = list(inspect.signature(attack.perturb).parameters)
    assert parameters[:3] == ["inputs", "target", "additional_forward_args"]
    assert {"baselines", "annotation"} <= set(parameters)
    assert torch.equal(attack(case.inputs), attack.perturb(case.inputs))


def shap_gradient(model: nn.Module) -> Any:
    shap = pytest.importorskip("shap")
    return differentiable(shap.GradientExplainer(model, torch.zeros(3, 1, 8, 8)))


BASELINES = {"baselines": torch.zeros(3, 1, 8, 8, dtype=torch.float64)}
EXPLAINERS: list[tuple[str, Callable[[nn.Module], Any], dict[str, Any]]] = [
    ("DeepLift", DeepLift, {}),
    ("GradientShap", GradientShap, BASELINES),
    ("Occlusion", Occlusion, {"sliding_window_shapes": (1, 4, 4), "strides": (1, 4, 4)}),
    ("recompute", lambda m: differentiable(Saliency(m), differentiation="recompute"), {}),
    ("difference", lambda m: differentiable(Saliency(m), differentiation="finite_difference"), {}),
    ("SHAP", shap_gradient, {}),
]


@pytest.mark.parametrize(
    ("make", "options"), [pytest.param(*row[1:], id=row[0]) for row in EXPLAINERS]
)
def test_works_on_any_differentiable_explainer(
    make: Callable[[nn.Module], Any], options: dict[str, Any]
) -> None:
    model, x = relu_cnn().model, torch.randn(3, 1, 8, 8)
    if make is DeepLift:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))
    common = {"radius": 0.3, "step_num": 6, "random_start": False, "forward_func": model}
    moved = DistanceAttack(make(model), mse, **common, **options).perturb(x, target=1)
    # From a clean start, only a gradient can have moved anything.
    assert float((moved - x).abs().max()) > 0.05


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_step_is_the_gradient_of_the_explainer(norm: Any) -> None:
    case = mlp()
    explainer = differentiable(Saliency(case.model))
    options = {"radius": 0.2, "step_num": 1, "step_size": 0.1, "norm": norm, "betas": None}
    options["output_weight"] = 5.0
    attack = DistanceAttack(explainer, mse, seed=2, abs=False, **options)
    noise = RandomAttack(case.model, radius=0.2, norm=norm, distribution="uniform", seed=2)
    noise.keep_prediction = False
    start = noise.perturb(case.inputs)
    leaf = start.clone().requires_grad_()
    clean = explainer.attribute(case.inputs, target=1, abs=False).detach()
    change = case.model(leaf).softmax(1) - case.model(case.inputs).softmax(1).detach()
    value = mse(explainer.attribute(leaf, target=1, abs=False), clean).sum()
    value = value - 5.0 * change.square().sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    move = gradient.sign() if norm == "Linf" else gradient / gradient.norm(dim=1, keepdim=True)
    offset = start + 0.1 * move - case.inputs
    if norm == "Linf":
        step = case.inputs + offset.clamp(-0.2, 0.2)
    else:
        step = case.inputs + offset * (0.2 / offset.norm(dim=1, keepdim=True)).clamp(max=1)
    best, top = case.inputs.clone(), torch.zeros(len(case.inputs))
    labels = case.model(best).argmax(1)
    for point in (start, step):
        score = mse(explainer.attribute(point, target=1, abs=False), clean).detach()
        better = (case.model(point).argmax(1) == labels) & (score > top)
        best[better], top[better] = point[better], score[better]
    torch.testing.assert_close(attack.perturb(case.inputs, target=1), best, rtol=0, atol=1e-12)


def test_relu_maps_move_only_with_smoothed_steps_whose_steepness_grows() -> None:
    case = relu_mlp()
    attacks = {
        betas: DistanceAttack(
            Saliency(case.model), mse, radius=0.3, step_num=3, random_start=False, betas=betas
        )
        for betas in (None, (10.0, 1000.0))
    }
    moved = {betas: attack.perturb(case.inputs, target=1) for betas, attack in attacks.items()}
    assert torch.equal(moved[None], case.inputs)
    assert not torch.equal(moved[10.0, 1000.0], case.inputs)
    steepness = [attacks[10.0, 1000.0].steepness(i) for i in range(3)]
    assert steepness == pytest.approx([10, 100, 1000])
    assert attacks[None].steepness(0) is None


def test_objectives_of_known_maps() -> None:
    explainer = Saliency(nn.Linear(2, 1))
    maps, other = torch.zeros(1, 2, 5, 7), torch.zeros(1, 2, 5, 7)
    maps[0, 0, 1, 2], maps[0, 1, 3, 6], other[0, 1, 0, 0] = 3.0, -1.0, 5.0
    center = MassCenterAttack(explainer, radius=1)
    # Centres (1.5, 3) and (0, 0); that of nothing is (0, 0).
    assert center.objective((other,), (maps,)).tolist() == [1.5**2 + 3**2]
    assert center.objective((torch.zeros(1, 3),), (torch.tensor([[0.0, 0, 2]]),)).tolist() == [4.0]
    a, b = torch.tensor([[4.0, -3, 2, 1]]), torch.tensor([[1.0, 0, 4, 5]])
    top = TopKAttack(explainer, 2, radius=1)
    assert top.objective((b,), (a,)).tolist() == [-0.1]
    assert top.score((b,), (a,)).tolist() == [-0.05]
    assert top.score((a,), (a,)).tolist() == [-2 - 0.35]
    # Maps are compared in units of their mean, with that of the next example or with one's own
    # reversed.
    two = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    imitate = ManipulationAttack(explainer, radius=1)
    assert imitate.objective((two,), (two.flip(0),)).tolist() == [0.0, 0.0]
    found = imitate.objective((two,), (two,)).tolist()
    assert found == pytest.approx([-(0.25 + 0.25) / 3] * 2)
    assert imitate.objective((two[:1].flip(1),), (two[:1],)).tolist() == [0.0]
    given_map = ManipulationAttack(explainer, two[0], radius=1)
    assert given_map.objective((two,), (two,)).tolist() == pytest.approx([0, -0.5 / 3])
    pair = DistanceAttack(explainer, mse, radius=1)
    assert torch.equal(pair.objective((a, two[:1]), (b, two[1:])), mse((a, two[:1]), (b, two[1:])))


@every_attack
@pytest.mark.parametrize("n", [1, 3])
def test_classes_and_signs_of_one_logit_are_kept(make: Make, n: int) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, n)), torch.randn(20, 4)
    options = {} if make is noise else {"output_weight": 0.0}
    model[2].bias.data -= model(x).detach().median(0).values  # some of the logits are near zero
    clean = model(x).detach()
    for keeping in (False, True):
        attack = make(Saliency(model), radius=2.0, seed=0, keep_prediction=keeping, **options)
        now = model(attack.perturb(x, target=n - 1))
        kept = now.argmax(1) == clean.argmax(1) if n > 1 else (now > 0) == (clean > 0)
        assert bool(kept.all()) == keeping


def test_explains_the_predicted_class_by_default() -> None:
    case = relu_mlp()
    attack = top_k(Saliency(case.model), radius=0.3, seed=1)
    labels = case.model(case.inputs).argmax(1)
    assert torch.equal(attack.perturb(case.inputs), attack.perturb(case.inputs, target=labels))


@every_attack
def test_bounds_radii_and_steps_may_differ_between_inputs_and_channels(make: Make) -> None:
    case = tuple_inputs()
    a, b = case.inputs
    attack = make(
        Saliency(case.model),
        radius=(0.1, 0.5),
        lower_bound=(a - torch.tensor([[0.0], [0.05]]), float("-inf")),
        keep_prediction=False,
        **tuple_options(make, step_size=(0.1, 0.5)),
    )
    x, y = attack.perturb(case.inputs, target=1, additional_forward_args=case.args)
    assert 0 < float((x - a).abs().max()) <= 0.1 + 1e-12
    assert float((x - a)[:, 0].min()) >= -1e-12
    assert -0.05 - 1e-12 <= float((x - a)[:, 1].min()) < 0
    assert 0.1 < float((y - b).abs().max()) <= 0.5 + 1e-12


def test_constant_maps_are_left_alone() -> None:
    x = torch.randn(3, 4)
    attack = top_k(Saliency(nn.Linear(4, 2)), radius=0.1, random_start=False)
    moved = attack.perturb(x, target=0)
    assert torch.equal(moved, x)
    assert moved.data_ptr() != x.data_ptr()  # the caller may work on it in place


def test_detached_explainer_is_refused() -> None:
    class Detached:
        def __init__(self, model: nn.Module) -> None:
            self.forward_func = model

        def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
            saliency = differentiable(Saliency(self.forward_func))
            return saliency.attribute(inputs.detach(), target=target)

    case = mlp()
    with pytest.raises(NotDifferentiableError, match="a graph to the inputs, found none from Det"):
        distance(Detached(case.model), radius=0.1).perturb(case.inputs, target=1)


def test_progress_bar_shows_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    case = mlp()
    attack = top_k(Saliency(case.model), radius=0.1)
    attack.perturb(case.inputs)
    assert capsys.readouterr().err == ""
    attack.perturb(case.inputs, show_progress=True)
    assert "TopKAttack: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("where", ["surface", "uniform"])
@pytest.mark.parametrize("fixed", [0, 2])
def test_random_control_draws_from_the_ball(norm: Any, where: Any, fixed: int) -> None:
    x, stays = torch.zeros(2000, 3 + fixed), torch.arange(3 + fixed).expand(2000, -1) >= 3
    attack = RandomAttack(radius=0.5, norm=norm, distribution=where, keep_prediction=False)
    found = size(attack.perturb(x, annotation=stays), norm)
    if where == "surface":
        torch.testing.assert_close(found, torch.full((2000,), 0.5))
    else:
        # The share of a ball's volume within half its radius is 1/8; 4 standard errors.
        assert abs(float((found < 0.25).double().mean()) - 1 / 8) < 4 * (7 / 64 / 2000) ** 0.5


def test_random_control_redraws_what_changes_the_prediction() -> None:
    x = torch.full((4000, 1), 0.1)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    once, often = (RandomAttack(model, radius=0.5, n_tries=n, seed=0).perturb(x) for n in (1, 5))
    assert bool((once > 0).all())
    # Every second draw flips the sign: 1/2 and 1/32 stay at the clean input; 4 standard errors.
    for moved, share in ((once, 1 / 2), (often, 1 / 32)):
        found = float((moved == x).double().mean())
        assert abs(found - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_random_control_without_prediction_runs_no_model() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("run")

    moved = RandomAttack(fails, radius=0.5, keep_prediction=False).perturb(torch.zeros(2, 3))
    assert torch.equal(moved.abs(), torch.full((2, 3), 0.5))


X = torch.ones(2, 4).double()
M = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def wrong(*_: Any) -> Any:
    return True


BAD: dict[type[Exception], list[tuple[str, Make, dict[str, Any]]]] = {
    ValueError: [
        ("`radius`: expected one value, or 1", noise, {"radius": (1, 2)}),
        ("`norm`: expected one of 'Linf', 'L2'", noise, {"norm": "L1"}),
        ("`n_tries`: expected an integer", noise, {"n_tries": 0}),
        ("`distribution`: expected one of", noise, {"distribution": "ball"}),
        ("`step_num`: expected an integer", distance, {"step_num": 0}),
        ("`n_restarts`: expected an integer", distance, {"n_restarts": 0}),
        ("`step_size`: expected a positive", distance, {"step_size": -1}),
        ("`step_size`: expected one value, or 1", distance, {"step_size": (1, 1)}),
        ("`output_weight`: expected a finite", distance, {"output_weight": -1}),
        ("`dim`: expected different axes among 1 to 1", top_k, {"dim": 2}),
        (r"`betas\[1\]`: expected a positive", distance, {"betas": (1, -1)}),
        ("`k`: expected an integer", TopKAttack, {"k": 0}),
        (r"of DistanceAttack: .* shape \(2,\), found bool", DistanceAttack, {"distance": wrong}),
        ("`target_map`: expected numbers, or tensors", manipulation, {"target_map": "map"}),
        (r"to \(2, 4\), found shape \(2, 8\)", manipulation, {"target_map": X.repeat(1, 2)}),
        ("`target_map`: expected one value, or 1", manipulation, {"target_map": (X, X)}),
        ("bounds: expected numbers, or tensors", noise, {"lower_bound": -X[0, :3]}),
    ],
    TypeError: [
        ("`explainer`: expected an object with", top_k, {"explainer": 3}),
        ("`forward_func`: expected the model whose prediction", noise, {"explainer": None}),
        ("`forward_func`: expected the model whose pre", manipulation, {"explainer": Noisy()}),
        ("abstract", AttributionAttack, {}),
    ],
}


@pytest.mark.parametrize(
    ("error", "text", "make", "options"), [(e, *row) for e, rows in BAD.items() for row in rows]
)
def test_bad_options_give_one_clear_error(
    error: type[Exception], text: str, make: Make, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=text):
        make(**{"explainer": Saliency(M), "radius": 1, **options}).perturb(X)
