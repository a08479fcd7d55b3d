"""Expected gradients: closed forms, Captum's calls, estimators, chunks, randomness, errors."""

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import GradientShap, IntegratedGradients, NoiseTunnel
from torch import Tensor

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


def test_noise_tunnel_takes_it() -> None:
    case = mlp()
    tunnel = NoiseTunnel(ExpectedGradients(case.model))
    found = tunnel.attribute(
        case.inputs, nt_samples=2, stdevs=0.0, baselines=case.baselines[:1], target=1, n_samples=200
    )
    # One reference and stratified positions: integrated gradients up to quadrature error.
    expected = exact(Case(case.model, case.inputs, case.baselines[:1], 1))
    assert_same_numbers(found.detach(), expected, 0.01)


BAD: dict[str, dict[str, Any]] = {
    "at least one reference row": {"baselines": torch.zeros(0, 4, dtype=torch.float64)},
    r"expected .*\.to\(inputs": {"baselines": torch.zeros(3, 4, dtype=torch.float32)},
    "found torch.float64 on meta": {
        "baselines": torch.zeros(3, 4, device="meta", dtype=torch.float64)
    },
    "a tensor of reference rows": {"baselines": None},
    "one for each input": {"baselines": (torch.zeros(3, 4),) * 2},
    "n_samples.*found 2.5": {"n_samples": 2.5},
    "internal_batch_size": {"internal_batch_size": 0},
    "stdevs.*found -1": {"stdevs": -1.0},
    r"stdevs.*found": {"stdevs": (0.1, 0.1)},
    "5 examples": {"target": torch.zeros(3).long()},
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_refused_before_anything_is_drawn(text: str) -> None:
    case = mlp()
    call = {"inputs": case.inputs, "baselines": case.baselines, "target": 1, **BAD[text]}
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=text):
        ExpectedGradients(case.model).attribute(**call)
    assert torch.equal(state, torch.get_rng_state())
