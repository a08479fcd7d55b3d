# ruff: noqa: NPY002  # the generator that SHAP draws from
"""Faults that each belonged to one of SHAP's explainers, as laws over all of them."""

import copy
import logging
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shap
import torch
from torch import Tensor, nn

from captum_priors import differentiable
from captum_priors.adapters.shap import coalitions, masked, model
from tests.adapters.shap_cases import (
    FEATURES,
    NAMES,
    adapted,
    mlp,
    model_for,
    predictor,
    stock,
    table,
)
from tests.adapters.test_shap_laws import seeded
from tests.asserts import parameter_gradients

logging.getLogger("shap").setLevel(logging.ERROR)  # singular equations at few samples
OF_TABLES = [
    "KernelExplainer",
    "SamplingExplainer",
    "ExactExplainer",
    "PermutationExplainer",
    "PartitionExplainer",
    "CoalitionExplainer",
]
every_table = pytest.mark.parametrize("name", OF_TABLES)


# ---- Samples that SHAP's rounding takes away -----------------------------------------------


@pytest.mark.parametrize(("weak", "seed"), [(0.1, 4), (0.03, 3), (0.03, 7), (0.0, 0)])
def test_sampling_with_a_feature_that_hardly_counts(weak: float, seed: int) -> None:
    """SHAP's rounding then gives a feature two samples fewer than none."""
    torch.manual_seed(seed)
    net = mlp(1)
    with torch.no_grad():
        net[0].weight[:, 0] *= weak
    explainer = shap.SamplingExplainer(predictor(net), table(20, 0))
    adapter = differentiable(explainer, model=net)
    x = table(3, 1)
    found, expected = seeded(lambda: adapter(x)), seeded(lambda: explainer(x))
    # SHAP's weights of 1e6 leave rounding of 1e-10 in its numbers.
    assert np.abs(found.values - expected.values).max() < 1e-8


# ---- A model with an axis for its one output -----------------------------------------------


@every_table
def test_an_axis_of_one_output(name: str) -> None:
    plt.switch_backend("Agg")
    net = mlp(1).eval()
    explainer, x = stock(name, net, axis=True), table(3, 1)
    adapter = differentiable(explainer, model=net)
    found = seeded(lambda: adapter(x))
    assert np.abs(found.values - found.tensor.detach().numpy()).max() < 1e-12
    total = found.tensor.reshape(3, -1).sum(1) + found.tensor_base.reshape(3)
    # Sampling distributes its error up to one part in 1e6.
    assert float((total - net(torch.as_tensor(x))[:, 0]).detach().abs().max()) < 1e-6
    if name != "CoalitionExplainer":  # SHAP's own fails on one output and NumPy 2.4
        assert found.values.shape == seeded(lambda: explainer(x)).values.shape
    if name == "SamplingExplainer":
        shap.plots.waterfall(found[0], show=False)
        plt.close("all")
    with pytest.raises(ValueError, match="`target`"):
        adapter.attribute(torch.as_tensor(x), target=1)


# ---- Tables of integers, booleans and both -------------------------------------------------


def whole(n: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 2, (n, FEATURES))


def frame(a: np.ndarray, **dtypes: type) -> pd.DataFrame:
    return pd.DataFrame(a, columns=NAMES).astype(dict(zip(NAMES, dtypes.values(), strict=False)))


KINDS = {
    "integers": lambda a: a,
    "unsigned": lambda a: a.astype(np.uint8),
    "a frame of integers": frame,
    "a frame of integers and floats": lambda a: frame(a, first=float),
    "a frame of booleans and floats": lambda a: frame(a, first=float, second=bool),
}


class Tokens(nn.Module):
    """Takes whole numbers alone."""

    takes = torch.int64

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.flatten, self.head, self.act = nn.Flatten(), nn.Linear(2 * FEATURES, 2), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.head(self.flatten(self.embedding(x))))


@every_table
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("make", [lambda: mlp(2), Tokens])
def test_one_rule_for_dtypes(name: str, kind: str, make: Any) -> None:
    """The model's: as with a table of floats, whatever the table holds."""
    net, found = make().eval(), []
    for convert in (KINDS[kind], lambda a: a.astype(float)):
        try:
            explainer = stock(name, net, convert(whole(7, 0)))
        except TypeError:  # nor does SHAP cluster mixed columns
            assert name in ("PartitionExplainer", "CoalitionExplainer")
            return
        adapter, x = differentiable(explainer, model=net), convert(whole(3, 1))
        found.append(seeded(lambda adapter=adapter, x=x: adapter(x).tensor))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-9)
    gradients = parameter_gradients(found[0], list(net.parameters()))
    assert any(float(g.abs().max()) > 0 for g in gradients)
    by_captum = seeded(lambda: adapter.attribute(torch.as_tensor(whole(3, 1)), target=1))
    assert by_captum.is_floating_point()


@pytest.mark.parametrize("name", ["LinearExplainer", "AdditiveExplainer"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_one_rule_for_dtypes_of_closed_forms(name: str, kind: str) -> None:
    net = model_for(name, 1)
    adapter = adapted(name, stock(name, net, whole(7, 0).astype(float)), net)
    found, expected = adapter(KINDS[kind](whole(3, 1))), adapter(whole(3, 1).astype(float))
    assert torch.allclose(found.tensor, expected.tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in OF_TABLES if n != "SamplingExplainer"])
def test_rows_whose_fractions_shap_cuts_off(name: str) -> None:
    """SHAP's copies of an integer background take whole numbers alone."""
    net, x = mlp(2), table(2, 1)
    explainers = [stock(name, net, b) for b in (whole(7, 0), whole(7, 0).astype(float))]
    adapters = [differentiable(e, model=net) for e in explainers]
    with pytest.warns(UserWarning, match="cuts off their fractions"):
        found = seeded(lambda: adapters[0](x))
    assert np.abs(found.values - seeded(lambda: adapters[1](x)).values).max() < 1e-12
    assert np.abs(found.values - seeded(lambda: explainers[0](x)).values).max() > 1e-3


# ---- Layers stay as they are ---------------------------------------------------------------


@pytest.mark.parametrize("cls", [shap.GradientExplainer, shap.DeepExplainer])
def test_nothing_stays_on_a_layer(cls: Any) -> None:
    net, x = mlp(2), torch.as_tensor(table(3, 1))
    before = [sorted(vars(m)) for m in net.modules()]
    adapter = differentiable(cls((net, net[2]), torch.as_tensor(table(7, 0))))
    for _ in range(2):
        assert [sorted(vars(m)) for m in net.modules()] == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        copy.deepcopy(net)
        adapter(x).tensor.sum().backward()
        net(x)


def test_token_ids_at_a_layer() -> None:
    """With one reference row, values add up to the difference that the model makes."""
    net = Tokens()
    background, x = torch.as_tensor(whole(1, 0)) + 1, torch.as_tensor(whole(3, 1))
    found = differentiable(shap.DeepExplainer((net, net.flatten), background))(x)
    assert found.tensor.shape == (3, FEATURES, 2, 2)
    missing = found.tensor.sum((1, 2)) - (net(x) - net(background))
    assert float(missing.detach().abs().max()) < 1e-10
    gradients = parameter_gradients(found.tensor, list(net.parameters()))
    assert float(gradients[0].abs().max()) > 0
    for held in (net, (net, net.flatten)):  # ids have nothing in between, which SHAP asks for
        with pytest.raises(TypeError, match="LayerExpectedGradients"):
            differentiable(shap.GradientExplainer(held, background))(x)


# ---- W is read in any number of pieces -----------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OF_TABLES if n != "SamplingExplainer"])
@pytest.mark.parametrize("logit", [False, True])
def test_pieces_are_as_the_whole(name: str, logit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(mlp(2), nn.Sigmoid())
    options: dict[str, Any] = {}
    if logit:
        kernel = name == "KernelExplainer"
        options = {"link": "logit"} if kernel else {"link": shap.links.logit}
        options.update({} if kernel else {"linearize_link": False})
    explainer = stock(name, net, **options)
    found = []
    for rows, columns in ((1 << 13, masked._NUMBERS), (20, 100)):
        monkeypatch.setattr(masked, "_NUMBERS", columns)
        for module in (coalitions, model):
            monkeypatch.setattr(module, "rows_at_once", lambda _, rows=rows: rows)
        adapter = differentiable(explainer, model=net)
        values = seeded(lambda adapter=adapter: adapter(table(2, 1)).tensor)
        gradients = torch.autograd.grad(values.square().sum(), list(net.parameters()))
        state = np.random.get_state()[1]
        found.append((values.detach(), *gradients, torch.as_tensor(state.astype(np.int64))))
        with torch.no_grad():
            plain = seeded(lambda adapter=adapter: adapter(table(2, 1)))
        assert not plain.tensor.requires_grad
        assert np.abs(plain.values - values.detach().numpy()).max() < 1e-12
    # Sums of a few hundred rows in another order, in double precision.
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def assert_adds_up(found: Any, net: nn.Module, x: np.ndarray) -> None:
    """Values and their gradients add up to the output's."""
    expected = net(torch.as_tensor(x)).squeeze(1)
    total = found.tensor.sum(1) + found.tensor_base
    assert torch.allclose(total, expected, atol=1e-12)
    gradients, wanted = (
        torch.autograd.grad(t.sum(), list(net.parameters())) for t in (total, expected)
    )
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("name", ["CoalitionExplainer", "ExactExplainer"])
def test_what_repeats_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of SHAP for each row, and for the first those that W takes."""
    net, runs = mlp(2), list[int]()
    cls = getattr(shap, name)
    explain_row = cls.explain_row
    clustered = shap.maskers.Partition(table(7, 0)) if name == "ExactExplainer" else None
    adapter = adapted(name, stock(name, net, clustered), net)
    monkeypatch.setattr(
        cls, "explain_row", lambda *a, **k: [runs.append(1), explain_row(*a, **k)][1]
    )
    found = adapter(table(6, 1))
    assert len(runs) == 6 + 1
    assert_adds_up(found, net, table(6, 1))


def test_orders_along_a_tree() -> None:
    """Numba draws them, by no seed: the values add up and the graph is theirs."""
    net, x = mlp(2), table(2, 1)
    explainer = shap.PermutationExplainer(predictor(net), shap.maskers.Partition(table(7, 0)))
    adapter = differentiable(explainer, model=net)
    found = adapter(x, max_evals=33)
    assert_adds_up(found, net, x)


def test_many_features_of_exact() -> None:
    """More coalitions than are read off: 2 ** 13."""
    net = nn.Sequential(nn.Linear(13, 3), nn.Tanh(), nn.Linear(3, 1))
    random = np.random.RandomState(0)
    explainer = shap.ExactExplainer(predictor(net), random.randn(2, 13))
    adapter, x = differentiable(explainer, model=net), random.randn(1, 13)
    found = adapter(x)
    assert np.abs(found.values - explainer(x).values).max() < 1e-12
    assert_adds_up(found, net, x)
