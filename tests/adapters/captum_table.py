"""Every class that Captum exports: how to make and call it, on which models.

The tests and the support table run over these rows.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLasso, SkLearnLinearRegression, SkLearnRidge
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from captum_priors import differentiable
from tests.cases import EXACT


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(4, 6), activation
        self.second, self.last, self.head = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.second(self.act(self.first(x)))))

    @property
    def layer(self) -> nn.Module:
        return self.act

    neuron = (4,)
    window = (2,)
    shape = (4,)


class Cnn(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.pool = nn.Conv2d(1, 2, 3), activation, nn.MaxPool2d(2)
        self.second, self.last, self.head = nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.pool(self.act(self.first(x))))
        return self.head(self.last(hidden).flatten(1))

    @property
    def layer(self) -> nn.Module:
        return self.first

    neuron = (1, 2, 2)
    window = (1, 3, 3)
    shape = (1, 8, 8)


class Stem(nn.Module):
    """How ResNet and VGG begin: strides, paddings, and windows of max-pooling that overlap."""

    def __init__(self, activation: nn.Module, *pools: nn.Module) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(1, 3, 3, stride=2, padding=1), activation
        self.pool, self.other = pools
        self.second, self.last = nn.Conv2d(3, 2, 2), nn.Tanh()
        self.head = nn.Linear(self.features(torch.zeros(1, *self.shape)).shape[1], 3)

    def features(self, x: Tensor) -> Tensor:
        hidden = self.other(self.second(self.pool(self.act(self.first(x)))))
        return self.last(hidden).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    @property
    def layer(self) -> nn.Module:
        return self.act

    neuron = (1, 2, 2)
    window = (1, 4, 4)
    shape = (1, 14, 14)


class Recurrent(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(3, 4), activation
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.act(self.first(x)))[0][:, -1])

    @property
    def layer(self) -> nn.Module:
        return self.act

    neuron = (1, 0)  # alive with ReLU, too
    window = (2, 3)
    shape = (4, 3)


class Words:
    """A tokenizer with what Captum asks of one: words to numbers and back."""

    vocabulary = ("_", "the", "cat", "sat", "on", "mat", "dog", "ran", "far")

    def encode(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        ids = self.convert_tokens_to_ids(text.split())
        return torch.tensor([ids]) if return_tensors else ids

    def decode(self, ids: Any) -> str:
        return " ".join(self.convert_ids_to_tokens(torch.as_tensor(ids).flatten().tolist()))

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [self.vocabulary.index(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.vocabulary[i] for i in ids]

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        ends = [len(" ".join(text.split()[: i + 1])) for i in range(len(text.split()))]
        starts = [0, *(end + 1 for end in ends)]
        offsets = list(zip(starts, ends, strict=False))
        return {"input_ids": self.encode(text), "offset_mapping": offsets}


class Language(nn.Module):
    """A language model in the manner of Hugging Face's: logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(Words.vocabulary), 5)
        self.gru, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, len(Words.vocabulary))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.gru(self.embedding(input_ids))[0]))

    @property
    def layer(self) -> nn.Module:
        return self.embedding

    shape = (1,)


MODELS: dict[str, Callable[[], Any]] = {
    "language": Language,
    "tanh-mlp": lambda: Mlp(nn.Tanh()),
    "tanh-cnn": lambda: Cnn(nn.Tanh()),
    "mlp": lambda: Mlp(nn.Softplus()),
    "relu-mlp": lambda: Mlp(nn.ReLU()),
    "cnn": lambda: Cnn(nn.Softplus()),
    "relu-cnn": lambda: Cnn(nn.ReLU()),
    "stem": lambda: Stem(nn.Softplus(), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1)),
    "relu-stem": lambda: Stem(nn.ReLU(), nn.MaxPool2d(2, 2, 1), nn.MaxPool2d(3, 1, 1)),
    "plain-stem": lambda: Stem(nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1, 1)),
    "sequence": lambda: Recurrent(nn.Tanh()),
    "relu-sequence": lambda: Recurrent(nn.ReLU()),
}


# One class of each kind is tried on all of them, the others on three.
_GENERAL = ("mlp", "relu-cnn", "sequence")
_ALL = (*_GENERAL, "relu-mlp", "cnn", "relu-sequence")
_RESCALED = ("mlp", "relu-cnn", "stem")


@dataclass(frozen=True)
class Row:
    """How to make and call one class, and on which models."""

    make: Callable[[Any], Any]
    options: dict[str, Any] = field(default_factory=dict)
    baselines: bool = False
    # One row to compare with: of zeros, the windows of max-pooling are full of ties.
    reference: bool = False
    neuron: bool = False
    window: bool = False
    mask: bool = False
    target: bool = True
    single_precision: bool = False
    models: tuple[str, ...] = _GENERAL
    # What is explained, made from a batch; and the tensors of the result.
    subject: Callable[[Tensor], Any] = field(default=lambda x: x)
    tensors: Callable[[Any], Any] = field(default=lambda result: result)
    # Inputs may require gradients, and get them.
    input_gradients: bool = True

    @property
    def model(self) -> str:
        """One model where one is enough."""
        return next((name for name in self.models if "cnn" in name), self.models[0])

    def call(self, model: Any) -> dict[str, Any]:
        call = dict(self.options)
        if self.target:
            call["target"] = 1
        if self.baselines or self.reference:
            generator = torch.Generator().manual_seed(5)
            n_rows = 5 if self.baselines else 1
            call["baselines"] = torch.randn(n_rows, *model.shape, generator=generator)
        if self.neuron:
            call["neuron_selector"] = model.neuron
        if self.window:
            call["sliding_window_shapes"] = model.window
        if self.mask:
            n = math.prod(model.shape)
            call["feature_mask"] = (torch.arange(n) * min(n, 6) // n).reshape(1, *model.shape)
        return call


@dataclass
class Explained:
    """An explainer seen as one of tensors, whatever it explains."""

    explainer: Any
    row: Row

    def attribute(self, inputs: Tensor, **call: Any) -> Any:
        result = self.explainer.attribute(self.row.subject(inputs), **call)
        return self.row.tensors(result)


def flat(value: Any) -> tuple[Tensor, ...]:
    """Tensors of a structure of tuples and lists."""
    return (value,) if isinstance(value, Tensor) else tuple(t for v in value for t in flat(v))


class Flat(Explained):
    """What an explainer says, as one tuple of tensors."""

    def attribute(self, inputs: Tensor, **call: Any) -> tuple[Tensor, ...]:
        return flat(super().attribute(inputs, **call))


def ways(row: Row, model: Any) -> Sequence[str]:
    """Exact differentiations that the class has."""
    return [way for way in EXACT if way in differentiable(row.make(model)).differentiations]


def loader(x: Tensor) -> Any:
    """Batches of two, the last one partial."""
    return DataLoader(TensorDataset(x), batch_size=2)


def prompt(_: Tensor) -> Any:
    return ca.TextTokenInput("the cat sat", Words())


def language_tensors(result: Any) -> Any:
    return result.seq_attr if result.token_attr is None else (result.seq_attr, result.token_attr)


def with_rules(model: Any) -> Any:
    """Give three layers a rule each that changes weights, biases or the stabiliser."""
    model.first.rule = GammaRule(0.3, set_bias_to_zero=True)
    model.second.rule, model.head.rule = Alpha1_Beta0_Rule(), EpsilonRule(0.1)
    return model


def plain(name: str, **options: Any) -> Row:
    return Row(lambda m: getattr(ca, name)(m), **options)


def layered(name: str, **options: Any) -> Row:
    return Row(lambda m: getattr(ca, name)(m, m.layer), **options)


def language(wrapper: str, method: Callable[[Any], Any], **call: Any) -> Row:
    return Row(
        lambda m: getattr(ca, wrapper)(method(m), Words()),
        {"target": "on the", **call},
        target=False,
        single_precision=True,
        models=("language",),
        subject=prompt,
        tensors=language_tensors,
        input_gradients=False,
    )


def lime(surrogate: Any, **options: Any) -> Row:
    return Row(
        lambda m: ca.Lime(m, interpretable_model=copy.copy(surrogate)),
        {"n_samples": 12},
        single_precision=True,
        mask=True,
        input_gradients=False,
        **options,
    )


_RELEVANCE = ("tanh-mlp", "relu-mlp", "tanh-cnn", "relu-cnn")


# Coordinate descent has to converge beyond the certificate.
CONVERGED: dict[str, Any] = {"tol": 1e-11, "max_iter": 1_000_000}


def similarity(original: Tensor, perturbed: Tensor, interpretable: Tensor, **_: Any) -> float:
    return 0.3 + float(interpretable.sum()) / 10


def drop(original: Tensor, **_: Any) -> Tensor:
    """A mask for each column of features."""
    return torch.bernoulli(torch.full((1, original.shape[-1]), 0.5))


def masked(mask: Tensor, original: Tensor, **_: Any) -> Tensor:
    return mask * original


ROWS: dict[str, Row] = {
    "Saliency": plain("Saliency"),
    "InputXGradient": plain("InputXGradient"),
    "IntegratedGradients": plain("IntegratedGradients", options={"n_steps": 4}, models=_ALL),
    "Deconvolution": plain("Deconvolution"),
    "DeepLift": plain(
        "DeepLift", reference=True, models=(*_ALL, "stem", "relu-stem", "plain-stem")
    ),
    "DeepLiftShap": plain("DeepLiftShap", baselines=True, models=_RESCALED),
    "LayerDeepLift": layered("LayerDeepLift", reference=True, models=(*_RESCALED, "relu-stem")),
    "LayerDeepLiftShap": layered("LayerDeepLiftShap", baselines=True, models=_RESCALED),
    "NeuronDeepLift": layered(
        "NeuronDeepLift", reference=True, neuron=True, target=False, models=_RESCALED
    ),
    "NeuronDeepLiftShap": layered(
        "NeuronDeepLiftShap", baselines=True, neuron=True, target=False, models=_RESCALED
    ),
    "GuidedBackprop": plain("GuidedBackprop", models=_ALL),
    "GuidedGradCam": layered("GuidedGradCam", models=("cnn", "relu-cnn")),
    "GradientShap": plain("GradientShap", options={"n_samples": 3}, baselines=True, models=_ALL),
    "FeatureAblation": plain("FeatureAblation", options={"perturbations_per_eval": 2}, models=_ALL),
    "FeaturePermutation": plain("FeaturePermutation"),
    "Occlusion": plain("Occlusion", window=True, single_precision=True),
    "ShapleyValueSampling": plain(
        "ShapleyValueSampling", options={"n_samples": 2}, single_precision=True
    ),
    "ShapleyValues": plain("ShapleyValues", single_precision=True, models=("mlp", "relu-mlp")),
    "NoiseTunnel": Row(
        lambda m: ca.NoiseTunnel(ca.IntegratedGradients(m)),
        {"nt_samples": 3, "nt_type": "vargrad", "n_steps": 3},
        models=_ALL,
    ),
    "NoiseTunnel-adapter": Row(
        lambda m: ca.NoiseTunnel(differentiable(ca.Saliency(m))), {"nt_samples": 3}
    ),
    "NoiseTunnel-LRP": Row(
        lambda m: ca.NoiseTunnel(ca.LRP(with_rules(m))), {"nt_samples": 2}, models=_RELEVANCE[1:3]
    ),
    "NoiseTunnel-KernelShap": Row(
        lambda m: ca.NoiseTunnel(ca.KernelShap(m)),
        {"nt_samples": 2, "n_samples": 12},
        single_precision=True,
        mask=True,
        models=("mlp",),
    ),
    "NoiseTunnel-GuidedBackprop": Row(
        lambda m: ca.NoiseTunnel(ca.GuidedBackprop(m)), {"nt_samples": 3}
    ),
    "InternalInfluence": layered("InternalInfluence", options={"n_steps": 4}),
    "LayerActivation": layered("LayerActivation", target=False),
    "LayerConductance": layered(
        "LayerConductance", options={"n_steps": 4, "internal_batch_size": 9}, models=_ALL
    ),
    "LayerFeatureAblation": layered("LayerFeatureAblation"),
    "LayerGradCam": layered("LayerGradCam"),
    "LayerGradientShap": layered("LayerGradientShap", options={"n_samples": 2}, baselines=True),
    "LayerGradientXActivation": layered("LayerGradientXActivation"),
    "LayerIntegratedGradients": layered(
        "LayerIntegratedGradients", options={"n_steps": 4, "internal_batch_size": 6}
    ),
    # Stock fails for any target: it selects it twice.
    "LayerFeaturePermutation": Row(
        lambda m: ca.LayerFeaturePermutation(lambda x: m(x)[:, 1], m.layer), target=False
    ),
    "LayerLRP": Row(lambda m: ca.LayerLRP(m, m.second), models=_RELEVANCE[:3]),
    "LayerLRP-rules": Row(
        lambda m: ca.LayerLRP(with_rules(m), [m.second, m.head]), models=_RELEVANCE
    ),
    "LRP": plain("LRP", models=_RELEVANCE),
    "LRP-rules": Row(lambda m: ca.LRP(with_rules(m)), models=_RELEVANCE),
    "KernelShap": plain(
        "KernelShap", options={"n_samples": 12}, single_precision=True, mask=True, models=_ALL
    ),
    "Lime": lime(SkLearnLasso(alpha=1e-3, **CONVERGED)),
    "Lime-ridge": lime(SkLearnRidge(alpha=0.5)),
    "Lime-regression": lime(SkLearnLinearRegression(fit_intercept=False), models=("mlp",)),
    "LimeBase": Row(
        lambda m: ca.LimeBase(m, SkLearnRidge(alpha=0.1), similarity, drop, True, masked, None),
        {"n_samples": 12},
        single_precision=True,
        subject=lambda x: x[:1],
        input_gradients=False,
    ),
    "DataLoaderAttribution": Row(
        lambda m: ca.DataLoaderAttribution(ca.FeatureAblation(lambda x: m(x)[:, 1])),
        target=False,
        subject=loader,
        tensors=lambda result: result[0],
        input_gradients=False,
    ),
    "LLMAttribution": language("LLMAttribution", ca.FeatureAblation, use_cached_outputs=False),
    "LLMAttribution-KernelShap": language(
        "LLMAttribution", ca.KernelShap, use_cached_outputs=False, n_samples=9
    ),
    "LLMGradientAttribution": language(
        "LLMGradientAttribution",
        lambda m: ca.LayerIntegratedGradients(m, m.embedding),
        n_steps=4,
    ),
    "NeuronConductance": layered(
        "NeuronConductance", options={"n_steps": 4}, neuron=True, models=_ALL
    ),
    "NeuronDeconvolution": layered("NeuronDeconvolution", neuron=True, target=False),
    "NeuronFeatureAblation": layered("NeuronFeatureAblation", neuron=True, target=False),
    "NeuronGradient": layered("NeuronGradient", neuron=True, target=False),
    "NeuronGradientShap": layered(
        "NeuronGradientShap",
        options={"n_samples": 2},
        baselines=True,
        neuron=True,
        target=False,
    ),
    "NeuronGuidedBackprop": layered("NeuronGuidedBackprop", neuron=True, target=False),
    "NeuronIntegratedGradients": layered(
        "NeuronIntegratedGradients", options={"n_steps": 4}, neuron=True, target=False
    ),
}
PAIRS = [
    pytest.param(name, model, id=f"{name}-{model}")
    for name, row in ROWS.items()
    for model in row.models
]
every_pair = pytest.mark.parametrize(("name", "model_name"), PAIRS)
every_row = pytest.mark.parametrize("name", ROWS)


def set_up(name: str, model_name: str) -> tuple[Row, Any, Tensor]:
    torch.manual_seed(1)
    model = MODELS[model_name]()
    return ROWS[name], model, torch.randn(3, *model.shape)


def seeded(explainer: Any, x: Tensor, call: dict[str, Any], row: Row) -> Any:
    """Attribute under a fixed seed."""
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002  # the generator that Captum draws from
    return Explained(explainer, row).attribute(x, **call)


class _InDouble(TorchFunctionMode):
    """Captum accumulates some attributions in float32, where no difference quotient is exact."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs) if func is not Tensor.float else args[0].double()


@contextmanager
def in_double(*, needed: bool) -> Iterator[None]:
    if not needed:
        yield
        return
    single = torch.FloatTensor  # what LIME makes its coefficients with
    torch.FloatTensor = torch.DoubleTensor  # type: ignore[misc]  # Captum's dtype
    try:
        with _InDouble():
            yield
    finally:
        torch.FloatTensor = single  # type: ignore[misc]  # Captum's dtype
