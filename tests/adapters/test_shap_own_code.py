"""GradientExplainer and DeepExplainer follow SHAP's own code, or say that they cannot."""

import copy
import inspect
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shap
import torch
from shap.explainers._deep import deep_pytorch
from shap.explainers._gradient import _PyTorchGradient
from torch import Tensor, nn

from captum_priors import NotDifferentiableError, differentiable
from captum_priors._engine._random import swapped_in
from tests.adapters.shap_cases import mlp, table
from tests.asserts import leaves_no_trace

both = pytest.mark.parametrize("cls", [shap.GradientExplainer, shap.DeepExplainer])


def rewritten(*changes: tuple[str, str]) -> Callable[..., Any]:
    """SHAP's sampling loop with some of its lines changed."""
    source = inspect.cleandoc("\n" + inspect.getsource(_PyTorchGradient.shap_values))
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    names = dict(inspect.getmodule(_PyTorchGradient).__dict__)
    exec(source, names)
    made: Callable[..., Any] = names["shap_values"]
    return made


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(
    "change",
    [
        ("t = np.random.uniform()", "t = np.random.uniform() ** 2"),
        ("t = np.random.uniform()", "t = np.random.uniform(); np.random.uniform()"),
        ("(x - (self.data[a][rind])", "(2.0 * x - (self.data[a][rind])"),
    ],
)
def test_other_draws_of_shap_are_followed(
    monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], smoothing: float
) -> None:
    torch.set_default_dtype(torch.float64)  # stock GradientExplainer computes in the default
    model, background = mlp(2), torch.as_tensor(table(7, 0))
    explainer = shap.GradientExplainer(model, background, local_smoothing=smoothing)
    x, options = torch.as_tensor(table(3, 1)), {"nsamples": 10, "rseed": 1}

    def values(of: Any) -> Any:
        torch.manual_seed(4)
        return of.shap_values(x.clone(), **options)

    before = values(explainer)
    monkeypatch.setattr(_PyTorchGradient, "shap_values", rewritten(change))
    expected = values(explainer)
    assert np.abs(expected - before).max() > 1e-3
    # Rounding of float64 sums.
    assert np.abs(values(differentiable(explainer)) - expected).max() < 1e-12


@pytest.mark.parametrize(
    "change",
    [
        ("(x - (self.data[a][rind])", "(x * x - (self.data[a][rind])"),  # no sum of rows
        ("t * x + (1 - t) *", "x + X[a][0] + (1 - t) *"),  # a second example
        ("x - (self.data[a][rind])", "torch.sin(x) - (self.data[a][rind])"),
        ("samples.mean(0)", "np.median(samples, 0)"),
        ("samples.mean(0)", "samples.sum(0)"),
    ],
)
def test_another_loop_of_shap_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: tuple[str, str]
) -> None:
    torch.set_default_dtype(torch.float64)
    explainer = shap.GradientExplainer(mlp(2), torch.as_tensor(table(7, 0)))
    monkeypatch.setattr(_PyTorchGradient, "shap_values", rewritten(change))
    for _ in range(2):  # not only at the first call
        with pytest.raises(NotDifferentiableError, match=r"GradientExplainer.*SHAP versions"):
            differentiable(explainer).attribute(torch.as_tensor(table(3, 1)), target=1)


def test_another_rule_of_shap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, background = mlp(2), torch.as_tensor(table(7, 0))
    explainer = shap.DeepExplainer(model, background)
    rule = deep_pytorch.nonlinear_1d

    def nonlinear_1d(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        return (1.001 * rule(module, grad_input, grad_output)[0], *grad_input[1:])

    monkeypatch.setitem(deep_pytorch.op_handler, "Tanh", nonlinear_1d)
    for call in ("attribute", "shap_values", "__call__"):
        options = {"target": 1} if call == "attribute" else {}
        with pytest.raises(NotDifferentiableError, match=r"DeepExplainer.*SHAP versions"):
            getattr(differentiable(explainer), call)(torch.as_tensor(table(3, 1)), **options)


class Block(nn.Module):
    """A custom block, in which SHAP's DeepExplainer leaves parameters ``x`` and ``y``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act, self.dropout = nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.act(self.linear(x)))


@both
@pytest.mark.parametrize("interim", [False, True])
def test_the_comparison_runs_once_and_leaves_no_trace(
    cls: Any, interim: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(Block(), Block(), nn.Linear(5, 2))
    explainer = cls((model, model[1]) if interim else model, torch.as_tensor(table(7, 0)))
    inner = type(explainer.explainer)
    stock, models = inner.shap_values, []

    def counted(self: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
        values = stock(self, X, *args, **kwargs)
        if isinstance(X, Tensor):  # and no stand-in
            models.append(self.model)
        return values

    monkeypatch.setattr(inner, "shap_values", counted)
    model.train()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    adapter, x = differentiable(explainer), torch.as_tensor(table(3, 1))
    names = [name for name, _ in model.named_parameters()]
    options = {"rseed": 0} if cls is shap.GradientExplainer else {}
    with leaves_no_trace(model, tensors=[x]):
        adapter.shap_values(x, **options)
    assert [name for name, _ in model.named_parameters()] == names
    assert len(models) == 1
    assert models[0] is not model
    adapter(x)
    copy.copy(adapter).shap_values(x, **options)
    differentiable(explainer)(x)
    assert len(models) == 1


def test_the_loop_draws_one_number_from_the_global_stream() -> None:
    explainer = shap.GradientExplainer(mlp(1).double(), torch.as_tensor(table(7, 0)))
    adapter = differentiable(explainer)
    np.random.seed(3)  # noqa: NPY002  # SHAP's generator
    adapter.attribute(torch.as_tensor(table(3, 1)))
    found = np.random.uniform()  # noqa: NPY002  # SHAP's generator
    np.random.seed(3)  # noqa: NPY002  # SHAP's generator
    np.random.randint(0, 1e6)  # type: ignore[call-overload]  # noqa: NPY002  # as SHAP calls it
    assert found == np.random.uniform()  # noqa: NPY002  # SHAP's generator


class Twice(nn.Module):
    """One activation for two layers, where SHAP keeps the inputs of the last alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(5, 5), nn.Linear(5, 2), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.two(self.act(self.one(x))))


@pytest.mark.parametrize(
    "model",
    [
        Twice(),
        nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
    ],
)
def test_no_numbers_of_shap_to_keep(model: nn.Module) -> None:
    """SHAP's are wrong or fail; ours add up."""
    model = copy.deepcopy(model).double()
    explainer = shap.DeepExplainer(model, torch.as_tensor(table(7, 0)))
    x = torch.as_tensor(table(3, 1))
    found = differentiable(explainer)(x)
    total = (found.tensor.sum(1) + found.tensor_base).detach()
    assert float((total - model(x).detach()).abs().max()) < 1e-10  # rounding in float64


@both
def test_mixed_precision_around_the_first_call(cls: Any) -> None:
    model = mlp(2).float()
    explainer = cls(model, torch.as_tensor(table(7, 0)).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = differentiable(explainer).attribute(torch.as_tensor(table(3, 1)).float(), target=1)
    assert bool(torch.isfinite(value).all())


class DrawsFromPython(nn.Module):
    """Random in a way that torch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh() + (random.random() < 0.5)


class Noisy(nn.Module):
    """Differs between passes by less than single precision shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return torch.tanh(h + 1e-6 * torch.randn_like(h))


@both
@pytest.mark.parametrize("make", [DrawsFromPython, Noisy])
def test_random_models_are_compared_with_nothing(cls: Any, make: type[nn.Module]) -> None:
    explainer = cls(make().double(), torch.as_tensor(table(7, 0)))
    options = {"rseed": 0} if cls is shap.GradientExplainer else {"check_additivity": False}
    found = []
    for seed in range(10):  # equal by chance at some
        torch.manual_seed(seed)
        random.seed(seed)
        adapter = differentiable(cls(explainer.explainer.model, torch.as_tensor(table(7, 0))))
        for _ in range(2):
            random.seed(0)
            adapter.shap_values(torch.as_tensor(table(3, 1)), **options)
            found.append(random.random())
        assert found[-2] == found[-1]  # the first call draws no more than another


@both
def test_hooks_of_the_user_do_not_run_on_the_copy(cls: Any) -> None:
    model = mlp(2).double()
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, output: seen.append(id(module)))
    adapter = differentiable(cls(model, torch.as_tensor(table(7, 0))))
    seen.clear()
    adapter(torch.as_tensor(table(3, 1)))
    assert set(seen) == {id(model)}


def test_the_loop_waits_for_a_prior_in_another_thread() -> None:
    """Both seed NumPy's global generator, and put it back."""
    explainer = shap.GradientExplainer(mlp(1).double(), torch.as_tensor(table(7, 0)))
    adapter, x = differentiable(explainer), torch.as_tensor(table(3, 1))
    expected = adapter.shap_values(x, nsamples=20, rseed=1)
    np.random.seed(5)  # noqa: NPY002  # SHAP's generator
    inside, found = threading.Event(), []

    def explain() -> None:
        inside.wait()
        found.append(adapter.shap_values(x, nsamples=20, rseed=1))

    thread = threading.Thread(target=explain)
    thread.start()
    with swapped_in(7):
        inside.set()
        thread.join(0.5)
        assert not found
    thread.join()
    after = np.random.uniform()  # noqa: NPY002  # SHAP's generator
    np.random.seed(5)  # noqa: NPY002  # SHAP's generator
    assert after == np.random.uniform()  # noqa: NPY002  # SHAP's generator
    assert np.array_equal(found[0], expected)
