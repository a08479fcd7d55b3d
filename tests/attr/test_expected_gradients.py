"""Expected gradients: closed forms, Captum's calls, estimators, chunks, randomness, errors."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import GradientShap, IntegratedGradients, NoiseTunnel
from torch import Tensor, nn

from captum_priors import ExpectedGradients
from tests.asserts import as_tuple, assert_same_numbers, assert_unbiased
from tests.cases import MODELS, Case, mlp, rows, tuple_inputs

ESTIMATORS = ["monte_carlo", "control_variate"]


def exact(case: Case, n_steps: int = 60) -> Any:
    """Expected gradients by quadrature over the path and all reference rows."""
    ig = IntegratedGradients(case.model)
    n = as_tuple(case.baselines)[0].shape[0]
    total = None
    for r in range(n):
        row = tuple(b[r : r + 1] for b in as_tuple(case.baselines))
        baselines = row if isinstance(case.inputs, tuple) else row[0]
        each = as_tuple(
            ig.attribute(case.inputs, baselines=baselines, n_steps=n_steps, **case.call)
        )
        total = each if total is None else tuple(a + b for a, b in zip(total, each, strict=True))
    assert total is not None
    mean = tuple(t.detach() / n for t in total)
    return mean if isinstance(case.inputs, tuple) else mean[0]


@pytest.mark.parametrize("n_samples", [2, 5, 7, 10])
def test_linear_model_is_exact_for_any_number_of_samples(n_samples: int) -> None:
    weight, x, references = torch.randn(4), torch.randn(5, 4), torch.randn(7, 4)
    found = ExpectedGradients(lambda z: z @ weight).attribute(x, references, n_samples)
    assert_same_numbers(found, weight * (x - references.mean(0)), 1e-14)


def test_linear_model_one_sample_takes_one_reference_each() -> None:
    """w (x - x') for some row x'; without replacement over as many samples as rows, all rows."""
    weight, x, references = torch.rand(3) + 1, torch.randn(4, 3), torch.randn(6, 3)
    explainer = ExpectedGradients(lambda z: z @ weight)
    drawn = x - explainer.attribute(x, references, 1).detach() / weight
    distance = (drawn.unsqueeze(1) - references).abs().amax(2)
    assert float(distance.amin(1).max()) < 1e-13
    paper = explainer.attribute(x, references, 6, estimator="monte_carlo")
    assert_same_numbers(paper, weight * (x - references.mean(0)), 1e-13)


def test_quadratic_model_closed_form() -> None:
    """f = x'Ax has the integrated gradients (x - b) * A(x + b), here averaged over rows."""
    a = torch.randn(4, 4)
    a = a + a.T
    x, references = torch.randn(3, 4), torch.randn(5, 4)
    expected = torch.stack([(x - b) * ((x + b) @ a) for b in references]).mean(0)
    explainer = ExpectedGradients(lambda z: torch.einsum("bi,ij,bj->b", z, a, z))
    many = x.repeat_interleave(2000, 0)
    found = explainer.attribute(many, references, 5).detach().reshape(3, 2000, 4)
    error = (found.mean(1) - expected).abs() / (found.std(1) / 2000**0.5)
    assert float(error.max()) < 4.5  # standard errors, twelve entries


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n_samples", [2, 3, 7, 11])
@pytest.mark.parametrize("stdevs", [0.0, 0.5])
def test_unbiased(estimator: Any, n_samples: int, stdevs: float) -> None:
    """A cubic model has closed-form expectations, with and without noise on the inputs."""
    weight, x, references = torch.randn(3), torch.randn(2, 3), torch.randn(7, 3)
    expected = weight * (x**3 + 3 * x * stdevs**2 - (references**3).mean(0))
    explainer = ExpectedGradients(lambda z: (weight * z**3).sum(1))
    copies = 500

    def draw() -> Tensor:
        with torch.no_grad():
            many = explainer.attribute(
                x.repeat_interleave(copies, 0),
                references,
                n_samples,
                stdevs,
                estimator=estimator,
            )
        return many.reshape(2, copies, 3).mean(1)

    assert_unbiased(draw, expected, 40)


@pytest.mark.parametrize("joint", [True, False])
def test_unbiased_for_two_inputs(joint: bool) -> None:
    """Rows are drawn jointly where there are equally many, else independently, as noise is."""
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    rows_a = torch.randn(6, 3)
    rows_b = rows_a * 2 if joint else torch.randn(4, 3)
    explainer = ExpectedGradients(lambda u, v: (u * v).sum(1))
    pairs = (
        list(zip(rows_a, rows_b, strict=True))
        if joint
        else [(u, v) for u in rows_a for v in rows_b]
    )
    # Integrated gradients of a product: (a - a') (b + b') / 2 and the same with a and b exchanged.
    expected = (
        torch.stack([(a - u) * (b + v) / 2 for u, v in pairs]).mean(0),
        torch.stack([(b - v) * (a + u) / 2 for u, v in pairs]).mean(0),
    )
    copies = 800
    many = tuple(t.repeat_interleave(copies, 0) for t in (a, b))
    for i in range(2):

        def draw(i: int = i) -> Tensor:
            with torch.no_grad():
                found = explainer.attribute(many, (rows_a, rows_b), 3, stdevs=0.5)
            return found[i].reshape(2, copies, 3).mean(1)

        assert_unbiased(draw, expected[i], 25)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_error_falls_as_the_root_of_the_samples(estimator: Any) -> None:
    case = mlp()
    truth = exact(case)
    explainer = ExpectedGradients(case.model)
    errors = []
    for n_samples in (14, 224):
        repeats = [
            (
                explainer.attribute(
                    case.inputs, case.baselines, n_samples, target=case.target, estimator=estimator
                )
                - truth
            ).square()
            for _ in range(30)
        ]
        errors.append(float(torch.stack(repeats).mean().detach().sqrt()))
    # Sixteen times the samples: a quarter of the error, or better where strata help.
    assert errors[1] < 0.33 * errors[0]


def test_control_variate_has_less_error_than_the_paper() -> None:
    case = mlp()
    truth = exact(case)
    explainer = ExpectedGradients(case.model)

    def error(estimator: Any) -> float:
        repeats = [
            explainer.attribute(
                case.inputs, case.baselines, 5, target=case.target, estimator=estimator
            )
            - truth
            for _ in range(60)
        ]
        return float(torch.stack(repeats).square().mean().detach().sqrt())

    assert error("control_variate") < 0.8 * error("monte_carlo")


@pytest.mark.parametrize("make_case", rows(MODELS))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_completeness_in_the_mean_and_deltas(make_case: Any, estimator: Any) -> None:
    """Mean delta of an example = sum of its attributions - (f(x) - mean of f(drawn rows))."""
    case: Case = make_case()
    n = 2 * as_tuple(case.baselines)[0].shape[0]  # every row is drawn twice
    explainer = ExpectedGradients(case.model)
    attributions, delta = explainer.attribute(
        case.inputs,
        case.baselines,
        n,
        return_convergence_delta=True,
        estimator=estimator,
        internal_batch_size=7,
        **case.call,
    )
    batch = as_tuple(case.inputs)[0].shape[0]
    assert delta.shape == (batch * n,)
    assert not delta.requires_grad
    total = sum(a.flatten(1).sum(1) for a in as_tuple(attributions)).detach()
    gap = _explained_gap(case)
    assert_same_numbers(delta.reshape(batch, n).mean(1) + gap, total, 1e-10)


def _explained_gap(case: Case) -> Tensor:
    """f(x) - mean f(x') with each example's own target and arguments."""
    gaps = []
    inputs, baselines = as_tuple(case.inputs), as_tuple(case.baselines)
    for i in range(inputs[0].shape[0]):
        args = tuple(a[i : i + 1] if isinstance(a, Tensor) else a for a in (case.args or ()))
        chosen = case.target if isinstance(case.target, int) else case.target[i]
        here = case.model(*(x[i : i + 1] for x in inputs), *args)[0, chosen]
        n = baselines[0].shape[0]
        many = tuple(a.expand(n) if isinstance(a, Tensor) else a for a in args)
        gaps.append(here - case.model(*baselines, *many)[:, chosen].mean())
    return torch.stack(gaps).detach()


def test_deltas_are_those_of_captum_for_a_fixed_draw() -> None:
    """One reference row: nothing but the position on the path is random."""
    case = mlp()
    ours = ExpectedGradients(case.model).attribute(
        case.inputs,
        case.baselines[:1],
        200,
        target=case.target,
        return_convergence_delta=True,
        estimator="monte_carlo",
    )
    np.random.seed(0)  # noqa: NPY002  # the generator that Captum draws from
    theirs = GradientShap(case.model).attribute(
        case.inputs, case.baselines[:1], 200, target=case.target, return_convergence_delta=True
    )
    assert ours[1].shape == theirs[1].shape
    # Means over 200 positions of two independent draws.
    assert_same_numbers(ours[1].reshape(5, 200).std(1), theirs[1].reshape(5, 200).std(1), 0.3)


@pytest.mark.parametrize("make_case", rows(MODELS))
def test_takes_gradient_shap_calls(make_case: Any) -> None:
    """Positional and keyword, tensors, tuples, callables of either arity, noise, deltas."""
    case: Case = make_case()
    distribution = case.baselines
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((case.inputs, distribution), case.call),
        ((case.inputs, distribution, 3, 0.1, case.target, case.args), {}),
        ((case.inputs, lambda: distribution), case.call),
        ((case.inputs, lambda inputs: inputs), case.call),
        ((case.inputs, distribution, 2), {**case.call, "return_convergence_delta": True}),
    ]
    if isinstance(case.inputs, tuple):
        calls.append(((case.inputs, distribution, 2, (0.1, 0.0)), case.call))
    for args, named in calls:
        stock = GradientShap(case.model).attribute(*args, **named)
        ours = ExpectedGradients(case.model).attribute(*args, **named)
        assert _shapes(ours) == _shapes(stock)


def _shapes(value: Any) -> Any:
    return tuple(map(_shapes, value)) if isinstance(value, tuple) else tuple(value.shape)


def test_same_expectation_as_gradient_shap() -> None:
    case = mlp()
    np.random.seed(0)  # noqa: NPY002  # the generator that Captum draws from
    stock = GradientShap(case.model).attribute(
        case.inputs, case.baselines, 20_000, target=case.target
    )
    ours = ExpectedGradients(case.model).attribute(
        case.inputs, case.baselines, 2_000, target=case.target
    )
    assert_same_numbers(ours, stock, 0.03)  # Monte Carlo error of the stock estimate


@pytest.mark.parametrize("multiply", [True, False])
def test_without_multiplication_it_is_the_expected_gradient(multiply: bool) -> None:
    weight, x, references = torch.randn(4), torch.randn(5, 4), torch.randn(7, 4)
    explainer = ExpectedGradients(lambda z: z @ weight, multiply)
    found = explainer.attribute(x, references, 3)
    expected = weight * (x - references.mean(0)) if multiply else weight.expand(5, 4)
    assert_same_numbers(found, expected, 1e-13)
    assert explainer.multiplies_by_inputs is multiply


@pytest.mark.parametrize("rows_at_once", [1, 2, 4, 5, 9, 1000])
@pytest.mark.parametrize("stdevs", [0.0, 0.3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chunks_do_not_change_the_value(rows_at_once: int, stdevs: float, estimator: Any) -> None:
    case = tuple_inputs()
    seen: list[int] = []

    def model(a: Tensor, b: Tensor, scale: Tensor, power: float) -> Tensor:
        seen.append(len(a))
        return case.model(a, b, scale, power)

    def attribute(rows: int | None) -> Any:
        return ExpectedGradients(model).attribute(
            case.inputs,
            case.baselines,
            5,
            stdevs,
            estimator=estimator,
            internal_batch_size=rows,
            generator=torch.Generator().manual_seed(1),
            **case.call,
        )

    whole = attribute(None)
    seen.clear()
    assert_same_numbers(attribute(rows_at_once), whole, 1e-12)  # sums in another order
    assert max(seen) <= rows_at_once
    assert sum(seen) == 20


def test_generator_decides_and_global_seed_otherwise() -> None:
    case = mlp()
    explainer = ExpectedGradients(case.model)

    def attribute(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return explainer.attribute(
            case.inputs, case.baselines, target=case.target, generator=generator
        )

    assert torch.equal(attribute(1), attribute(1))
    assert not torch.equal(attribute(1), attribute(2))
    before = torch.get_rng_state()
    attribute(1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    first = attribute(None)
    assert not torch.equal(first, attribute(None))
    torch.manual_seed(5)
    assert torch.equal(first, attribute(None))


def test_draws_without_replacement_while_rows_last() -> None:
    from captum_priors.attr.path_sum import Draws

    for n_samples, n_rows in [(3, 100), (9, 10), (10, 10), (25, 10), (1, 4), (5, 1)]:
        draws = Draws.new(n_samples, 500, (n_rows,), stratified=True, generator=None)
        counts = torch.stack(
            [torch.bincount(column, minlength=n_rows) for column in draws.rows[0].T]
        )
        assert int(counts.max() - counts.min()) <= 1
        # Stratified positions: exactly one in each n-th of the path.
        strata = (draws.alphas * n_samples).floor().long().sort(0).values
        assert torch.equal(strata, torch.arange(n_samples).unsqueeze(1).expand(-1, 500))


@pytest.mark.parametrize(("n_samples", "n_rows"), [(2, 9), (3, 5), (3, 400)])
def test_rows_are_uniform(n_samples: int, n_rows: int) -> None:
    from captum_priors.attr.path_sum import Draws

    n = 40_000
    rows_drawn = Draws.new(n_samples, n, (n_rows,), stratified=False, generator=None).rows[0]
    for sample in rows_drawn:
        counts = torch.bincount(sample, minlength=n_rows).to(torch.float64)
        expected = n / n_rows
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        # Mean and standard deviation of chi-square with n_rows - 1 degrees of freedom.
        assert abs(chi_square - (n_rows - 1)) < 5 * (2 * (n_rows - 1)) ** 0.5


def test_inputs_keep_flags_and_graph() -> None:
    """A generator network upstream receives its gradient through non-leaf inputs."""
    case = mlp()
    upstream = nn.Linear(4, 4)
    x = upstream(case.inputs)
    found = []
    for way in ("double_backprop", "recompute"):
        explainer = ExpectedGradients(case.model, differentiation=way)
        value = explainer.attribute(
            x, case.baselines, target=1, generator=torch.Generator().manual_seed(0)
        )
        (gradient,) = torch.autograd.grad(value.square().sum(), upstream.weight, retain_graph=True)
        found.append(gradient)
    assert float(found[0].abs().max()) > 0
    assert_same_numbers(found[1], found[0], 1e-12)  # sums in another order
    assert not case.inputs.requires_grad


def test_gradient_reaches_learned_baselines() -> None:
    case = mlp()
    learned = case.baselines.requires_grad_()
    found = []
    for way in ("double_backprop", "recompute"):
        explainer = ExpectedGradients(case.model, differentiation=way)
        value = explainer.attribute(
            case.inputs, learned, 4, target=1, generator=torch.Generator().manual_seed(0)
        )
        found.append(torch.autograd.grad(value.square().sum(), learned)[0])
    assert_same_numbers(found[1], found[0], 1e-12)  # sums in another order
    assert float(found[0].abs().max()) > 0


def test_float32_and_autocast() -> None:
    case = mlp()
    double = ExpectedGradients(case.model).attribute(
        case.inputs, case.baselines, target=1, generator=torch.Generator().manual_seed(0)
    )
    case.model.float()

    def single() -> Tensor:
        # float32 has other random numbers than float64 only where they are drawn in it: positions
        # are drawn in the default dtype whatever the inputs are.
        return ExpectedGradients(case.model).attribute(
            case.inputs.float(),
            case.baselines.float(),
            target=1,
            generator=torch.Generator().manual_seed(0),
        )

    plain = single()
    assert plain.dtype == torch.float32
    assert_same_numbers(plain.double(), double, 1e-5)  # float32 rounding
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = single()
    assert half.dtype == torch.float32
    assert_same_numbers(half, plain, 0.1)  # bfloat16 has eight bits
    assert float((half - plain).detach().abs().max()) > 0


def test_noise_tunnel_takes_it() -> None:
    case = mlp()
    tunnel = NoiseTunnel(ExpectedGradients(case.model))
    found = tunnel.attribute(
        case.inputs, nt_samples=2, stdevs=0.0, baselines=case.baselines[:1], target=1, n_samples=200
    )
    # One reference and stratified positions: integrated gradients up to quadrature error.
    expected = exact(Case(case.model, case.inputs, case.baselines[:1], 1))
    assert_same_numbers(found.detach(), expected, 0.01)


def test_no_warnings_on_ordinary_calls() -> None:
    case = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExpectedGradients(case.model).attribute(case.inputs, case.baselines, target=1)


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "empty",
        {"baselines": torch.zeros(0, 4, dtype=torch.float64)},
        ValueError,
        "at least one reference row",
    ),
    ("shape", {"baselines": torch.zeros(3, 5)}, ValueError, r"rows of shape \(4,\)"),
    ("dtype", {"baselines": torch.zeros(3, 4, dtype=torch.float32)}, TypeError, r"\.to\(inputs"),
    (
        "device",
        {"baselines": torch.zeros(3, 4, device="meta", dtype=torch.float64)},
        TypeError,
        "found torch.float64 on meta",
    ),
    ("none", {"baselines": None}, TypeError, "a tensor of reference rows"),
    ("count", {"baselines": (torch.zeros(3, 4),) * 2}, ValueError, "one for each input"),
    ("array", {"inputs": np.zeros((2, 4))}, TypeError, "torch.as_tensor"),
    ("integers", {"inputs": torch.ones(5, 4).long()}, TypeError, "floating-point tensor"),
    ("no examples", {"inputs": torch.zeros(0, 4)}, ValueError, "non-empty batch"),
    ("samples", {"n_samples": 0}, ValueError, "n_samples"),
    ("samples", {"n_samples": 2.5}, ValueError, "n_samples"),
    ("chunk", {"internal_batch_size": 0}, ValueError, "internal_batch_size"),
    ("estimator", {"estimator": "exact"}, ValueError, "control_variate"),
    ("noise", {"stdevs": -1.0}, ValueError, "stdevs"),
    ("noises", {"stdevs": (0.1, 0.1)}, ValueError, "stdevs"),
    ("targets", {"target": torch.zeros(3).long()}, ValueError, "5 examples"),
    ("target type", {"target": torch.zeros(5)}, TypeError, "integer class indices"),
    ("no target", {"target": None}, ValueError, "target=..."),
]


@pytest.mark.parametrize(
    ("change", "error", "text"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD]
)
def test_bad_input(change: dict[str, Any], error: type[Exception], text: str) -> None:
    case = mlp()
    call = {"inputs": case.inputs, "baselines": case.baselines, "target": 1, **change}
    state = torch.get_rng_state()
    with pytest.raises(error, match=text):
        ExpectedGradients(case.model).attribute(**call)
    if "target=" not in text:  # a missing target shows in the output, after the draws
        assert torch.equal(state, torch.get_rng_state())


def test_bad_construction() -> None:
    with pytest.raises(TypeError, match="Pass the model itself"):
        ExpectedGradients(torch.zeros(3))
    with pytest.raises(ValueError, match="'recompute'"):
        ExpectedGradients(nn.Linear(2, 1), differentiation="exact")
