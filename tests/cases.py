"""Tables that the laws run over: models with inputs, and every explainer that is admitted.

A new method is a new row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import ExpectedGradients, LayerExpectedGradients, differentiable


@dataclass(frozen=True)
class Case:
    """A model with a batch to explain."""

    model: Any
    inputs: Any
    baselines: Any
    target: Any
    args: Any = None
    layer: nn.Module | None = None
    smooth: bool = True

    @property
    def call(self) -> dict[str, Any]:
        """Keywords of an attribute call besides inputs and baselines."""
        return {"target": self.target, "additional_forward_args": self.args}


class Cnn(nn.Module):
    """Convolutions, pooling and a functional activation."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor], pool: Callable[[Tensor, int], Tensor]
    ) -> None:
        super().__init__()
        self.activation, self.pool = activation, pool
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.activation(self.conv1(x)), 2)
        return self.head(self.activation(self.conv2(x)).flatten(1))


class Sequence(nn.Module):
    """Embedding, LSTM and a head, on token ids with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        states, _ = self.lstm(self.embedding(ids))
        if mask is not None:
            states = states * mask.unsqueeze(-1)
        return self.head(states.mean(1))


class Siamese(nn.Module):
    """One encoder of two texts, which are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(11, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.compared(self.embedding(a), self.embedding(b))

    def compared(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = (torch.tanh(self.mix(each)).mean(1) for each in (a, b))
        return self.head(left * (1 + right))


class TwoInputs(nn.Module):
    """An image-like and a tabular input that interact, and a plain additional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor, power: float) -> Tensor:
        hidden = torch.tanh(self.left(a.flatten(1))) * torch.sigmoid(self.right(b))
        return self.head(hidden * scale.unsqueeze(1)) ** power


def linear() -> Case:
    return Case(nn.Linear(4, 3), torch.randn(5, 4), torch.randn(7, 4), 1)


def mlp() -> Case:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    )
    return Case(model, torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 1, 2, 1, 0]))


def relu_mlp() -> Case:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return Case(model, torch.randn(5, 4), torch.randn(7, 4), 2, smooth=False)


def cnn() -> Case:
    return Case(
        Cnn(F.gelu, F.avg_pool2d), torch.randn(3, 1, 8, 8), torch.randn(6, 1, 8, 8), [0, 2, 1]
    )


def relu_cnn() -> Case:
    return Case(
        Cnn(F.relu, F.max_pool2d), torch.randn(3, 1, 8, 8), torch.randn(6, 1, 8, 8), 1, smooth=False
    )


def tuple_inputs() -> Case:
    inputs = (torch.randn(4, 2, 2), torch.randn(4, 3))
    baselines = (torch.randn(6, 2, 2), torch.randn(6, 3))
    return Case(TwoInputs(), inputs, baselines, 1, args=(torch.rand(4) + 0.5, 2.0))


def sequence() -> Case:
    """Continuous inputs to an LSTM, batch normalisation before it."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.norm(x))[0][:, -1])

    return Case(Recurrent(), torch.randn(3, 6, 4), torch.randn(5, 6, 4), 0)


def tokens() -> Case:
    model = Sequence()
    ids, background = torch.randint(11, (3, 6)), torch.randint(11, (8, 6))
    return Case(model, ids, background, 2, layer=model.embedding)


def two_texts() -> Case:
    """Of different lengths, through one embedding."""
    model, lengths = Siamese(), (6, 3)
    ids, background = (tuple(torch.randint(11, (n, k)) for k in lengths) for n in (3, 8))
    return Case(model, ids, background, 2, layer=model.embedding)


def hidden_layer() -> Case:
    case = mlp()
    return Case(case.model, case.inputs, case.baselines, 1, layer=case.model[1])


class Everything(nn.Module):
    """What a prior could disturb: running statistics, dropout and a recurrent module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(4, 3, num_layers=2, dropout=0.3, batch_first=True)
        self.dropout = nn.Dropout(0.4)
        self.head = nn.Linear(3, 2)
        self.fails_after: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.lstm(self.norm(x))[0].mean(1))
        if self.fails_after is not None:
            if self.fails_after == 0:
                raise RuntimeError("the model fails midway")
            self.fails_after -= 1
        return self.head(self.dropout(hidden))


class Scaled(torch.autograd.Function):
    """The identity, with a factor of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.factor * gradient, None


MODELS = [linear, mlp, relu_mlp, cnn, relu_cnn, tuple_inputs, sequence]
NONLINEAR = MODELS[1:]
LAYER_MODELS = [tokens, hidden_layer, two_texts]


@dataclass(frozen=True)
class Row:
    """An admitted explainer, and how to call it on a case."""

    name: str
    make: Callable[[Case, str], Any]
    stock: Callable[[Case], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    baselines: bool = False
    per_example_baselines: bool = False
    layer: bool = False

    def call(self, case: Case) -> dict[str, Any]:
        """Keywords of ``attribute`` for this case."""
        call = {**case.call, **self.options}
        if self.baselines:
            call["baselines"] = case.baselines
        if self.per_example_baselines:
            each = case.baselines if isinstance(case.baselines, tuple) else (case.baselines,)
            chosen = tuple(b[:1] for b in each)
            call["baselines"] = chosen if isinstance(case.baselines, tuple) else chosen[0]
        return call


def _captum(cls: Any) -> tuple[Any, Any]:
    return (
        lambda case, way: differentiable(cls(case.model), differentiation=way),
        lambda case: cls(case.model),
    )


def _eg(case: Case, way: str) -> Any:
    return ExpectedGradients(case.model, differentiation=way)


def _layer_eg(case: Case, way: str) -> Any:
    return LayerExpectedGradients(case.model, case.layer, differentiation=way)


EXPLAINERS = [
    Row("EG-1", _eg, options={"n_samples": 1}, baselines=True),
    Row("EG-3", _eg, options={"n_samples": 3}, baselines=True),
    Row("EG-3-chunked", _eg, options={"n_samples": 3, "internal_batch_size": 4}, baselines=True),
    Row(
        "EG-3-monte-carlo-noise",
        _eg,
        options={"n_samples": 3, "estimator": "monte_carlo", "stdevs": 0.1},
        baselines=True,
    ),
    Row("EG-9-noise", _eg, options={"n_samples": 9, "stdevs": 0.1}, baselines=True),
    Row("Saliency", *_captum(Saliency)),
    Row("Saliency-signed", *_captum(Saliency), options={"abs": False}),
    Row("InputXGradient", *_captum(InputXGradient)),
    Row("IG", *_captum(IntegratedGradients), options={"n_steps": 7}),
    Row(
        "IG-chunked",
        *_captum(IntegratedGradients),
        options={"n_steps": 7, "internal_batch_size": 12, "method": "riemann_trapezoid"},
        per_example_baselines=True,
    ),
]
LAYER_EXPLAINERS = [
    Row("LayerEG-1", _layer_eg, options={"n_samples": 1}, baselines=True, layer=True),
    Row("LayerEG-4", _layer_eg, options={"n_samples": 4}, baselines=True, layer=True),
]


DIFFERENTIATIONS = ["double_backprop", "recompute", "finite_difference"]
EXACT = ["double_backprop", "recompute"]


def rows(table: list[Any]) -> list[Any]:
    """Rows of a table as readable pytest parameters."""
    return [
        pytest.param(row, id=getattr(row, "name", None) or getattr(row, "__name__", str(row)))
        for row in table
    ]


def attribute(model: Any, x: Tensor, way: Any = "double_backprop", **call: Any) -> Any:
    """Expected gradients of three draws, the same at every call, on the inputs themselves."""
    explainer, draws = ExpectedGradients(model, differentiation=way), torch.Generator()
    return explainer.attribute(x, x.detach(), 3, generator=draws.manual_seed(0), **call)


class Recorder(nn.Module):
    """Remembers the points at which a model was evaluated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, *inputs: Any) -> Tensor:
        self.seen.append(tuple(x.detach().clone() for x in inputs if isinstance(x, Tensor)))
        return self.model(*inputs)


class Recurrent(nn.Module):
    """A recurrent layer of two directions, with dropout, and a classifier."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell(4, 5, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x)[0].mean(1))
        return out


def curved() -> nn.Module:
    """A small classifier, curved, and confident enough for probabilities to differ."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model
