"""Laws of every attack: ball, range, prediction, no trace; and that each does what it is for."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import (
    DeepLift,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
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
from captum_priors.attacks._base import BoundedPerturbation
from captum_priors.distances import mse, pearson
from tests.asserts import leaves_no_trace
from tests.cases import Case, cnn, mlp, relu_cnn, relu_mlp, rows, tuple_inputs

Make = Callable[..., Any]


def top_k(explainer: Any, **options: Any) -> Any:
    return TopKAttack(explainer, 2, step_num=4, **options)


def manipulation(explainer: Any, **options: Any) -> Any:
    return ManipulationAttack(explainer, step_num=4, **options)


def mass_center(explainer: Any, **options: Any) -> Any:
    return MassCenterAttack(explainer, step_num=4, **options)


def distance(explainer: Any, **options: Any) -> Any:
    return DistanceAttack(explainer, mse, step_num=4, **options)


def noise(explainer: Any, **options: Any) -> Any:
    return RandomAttack(explainer, **options)


GRADIENT = [top_k, manipulation, mass_center, distance]
every_attack = pytest.mark.parametrize("make", rows([*GRADIENT, noise]))
gradient_attack = pytest.mark.parametrize("make", rows(GRADIENT))


def _each(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _size(offset: Tensor, norm: str) -> Tensor:
    return offset.flatten(1).norm(dim=1, p=float("inf") if norm == "Linf" else 2)


def _run(case: Case, inputs: Any) -> Tensor:
    return case.model(*_each(inputs), *(case.args or ()))


@every_attack
@settings(max_examples=12, deadline=None)
@given(
    radius=st.floats(1e-3, 3),
    norm=st.sampled_from(["Linf", "L2"]),
    width=st.floats(0.0, 1.0),
    start=st.booleans(),
    seed=st.integers(0, 2**32),
    model=st.sampled_from([relu_mlp, tuple_inputs, relu_cnn]),
)
def test_stays_in_ball_and_range_and_keeps_the_prediction(
    make: Make, radius: float, norm: Any, width: float, start: bool, seed: int, model: Any
) -> None:
    torch.manual_seed(seed)
    case = model()
    low = min(float(t.min()) for t in _each(case.inputs)) - width
    high = max(float(t.max()) for t in _each(case.inputs)) + width
    options: dict[str, Any] = {} if make is noise else {"random_start": start}
    attack = make(
        Saliency(case.model),
        radius=radius,
        norm=norm,
        lower_bound=low,
        upper_bound=high,
        **options,
    )
    before = copy.deepcopy(case.inputs)
    moved = attack.perturb(case.inputs, target=1, additional_forward_args=case.args)
    assert isinstance(moved, tuple) == isinstance(case.inputs, tuple)
    for x, clean, z in zip(_each(case.inputs), _each(before), _each(moved), strict=True):
        assert torch.equal(x, clean)
        assert z.shape == x.shape
        assert z.dtype == x.dtype
        assert not z.requires_grad
        # x + d - x differs from d by the rounding of the sum.
        rounding = 1e-12 * (1 + float(x.abs().max()))
        assert float(_size(z - x, norm).max()) <= radius + rounding
        assert float(z.min()) >= low
        assert float(z.max()) <= high
    assert torch.equal(_run(case, moved).argmax(1), _run(case, before).argmax(1))


@gradient_attack
def test_never_ends_below_the_clean_input(make: Make) -> None:
    for model in (mlp, relu_cnn):
        case = model()
        explainer = differentiable(Saliency(case.model))
        attack = make(explainer, radius=0.4)
        moved = attack.perturb(case.inputs, target=case.target)
        maps = [
            _each(explainer.attribute(x, target=case.target).detach()) for x in (case.inputs, moved)
        ]
        clean = attack.prepare(maps[0])
        before, after = (attack.score(m, clean) for m in maps)
        assert bool((after >= before).all())
        assert bool((after > before).any())


class Misjudged(DistanceAttack):
    """Climbs the distance and is ranked by its opposite."""

    def score(self, attributions: Any, clean: Any) -> Tensor:
        return -self.objective(attributions, clean)


def test_points_that_rank_below_the_clean_input_are_not_taken() -> None:
    case = mlp()
    attack = Misjudged(Saliency(case.model), mse, radius=0.3, step_num=3)
    assert torch.equal(attack.perturb(case.inputs, target=1), case.inputs)


class Everything(nn.Module):
    """Statistics, dropout and a kink."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.4)
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.fails_after: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fails_after is not None:
            if self.fails_after == 0:
                raise RuntimeError("the model fails midway")
            self.fails_after -= 1
        return self.head(self.dropout(torch.relu(self.hidden(self.norm(x)))))


def _in_training() -> tuple[Everything, Tensor]:
    model, x = Everything(), torch.randn(7, 4)
    model(x).square().sum().backward()
    return model, x


@every_attack
@pytest.mark.parametrize("block", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_leaves_no_trace(make: Make, block: Any) -> None:
    model, x = _in_training()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    options: dict[str, Any] = {}
    explainer: Any = Saliency(model)
    if make is not noise:
        explainer = ExpectedGradients(model)
        options = {"baselines": x, "generator": generator}
    attack = make(explainer, radius=0.3, **options)
    with leaves_no_trace(model, tensors=[x]), block():
        moved = attack.perturb(x)
    assert not torch.equal(moved, x)
    assert torch.equal(generator.get_state(), before)


@every_attack
@pytest.mark.parametrize("fails_after", [0, 1])
def test_leaves_no_trace_when_the_model_raises(make: Make, fails_after: int) -> None:
    model, x = _in_training()
    attack = make(Saliency(model), radius=0.3)
    model.fails_after = fails_after
    with leaves_no_trace(model, tensors=[x]), pytest.raises(RuntimeError, match="fails midway"):
        attack.perturb(x)
    assert torch.relu(-torch.ones(1)).item() == 0


@every_attack
def test_judges_the_model_as_in_evaluation(make: Make) -> None:
    model, x = _in_training()
    twin = copy.deepcopy(model).eval()
    moved, expected = (make(Saliency(m), radius=0.3, seed=1).perturb(x) for m in (model, twin))
    torch.testing.assert_close(moved, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", rows([top_k, mass_center, distance]))
def test_examples_do_not_depend_on_their_batch(make: Make) -> None:
    case = relu_mlp()
    attack = make(Saliency(case.model), radius=0.3, random_start=False)
    together = attack.perturb(case.inputs, target=[0, 1, 2, 1, 0])
    alone = [
        attack.perturb(case.inputs[i : i + 1], target=t) for i, t in enumerate([0, 1, 2, 1, 0])
    ]
    # Sums over a batch of another size round otherwise; steps are by sign.
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)


@every_attack
def test_draws_follow_the_seed_or_the_global_generator(make: Make) -> None:
    case = relu_mlp()
    fixed = make(Saliency(case.model), radius=0.3, seed=5)
    first = fixed.perturb(case.inputs, target=1)
    torch.manual_seed(8)
    assert torch.equal(first, fixed.perturb(case.inputs, target=1))
    free = make(Saliency(case.model), radius=0.3)
    second = free.perturb(case.inputs, target=1)
    assert torch.equal(second, free.perturb(case.inputs, target=1))
    torch.manual_seed(9)
    assert not torch.equal(second, free.perturb(case.inputs, target=1))


def test_signatures_agree_with_captum_s() -> None:
    for cls in (TopKAttack, ManipulationAttack, MassCenterAttack, DistanceAttack, RandomAttack):
        assert issubclass(cls, Perturbation)
        first = list(inspect.signature(cls.perturb).parameters)[:4]
        assert first == ["self", "inputs", "target", "additional_forward_args"]
    case = mlp()
    attack = top_k(Saliency(case.model), radius=0.1)
    assert torch.equal(attack(case.inputs), attack.perturb(case.inputs))


EXPLAINERS: list[tuple[str, Callable[[nn.Module], Any], dict[str, Any]]] = [
    ("InputXGradient", InputXGradient, {}),
    ("IG", IntegratedGradients, {"n_steps": 5}),
    ("IG-chunked", IntegratedGradients, {"n_steps": 5, "internal_batch_size": 4}),
    ("DeepLift", DeepLift, {}),
    ("EG", ExpectedGradients, {"baselines": torch.zeros(3, 1, 8, 8, dtype=torch.float64)}),
    ("GradientShap", GradientShap, {"baselines": torch.zeros(3, 1, 8, 8, dtype=torch.float64)}),
    ("Occlusion", Occlusion, {"sliding_window_shapes": (1, 4, 4), "strides": (1, 4, 4)}),
    ("SmoothGrad", lambda m: NoiseTunnel(Saliency(m)), {"nt_samples": 2, "stdevs": 0.1}),
    (
        "Saliency-recompute",
        lambda m: differentiable(Saliency(m), differentiation="recompute"),
        {},
    ),
    (
        "Saliency-finite-difference",
        lambda m: differentiable(Saliency(m), differentiation="finite_difference"),
        {},
    ),
]


@pytest.mark.parametrize(
    ("make", "options"), [pytest.param(*row[1:], id=row[0]) for row in EXPLAINERS]
)
def test_works_on_any_differentiable_explainer(
    make: Callable[[nn.Module], Any], options: dict[str, Any]
) -> None:
    activation = nn.ReLU() if make is DeepLift else None
    case = relu_cnn()
    if activation is not None:
        case = Case(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 12), activation, nn.Linear(12, 3)),
            case.inputs,
            None,
            1,
        )
    before = torch.get_default_dtype()
    explainer = make(case.model)
    attack = DistanceAttack(explainer, mse, radius=0.3, step_num=6, random_start=False, **options)
    moved = attack.perturb(case.inputs, target=1)
    assert torch.get_default_dtype() == before
    # From a clean start, only a gradient can have moved anything.
    assert float((moved - case.inputs).abs().max()) > 0.05


def test_attack_gradient_is_that_of_the_explainer() -> None:
    case = mlp()
    explainer = differentiable(Saliency(case.model))
    attack = DistanceAttack(
        explainer, mse, radius=0.2, step_num=1, step_size=0.5, betas=None, seed=2, abs=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        start = case.inputs + 0.2 * (2 * torch.rand_like(case.inputs) - 1)
    leaf = start.clone().requires_grad_()
    clean = explainer.attribute(case.inputs, target=1, abs=False).detach()
    value = mse(explainer.attribute(leaf, target=1, abs=False), clean).sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    step = (start + 0.1 * gradient.sign() - case.inputs).clamp(-0.2, 0.2) + case.inputs
    scores = [
        mse(explainer.attribute(p, target=1, abs=False), clean).detach() for p in (start, step)
    ]
    labels = case.model(case.inputs).argmax(1)
    keeps = [case.model(p).argmax(1) == labels for p in (start, step)]
    best = case.inputs.clone()
    top = torch.zeros(len(best))
    for point, score, keep in zip((start, step), scores, keeps, strict=True):
        better = keep & (score > top)
        best[better], top[better] = point[better], score[better]
    torch.testing.assert_close(attack.perturb(case.inputs, target=1), best, rtol=0, atol=1e-12)


def test_relu_maps_move_only_with_smoothed_steps() -> None:
    case = relu_mlp()
    moved = {
        betas: DistanceAttack(
            Saliency(case.model), mse, radius=0.3, step_num=5, random_start=False, betas=betas
        ).perturb(case.inputs, target=1)
        for betas in (None, (5.0, 20.0))
    }
    assert torch.equal(moved[None], case.inputs)
    assert not torch.equal(moved[5.0, 20.0], case.inputs)


def test_steepness_grows_geometrically() -> None:
    attack = DistanceAttack(Saliency(nn.Linear(2, 1)), mse, radius=1, step_num=3, betas=(10, 1000))
    found = [attack.steepness(i) for i in range(3)]
    assert found == pytest.approx([10, 100, 1000])


def test_more_restarts_are_never_worse() -> None:
    case = relu_cnn()
    explainer = differentiable(Saliency(case.model))
    scores = []
    for n_restarts in (1, 3):
        attack = DistanceAttack(
            explainer, pearson, radius=0.3, step_num=3, n_restarts=n_restarts, seed=0
        )
        maps = [
            explainer.attribute(x, target=1).detach()
            for x in (case.inputs, attack.perturb(case.inputs, target=1))
        ]
        scores.append(pearson(*maps))
    assert bool((scores[1] >= scores[0]).all())


def test_mass_center_of_a_known_map() -> None:
    attack = MassCenterAttack(Saliency(nn.Linear(2, 1)), radius=1)
    maps = torch.zeros(1, 2, 5, 7)
    maps[0, 0, 1, 2], maps[0, 1, 3, 6] = 3.0, -1.0
    assert attack.prepare((maps,))[0].tolist() == [[1.5, 3.0]]
    assert attack.prepare((torch.zeros(1, 3),))[0].tolist() == [[0.0]]


def test_manipulation_approaches_the_given_map() -> None:
    case = cnn()
    explainer = differentiable(InputXGradient(case.model))
    clean = explainer.attribute(case.inputs, target=1).detach()
    wanted = clean.abs().flip(-1)
    attack = ManipulationAttack(
        explainer, wanted, radius=0.5, step_num=40, keep_prediction=False, output_weight=0.0
    )
    moved = explainer.attribute(attack.perturb(case.inputs, target=1), target=1).detach()
    before, after = (
        (attack._normal((m,)) - attack._normal((wanted,))).square().mean(1) for m in (clean, moved)
    )
    assert bool((after < 0.7 * before).all())


def test_manipulation_imitates_the_next_example_by_default() -> None:
    attack = ManipulationAttack(Saliency(nn.Linear(3, 1)), radius=1)
    maps = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    expected = torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.0, 1.5]])
    assert torch.equal(attack.prepare((maps,)), expected)
    assert torch.equal(attack.prepare((maps[:1],)), expected[1:].flip(1))


def test_output_weight_keeps_the_outputs() -> None:
    case = relu_cnn()
    changes = []
    for weight in (0.0, 1e4):
        attack = ManipulationAttack(
            Saliency(case.model),
            radius=0.5,
            step_num=20,
            output_weight=weight,
            random_start=False,
            seed=0,
        )
        moved = attack.perturb(case.inputs, target=1)
        p, q = (case.model(x).softmax(1) for x in (case.inputs, moved))
        changes.append((p - q).square().sum().item())
    assert changes[1] < changes[0] / 2


def test_predictions_are_kept_in_the_sense_asked_for() -> None:
    case = relu_mlp()
    seen = []

    def close(outputs: Tensor, clean: Tensor) -> Tensor:
        seen.append(outputs)
        return (outputs - clean).abs().amax(1) < 0.05

    moved = distance(Saliency(case.model), radius=0.5, keep_prediction=close).perturb(
        case.inputs, target=1
    )
    assert seen
    assert (case.model(moved) - case.model(case.inputs)).abs().max().item() < 0.05
    logit = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    moved = distance(Saliency(logit), radius=2.0).perturb(case.inputs)
    assert torch.equal(logit(moved) > 0, logit(case.inputs) > 0)


def test_explains_the_predicted_class_by_default() -> None:
    case = relu_mlp()
    attack = top_k(Saliency(case.model), radius=0.3, seed=1)
    labels = case.model(case.inputs).argmax(1)
    assert torch.equal(attack.perturb(case.inputs), attack.perturb(case.inputs, target=labels))


def test_bounds_and_radii_may_differ_between_inputs_and_channels() -> None:
    case = tuple_inputs()
    a, b = case.inputs
    low = torch.full((2, 1), -0.3) + a.amin()
    attack = distance(
        Saliency(case.model),
        radius=(0.1, 0.5),
        lower_bound=(low, float("-inf")),
        keep_prediction=False,
    )
    x, y = attack.perturb(case.inputs, target=1, additional_forward_args=case.args)
    assert 0 < float((x - a).abs().max()) <= 0.1 + 1e-12
    assert 0.1 < float((y - b).abs().max()) <= 0.5 + 1e-12


def test_constant_maps_are_left_alone() -> None:
    x = torch.randn(3, 4)
    attack = top_k(Saliency(nn.Linear(4, 2)), radius=0.1, random_start=False)
    assert torch.equal(attack.perturb(x, target=0), x)


class Detached:
    """An explainer that forgets how its maps depend on the inputs."""

    def __init__(self, model: nn.Module) -> None:
        self.forward_func = model

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        return differentiable(Saliency(self.forward_func)).attribute(inputs.detach(), target=target)


def test_detached_explainer_is_refused() -> None:
    case = mlp()
    with pytest.raises(NotDifferentiableError, match="a graph to the inputs, found none from Det"):
        distance(Detached(case.model), radius=0.1).perturb(case.inputs, target=1)


def test_explainer_without_a_known_model() -> None:
    x = torch.ones(2, 4)
    attack = distance(Free(), radius=0.5, keep_prediction=False)
    # Squares move furthest at either end of the ball.
    torch.testing.assert_close((attack.perturb(x) - 1).abs(), torch.full((2, 4), 0.5))


def test_progress_bar_shows_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    case = mlp()
    attack = top_k(Saliency(case.model), radius=0.1)
    attack.perturb(case.inputs)
    assert capsys.readouterr().err == ""
    attack.perturb(case.inputs, show_progress=True)
    assert "TopKAttack: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("where", ["surface", "uniform"])
def test_random_control_draws_from_the_ball(norm: Any, where: Any) -> None:
    x = torch.zeros(2000, 3)
    attack = RandomAttack(radius=0.5, norm=norm, distribution=where, keep_prediction=False)
    size = _size(attack.perturb(x), norm)
    if where == "surface":
        torch.testing.assert_close(size, torch.full((2000,), 0.5))
    else:
        # The share of a ball's volume within half its radius is 1/8; 4 standard errors.
        assert abs(float((size < 0.25).double().mean()) - 1 / 8) < 4 * (7 / 64 / 2000) ** 0.5


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


class Free:
    """An explainer that does not say what it explains."""

    def attribute(self, inputs: Tensor) -> Tensor:
        return inputs.square()


M = nn.Linear(4, 3).double()
BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("explainer", lambda: top_k(3, radius=1), TypeError, "`explainer`: expected an object with"),
    ("class", lambda: top_k(Saliency, radius=1), TypeError, "found the class Saliency"),
    ("radius", lambda: top_k(Saliency(M), radius=0), ValueError, "`radius`: expected a positive"),
    ("norm", lambda: noise(M, radius=1, norm="L1"), ValueError, "`norm`: expected one of 'Linf'"),
    ("k", lambda: TopKAttack(Saliency(M), 0, radius=1), ValueError, "`k`: expected an integer"),
    (
        "many-k",
        lambda: TopKAttack(Saliency(M), 4, radius=1).perturb(torch.ones(2, 4)),
        ValueError,
        "`k`: expected fewer than the 4 features, found 4",
    ),
    ("betas", lambda: distance(Saliency(M), radius=1, betas=3), ValueError, "`betas`: expected a"),
    (
        "step",
        lambda: distance(Saliency(M), radius=1, step_size=-1),
        ValueError,
        "`step_size`: expected a positive",
    ),
    (
        "distance",
        lambda: DistanceAttack(Saliency(M), "mse", radius=1),
        TypeError,
        "`distance`: expected a function",
    ),
    (
        "map-type",
        lambda: ManipulationAttack(Saliency(M), [1.0], radius=1),
        TypeError,
        "`target_map`: expected a tensor",
    ),
    (
        "map-shape",
        lambda: ManipulationAttack(Saliency(M), torch.ones(5), radius=1).perturb(torch.ones(2, 4)),
        ValueError,
        "`target_map`: expected maps that fit",
    ),
    (
        "bounds",
        lambda: noise(M, radius=1, upper_bound=0.5).perturb(torch.ones(2, 4)),
        ValueError,
        "`inputs`: expected values between `lower_bound` and `upper_bound`",
    ),
    (
        "bound-shape",
        lambda: noise(M, radius=1, upper_bound=torch.ones(3)).perturb(torch.ones(2, 4)),
        ValueError,
        "bounds: expected numbers, or tensors that broadcast",
    ),
    (
        "radii",
        lambda: noise(M, radius=(1, 2)).perturb(torch.ones(2, 4)),
        ValueError,
        "`radius`: expected one value, or 1",
    ),
    (
        "model",
        lambda: RandomAttack(radius=1),
        TypeError,
        "`forward_func`: expected the model whose prediction",
    ),
    (
        "outputs",
        lambda: ManipulationAttack(Free(), radius=1, keep_prediction=False),
        TypeError,
        "`forward_func`: expected the model whose outputs",
    ),
    (
        "same",
        lambda: noise(M, radius=1, keep_prediction=lambda a, b: True).perturb(torch.ones(2, 4)),
        ValueError,
        r"`keep_prediction`: expected truth values of shape \(2,\), found bool",
    ),
    (
        "integers",
        lambda: noise(M, radius=1).perturb(torch.ones(2, 4, dtype=torch.long)),
        TypeError,
        "floating-point",
    ),
    (
        "objective",
        lambda: DistanceAttack(Saliency(M), lambda a, b: a, radius=1).perturb(torch.ones(2, 4)),
        ValueError,
        r"objective of DistanceAttack: expected a tensor of shape \(2,\)",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD]
)
def test_bad_input_gives_one_clear_error(
    call: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


def test_base_classes_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        AttributionAttack(Saliency(M), radius=1)  # type: ignore[abstract]  # on purpose
    assert issubclass(AttributionAttack, BoundedPerturbation)
