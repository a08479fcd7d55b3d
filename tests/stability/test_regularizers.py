"""Laws of every regularizer: its gradient, what it takes, how it composes, what it refuses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Lazy,
    NotDifferentiableError,
    Subsample,
)
from captum_priors.penalties import l1
from captum_priors.priors import Prior
from captum_priors.stability import (
    ATEX,
    R2ET,
    ActivationSensitivity,
    AttributionAlignment,
    CurvatureRegularization,
    HessianPenalty,
    JacobianRegularization,
    RobustAttribution,
    SaliencyGuided,
)
from captum_priors.testing import check_differentiable
from tests.asserts import assert_same_numbers, leaves_no_trace, relative_error
from tests.cases import REGULARIZERS, Case, Everything, RegularizerRow, cnn, mlp, rows, tuple_inputs

every_regularizer = pytest.mark.parametrize("row", rows(REGULARIZERS))
every_way = pytest.mark.parametrize(
    ("row", "way"),
    [
        pytest.param(row, way, id=f"{row.name}-{way}")
        for row in REGULARIZERS
        for way in row.ways or ("double_backprop",)
    ],
)


class AsExplainer:
    """Lets the certificate of explainers check a regularizer."""

    def __init__(self, prior: Prior) -> None:
        # Evaluation: the same random numbers at each call.
        self.prior = prior.eval()

    def attribute(self, inputs: Any, **call: Any) -> Tensor:
        return self.prior(inputs, **call)


def labelled(case: Case) -> dict[str, Any]:
    """Keywords of a call with a class label for each example."""
    n = len(case.inputs[0] if isinstance(case.inputs, tuple) else case.inputs)
    return {"target": torch.arange(n) % 2, "additional_forward_args": case.args}


def made(row: RegularizerRow, case: Case, way: str = "double_backprop", **options: Any) -> Prior:
    """Make a regularizer whose value has all of its gradient: ATEX takes its own as a constant."""
    if row.cls is ATEX:
        teacher = copy.deepcopy(case.model).requires_grad_(False)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.3)
        explainer = {"explainer": Saliency(teacher), "abs": False}
        options = {**explainer, "teacher": teacher, **options}
    return row.make(case.model, way, **options)


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(found, model.parameters(), strict=True)
    ]


@every_way
@pytest.mark.parametrize("make", [mlp, cnn, tuple_inputs], ids=lambda make: make.__name__)
def test_certificate(row: RegularizerRow, way: str, make: Callable[[], Case]) -> None:
    case = make()
    prior = made(row, case, way)
    # Difference quotients of .2 % steps have the error of their steps, here up to 1e-5.
    tolerance = 1e-6 if way == "double_backprop" else 1e-4
    found = check_differentiable(
        AsExplainer(prior),
        case.inputs,
        parameters=case.model.named_parameters(),
        tolerance=tolerance,
        **labelled(case),
    )
    assert found.passed


@every_regularizer
def test_certificate_of_a_smoothed_network(row: RegularizerRow) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    case = Case(model, torch.randn(5, 4), None, 0)
    prior = made(row, case, smooth=3)
    call = labelled(case)
    assert check_differentiable(
        AsExplainer(prior), case.inputs, parameters=model.named_parameters(), **call
    ).passed


@every_regularizer
def test_gradient_reaches_nothing_but_the_model_and_is_of_use(row: RegularizerRow) -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 1e-2)
    prior = made(row, case).eval()  # one draw, so that the value can be compared
    before = prior(case.inputs, **labelled(case))
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert prior(case.inputs, **labelled(case)) < before
    assert not any(p.requires_grad for p in prior.parameters())


@every_regularizer
def test_mean_over_examples_whatever_the_batch(row: RegularizerRow) -> None:
    case = mlp()
    call = labelled(case)
    for n in (5, 3, 1):
        part = {"target": call["target"][:n]}
        torch.manual_seed(1)
        mean = made(row, case).eval()(case.inputs[:n], **part)
        torch.manual_seed(1)
        total = made(row, case, reduction="sum").eval()(case.inputs[:n], **part)
        assert_same_numbers(n * mean, total)
        assert mean > 0


@every_way
def test_examples_do_not_influence_each_other(row: RegularizerRow, way: str) -> None:
    """A sum over examples of what each one is with its own draws: no mixed differences."""
    case = cnn()
    prior, y = made(row, case, way, reduction="sum").eval(), torch.tensor([0, 1, 1])
    others = torch.randn_like(case.inputs)

    def value(*changed: int) -> Tensor:
        x = case.inputs.clone()
        x[list(changed)] = others[list(changed)]
        return prior(x, target=y).detach()

    changes = [value(i) - value() for i in range(3)]
    assert min(abs(change) for change in changes) > 1e-6 * value()
    assert_same_numbers(value(0, 1, 2) - value(), sum(changes), 1e-9)  # differences of sums


def in_single_precision(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same numbers whatever the precision that is asked for."""

    def drawn(*args: Any, dtype: Any = None, **options: Any) -> Tensor:
        like = args[0] if isinstance(args[0], Tensor) else torch.empty(0, dtype=dtype)
        given = (args[0].float(), *args[1:]) if isinstance(args[0], Tensor) else args
        return draw(*given, dtype=torch.float32, **options).to(like.dtype)

    return drawn


@every_regularizer
def test_single_precision(row: RegularizerRow, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rand", "rand_like", "randn", "randn_like", "randint_like"):
        monkeypatch.setattr(torch, name, in_single_precision(getattr(torch, name)))
    case = mlp()
    x, call = case.inputs.float(), labelled(case)
    prior = made(row, case).eval()
    exact = prior(x.double(), **call).item()
    state = prior.state_dict()
    case.model.float()
    prior = made(row, case).eval()
    prior.load_state_dict(state)
    value = prior(x, **call)
    assert value.dtype == torch.float32
    # Differences of gradients in single precision.
    assert abs(value.item() - exact) < 1e-4 * exact


@every_regularizer
def test_autocast(row: RegularizerRow) -> None:
    case = mlp()
    model = case.model.float()
    x, call = case.inputs.float(), labelled(case)
    prior = made(row, case).eval()
    exact = prior(x, **call)
    with torch.autocast("cpu", torch.bfloat16):
        value = prior(x, **call)
    value.backward()
    assert value.dtype == torch.float32
    # A few roundings to eight bits, doubled by squares; differences lose two bits more.
    differences = ("CURE", "Hessian-differences", "Sensitivity")
    tolerance = 2.0 ** (-3 if row.name in differences else -5)
    assert abs(value.item() - exact.item()) < tolerance * exact.item()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@every_regularizer
def test_frozen_parameters(row: RegularizerRow) -> None:
    case = mlp()
    case.model[0].requires_grad_(False)
    prior = made(row, case)
    prior(case.inputs, **labelled(case)).backward()
    assert case.model[0].weight.grad is None
    assert case.model[2].weight.grad.abs().max() > 0


@every_regularizer
@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_value_without_gradients(row: RegularizerRow, block: Any) -> None:
    case = mlp()
    prior = made(row, case).eval()
    expected = prior(case.inputs, **labelled(case))
    with leaves_no_trace(case.model, prior), block():
        value = prior(case.inputs, **labelled(case))
    assert not value.requires_grad
    assert_same_numbers(value, expected.detach())


@every_regularizer
def test_sums_multiples_and_wrappers(row: RegularizerRow) -> None:
    case = mlp()
    call = labelled(case)
    other = AttributionPrior(ExpectedGradients(case.model), l1, baselines=case.baselines).eval()
    prior = made(row, case).eval()
    p, q = (gradients(term(case.inputs, **call), case.model) for term in (prior, other))
    combined = sum([0.5 * prior, 2 * other])
    found = gradients(combined(case.inputs, **call), case.model)
    expected = [0.5 * a + 2 * b for a, b in zip(p, q, strict=True)]
    assert relative_error(found, expected) < 1e-13  # another order of sums
    assert repr(combined).startswith(f"0.5 * {row.cls.__name__}(")
    lazy = Lazy(made(row, case), every=2)
    assert lazy(case.inputs, **call) > 0
    assert lazy(case.inputs, **call) == 0
    assert Subsample(made(row, case), 0.5)(case.inputs, **call) > 0
    with pytest.raises(ValueError, match="reduce by 'mean'"):
        Subsample(made(row, case, reduction="sum"), 0.5)


@every_regularizer
def test_copies(row: RegularizerRow) -> None:
    model, x = Everything(), torch.randn(8, 6, 4)
    prior = row.make(model, smooth=20).eval()
    twin = pickle.loads(pickle.dumps(prior))
    assert_same_numbers(
        twin(x, target=torch.ones(8).long()).detach(),
        prior(x, target=torch.ones(8).long()).detach(),
        1e-12,
    )
    assert copy.deepcopy(prior).forward_func is not model


@every_regularizer
def test_gradient_to_inputs_stays_off_the_leaf(row: RegularizerRow) -> None:
    case = mlp()
    prior = made(row, case)
    x = case.inputs.clone().requires_grad_()
    with leaves_no_trace(case.model, tensors=[x]):
        prior(x, **labelled(case))


@every_regularizer
def test_bad_calls_are_refused_before_anything_is_drawn(row: RegularizerRow) -> None:
    case = mlp()
    prior = made(row, case)
    y = labelled(case)["target"]
    with leaves_no_trace(case.model, prior):
        with pytest.raises(TypeError, match=r"a torch\.Tensor"):
            prior([1.0], target=y)
        with pytest.raises(TypeError, match="floating-point"):
            prior(torch.ones(3, 4).long(), target=y[:3])
        with pytest.raises(ValueError, match="one for each of the 5 examples"):
            prior(case.inputs, target=y[:2])
        with pytest.raises(TypeError, match="keywords that a term of it takes"):
            prior(case.inputs, target=y, annotation=case.inputs)
        with pytest.raises(TypeError, match="keywords that a term of it takes"):
            prior(case.inputs, target=y, baselines=case.inputs)


of_labels = pytest.mark.parametrize("row", rows([row for row in REGULARIZERS if row.cls.labels]))


@of_labels
def test_labels_are_needed(row: RegularizerRow) -> None:
    case = mlp()
    prior = row.make(case.model)
    with leaves_no_trace(case.model, prior), pytest.raises(ValueError, match="class labels"):
        prior(case.inputs)
    prior.eval()  # the same draws each time
    values = [prior(case.inputs, target=y) for y in (1, [1] * 5, torch.tensor([1] * 5))]
    assert_same_numbers(values[0], values[1])
    assert_same_numbers(values[0], values[2])


@of_labels
@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_that_are_no_classes_are_refused(row: RegularizerRow, label: int) -> None:
    case = mlp()
    for target in (label, torch.tensor([0, 1, label, 1, 0])):
        with pytest.raises(ValueError, match="labels below the 3 classes of the outputs, found"):
            row.make(case.model)(case.inputs, target=target)
    with pytest.raises(TypeError, match="integer class indices"):
        row.make(case.model)(case.inputs, target=torch.ones(5))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: HessianPenalty(None),
        lambda m: ATEX("model"),
        lambda m: ATEX(m, explainer=m),
        lambda m: ATEX(m, spelling=3),
    ],
)
def test_wrong_types_are_refused(make: Any) -> None:
    with pytest.raises(TypeError, match=r"expected .* found"):
        make(mlp().model)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: HessianPenalty(m, 0),
        lambda m: HessianPenalty(m, curvature="finite_difference"),
        lambda m: HessianPenalty(m, smooth=-1),
        lambda m: HessianPenalty(m, reduction="median"),
        lambda m: HessianPenalty(m, curvature="difference", step_size=0),
        lambda m: JacobianRegularization(m, differentiation="recompute"),
        lambda m: JacobianRegularization(m, 0),
        lambda m: ATEX(m, radius=0),
        lambda m: ATEX(m, temperature=float("nan")),
        lambda m: ATEX(m, n_samples=0),
        lambda m: ATEX(lambda x: m(x)),
        lambda m: ActivationSensitivity(m, 0.0),
        lambda m: ActivationSensitivity(m, power=3),
        lambda m: ActivationSensitivity(m, scale="weight"),
        lambda m: ActivationSensitivity(m, noise="salt"),
        lambda m: ActivationSensitivity(m, layers="all"),
        lambda m: ActivationSensitivity(m, layers=["8"]),
        lambda m: ActivationSensitivity(m, layers=[3]),
        lambda m: CurvatureRegularization(m, step_size=0),
        lambda m: R2ET(m, top_k=0),
        lambda m: R2ET(m, top_k=2, n_nearest=0),
        lambda m: R2ET(m, top_k=2, curvature=-1),
        lambda m: R2ET(m, top_k=2, step_size=0),
        lambda m: SaliencyGuided(m, 0),
        lambda m: SaliencyGuided(m, 1.5),
        lambda m: RobustAttribution(m, "ig"),
        lambda m: RobustAttribution(m, step_size=0),
        lambda m: RobustAttribution(m, step_num=0),
        lambda m: AttributionAlignment(m, top_k=0),
        lambda m: AttributionAlignment(m, radius=(0.1, -1)),
    ],
)
def test_bad_options_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"expected .* found"):
        make(mlp().model)


class Checkpointed(nn.Module):
    """Has dropout, which shows in a second run that does not hold the model still."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.checkpoints = True

    def hidden(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.body(x)), 0.5, self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpoints:
            return self.head(self.hidden(x))
        hidden: Any = checkpoint(self.hidden, x, use_reentrant=False)
        return self.head(hidden)


@every_way
def test_checkpointing_is_refused_or_held_still(row: RegularizerRow, way: str) -> None:
    model, x = Checkpointed(), torch.randn(5, 4)
    prior = row.make(model, way, smooth=None).eval()
    holds = way == "finite_difference" and row.name not in ("SSR", "IG-SUM-NORM")
    if not holds:
        with pytest.raises(NotDifferentiableError, match="without activation checkpointing"):
            prior(x, target=1)
        return
    found = gradients(prior(x, target=1), model)
    model.checkpoints = False
    assert relative_error(found, gradients(prior(x, target=1), model)) < 1e-12
