"""SHAP adapters in use: maskers, links, plots, saving, refusals, training, SHAP left as it is."""

import copy
import subprocess
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import shap
import torch
from torch import Tensor, nn

from captum_priors import AttributionPrior, NotDifferentiableError, ShapAdapter, differentiable
from captum_priors.adapters.shap import ROWS
from captum_priors.penalties import l2
from captum_priors.testing import check_differentiable
from tests.adapters.shap_cases import adapted, data, mlp, predictor, stock, table
from tests.adapters.test_shap_laws import every_pair, seeded, set_up
from tests.asserts import leaves_no_trace, parameter_gradients


def same(explainer: Any, model: Any, X: Any, **options: Any) -> Any:
    """The adapter's explanation, after a comparison with SHAP's."""
    expected = seeded(lambda: explainer(X, **options))
    found = seeded(lambda: differentiable(explainer, model=model)(X, **options))
    for name in ("values", "base_values", "main_effects", "hierarchical_values", "error_std"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        assert a is None or np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-10
    assert np.abs(found.values - found.tensor.detach().numpy()).max() < 1e-10
    return found


@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("name", ["PermutationExplainer", "ExactExplainer", "PartitionExplainer"])
def test_logit_link(name: str, linearize: bool) -> None:
    model = nn.Sequential(mlp(1), nn.Sigmoid())
    masker: Any = table(7, 0)
    masker = shap.maskers.Partition(masker) if name == "PartitionExplainer" else masker
    cls = getattr(shap, name)
    explainer = cls(predictor(model), masker, link=shap.links.logit, linearize_link=linearize)
    if not (name == "PartitionExplainer" and linearize):  # stock has no such values: it fails
        same(explainer, model, table(2, 1))
    adapter = differentiable(explainer, model=model)
    x = torch.as_tensor(table(2, 1))
    check_differentiable(adapter, x, parameters=model.named_parameters(), max_evals=40)


def test_logit_link_of_kernel() -> None:
    model = nn.Sequential(mlp(1), nn.Sigmoid())
    explainer = shap.KernelExplainer(predictor(model), table(7, 0), link="logit")
    same(explainer, model, table(2, 1))
    adapter = differentiable(explainer, model=model)
    x = torch.as_tensor(table(2, 1))
    for l1_reg in (False, "aic", "num_features(2)", 1e-4):
        check_differentiable(
            adapter, x, parameters=model.named_parameters(), nsamples=20, l1_reg=l1_reg
        )


def test_options_of_shap_keep_their_meaning() -> None:
    model = mlp(3)
    predict, X = predictor(model), table(2, 1)
    tree = shap.maskers.Partition(table(7, 0))
    same(shap.ExactExplainer(predict, table(7, 0)), model, X, interactions=True)
    same(shap.ExactExplainer(predict, tree), model, X)
    permutation = shap.PermutationExplainer(predict, table(7, 0), max_evals=60)
    same(permutation, model, X, main_effects=True, error_bounds=True)
    same(permutation, model, X)
    partition = shap.PartitionExplainer(predict, tree)
    for options in ({"max_evals": 6, "batch_size": 2}, {"fixed_context": 0}, {"fixed_context": 1}):
        same(partition, model, X, **options)
    chosen = same(partition, model, X, outputs=shap.Explanation.argsort.flip[:2])
    assert chosen.tensor.shape == (2, 5, 2)


def test_frames_means_and_constant_features() -> None:
    model = mlp(1)
    background = table(7, 0)
    background[:, 4] = 1.5
    X = table(2, 1)
    X[0, 4] = 1.5
    columns = list("abcde")
    frame, rows = pd.DataFrame(background, columns=columns), pd.DataFrame(X, columns=columns)
    for cls in (shap.KernelExplainer, shap.PermutationExplainer, shap.ExactExplainer):
        found = same(cls(predictor(model), frame), model, rows)
        assert list(found.feature_names) == columns
        assert found.values[0, 4] == 0
    same(shap.KernelExplainer(predictor(model), shap.kmeans(background, 3)), model, X)


class Scaled(nn.Module):
    """A model whose first parameter is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.sum(1)) * self.scale


@pytest.mark.parametrize("cls", [shap.KernelExplainer, shap.SamplingExplainer])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_single_row(cls: Any, outputs: int) -> None:
    model: nn.Module = Scaled() if outputs == 1 else mlp(3)
    adapter = differentiable(cls(predictor(model), table(7, 0)), model=model)
    found = adapter(table(1, 1))
    assert found.base_values.shape == found.tensor_base.shape == ((1,) if outputs == 1 else (1, 3))
    total = found.values.sum(1) + found.base_values
    # Sampling distributes its error up to one part in 1e6.
    assert np.abs(total - predictor(model)(table(1, 1))).max() < 1e-6


@pytest.mark.parametrize("cls", [shap.KernelExplainer, shap.SamplingExplainer])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_row_without_a_batch_axis(cls: Any, outputs: int) -> None:
    """These two of SHAP's take a vector, or a row of a table."""
    plt.switch_backend("Agg")
    model, row = mlp(outputs), table(1, 1)[0]
    explainer = cls(predictor(model), pd.DataFrame(table(7, 0)))
    for X in (row, pd.Series(row)):
        expected = seeded(lambda X=X: explainer(X))
        found = seeded(lambda X=X: differentiable(explainer, model=model)(X))
        assert found.values.shape == expected.values.shape == found.tensor.shape
        assert np.abs(found.values - expected.values).max() < 1e-10  # rounding in float64
        assert np.abs(found.values - found.tensor.detach().numpy()).max() < 1e-10
        total = found.values.sum(0) + found.base_values
        # Sampling distributes its error up to one part in 1e6.
        assert np.abs(total - predictor(model)(row[None])[0]).max() < 1e-6
        if outputs == 1:
            shap.plots.waterfall(found, show=False)
            plt.close("all")


@pytest.mark.parametrize("cls", [shap.KernelExplainer, shap.SamplingExplainer])
def test_rows_in_which_nothing_varies_keep_their_graph(cls: Any) -> None:
    model, constant = mlp(1), np.ones((2, 5))
    adapter = differentiable(cls(predictor(model), constant), model=model)
    loss = adapter.attribute(torch.as_tensor(constant)).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(float(g.abs().max()) == 0 for g in gradients)


def test_defaults_of_the_constructor_count() -> None:
    model, x = mlp(1), table(1, 1)
    masker = shap.maskers.Partition(table(7, 0))
    few = shap.PartitionExplainer(predictor(model), masker, max_evals=4)
    many = shap.PartitionExplainer(predictor(model), masker)
    found = same(few, model, x)
    assert np.abs(found.values - same(many, model, x).values).max() > 1e-6
    assert np.abs(found.values - same(many, model, x, max_evals=4).values).max() < 1e-12
    by_captum = differentiable(few, model=model).attribute(torch.as_tensor(x))
    assert np.abs(by_captum.detach().numpy() - found.values).max() < 1e-12


def test_sparse_rows() -> None:
    model = nn.Linear(5, 1)
    coefficients = (model.weight.detach().numpy()[0].copy(), float(model.bias.detach()))
    explainer = shap.LinearExplainer(coefficients, table(9, 0))
    dense = table(3, 1) * (table(3, 2) > 0)
    found = same(explainer, model, scipy.sparse.csr_matrix(dense))
    assert np.array_equal(found.values, same(explainer, model, dense).values)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x.permute(0, 3, 1, 2))).flatten(1))


def test_images() -> None:
    model = Image()
    masker = shap.maskers.Image(np.full((4, 4, 3), 0.5))
    X = np.random.RandomState(0).rand(2, 4, 4, 3)
    explainer = shap.PartitionExplainer(predictor(model), masker)
    assert same(explainer, model, X, max_evals=30).tensor.shape == (2, 4, 4, 3, 2)
    adapter = differentiable(explainer, model=model)
    parameters = list(model.named_parameters())
    check_differentiable(adapter, torch.as_tensor(X), target=1, parameters=parameters, max_evals=20)
    with pytest.raises(NotDifferentiableError, match="require no gradient"):
        adapter.attribute(torch.as_tensor(X).requires_grad_(), target=1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 4), nn.Linear(4, 2)

    def forward(self, texts: Any) -> Tensor:
        ids = [[sum(map(ord, word)) % 50 for word in str(t).split()] or [0] for t in texts]
        means = [self.embedding(torch.tensor(i)).mean(0) for i in ids]
        return self.head(torch.tanh(torch.stack(means)))


def test_text_reaches_the_embedding() -> None:
    model = Words()
    texts = ["a good film with songs", "not so bad at all my friends"]
    explainer = shap.PartitionExplainer(
        lambda t: model(t).detach().numpy(), shap.maskers.Text(r"\W+")
    )
    expected = explainer(texts)
    found = differentiable(explainer, model=model)(texts)
    for a, b, c in zip(expected.values, found.values, found.tensor, strict=True):
        assert np.abs(a - b).max() < 1e-10
        assert np.abs(c.detach().numpy() - b).max() < 1e-10
    loss = torch.cat([t.flatten() for t in found.tensor]).square().sum()
    gradient = torch.autograd.grad(loss, model.embedding.weight)[0]
    assert float(gradient.abs().max()) > 0


def test_what_shap_picks() -> None:
    model = mlp(1)
    for masker in (table(7, 0), torch.as_tensor(table(7, 0))):
        adapter = differentiable(shap.Explainer(model, masker))
        inputs = torch.as_tensor(table(2, 1))
        check_differentiable(adapter, inputs, parameters=list(model.named_parameters()))


def test_classes() -> None:
    model = mlp(1)
    cls = differentiable(shap.PermutationExplainer)
    assert differentiable(cls) is cls
    assert differentiable(shap.PermutationExplainer) is cls
    adapter = cls(model, shap.maskers.Independent(table(7, 0)))
    assert isinstance(adapter, ShapAdapter)
    assert type(adapter.explainer) is shap.PermutationExplainer
    assert differentiable(adapter) is adapter
    phi = adapter.attribute(torch.as_tensor(table(2, 1)))
    total = phi.sum(1) + float(adapter.expected_value[0])
    assert torch.allclose(total, model(torch.as_tensor(table(2, 1)))[:, 0])
    with pytest.raises(NotDifferentiableError, match="model=net"):
        differentiable(shap.KernelExplainer)(lambda x: x.sum(1), table(7, 0))


def test_refusals() -> None:
    model = mlp(1)
    with pytest.raises(NotDifferentiableError, match="splits of trees"):
        differentiable(shap.TreeExplainer)
    explainer = shap.ExactExplainer(predictor(model), table(7, 0))
    with pytest.raises(NotDifferentiableError, match="model=net"):
        differentiable(explainer)
    with pytest.raises(ValueError, match="on the background"):
        differentiable(explainer, model=nn.Sequential(model, nn.Sigmoid()))
    with pytest.raises(ValueError, match="on the background"):
        adapted("LinearExplainer", stock("LinearExplainer", nn.Linear(5, 1)), model)

    imputed = shap.maskers.Impute(table(9, 0))
    background = torch.as_tensor(table(7, 0))
    for made, said in (
        (shap.LinearExplainer((np.ones(5), 0.0), imputed, nsamples=2), "Independent masker"),
        (shap.GradientExplainer(model, background, local_smoothing=0.3), "stdevs"),
    ):
        with pytest.raises(NotDifferentiableError, match=said):
            differentiable(made, model=model)
    with pytest.raises(NotDifferentiableError, match="LayerExpectedGradients"):
        differentiable(
            shap.GradientExplainer((model, model[2]), background), differentiation="recompute"
        )

    class Mine(shap.ExactExplainer):
        pass

    with pytest.raises(NotDifferentiableError, match="Mine"):
        differentiable(Mine(model, table(7, 0)))
    with pytest.raises(TypeError, match="`model`"):
        differentiable(differentiable(explainer, model=model).attribute, model=model)


def _draw(name: str, explanation: Any) -> None:
    if explanation.values.ndim == 3:  # a plot shows one output
        explanation = explanation[..., 1]
    shown = {"waterfall": explanation[0], "scatter": explanation[:, 0]}.get(name, explanation)
    getattr(shap.plots, name)(shown, show=False)
    assert plt.gcf().axes


@every_pair
def test_plots(name: str, outputs: int) -> None:
    plt.switch_backend("Agg")
    model, explainer, adapter, x = set_up(name, outputs)
    X = data(name, np.concatenate([x, x + 1]), model)
    explanation = adapter(X)
    plots = ("waterfall", "bar", "beeswarm", "heatmap", "violin", "scatter")
    drawn = []
    for plot in plots:
        try:
            _draw(plot, explanation)
            drawn.append(plot)
        except (IndexError, ValueError, TypeError, AttributeError):
            # Nor is SHAP's own explanation drawn.
            with pytest.raises((IndexError, ValueError, TypeError, AttributeError)):
                _draw(plot, seeded(lambda: explainer(data(name, X, model))))
        plt.close("all")
    assert {"waterfall", "violin"} <= set(drawn)
    if name in ("GradientExplainer", "DeepExplainer"):  # SHAP's own are drawn nowhere
        assert drawn == list(plots)
    copy.deepcopy(explanation)


class Pooled(nn.Module):
    """A CNN with what DeepExplainer has rules for; windows that overlap have none of SHAP's."""

    def __init__(self, window: int = 2, stride: int = 2) -> None:
        super().__init__()
        size = (6 - window) // stride + 1
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(),
            nn.MaxPool2d(window, stride),
            nn.Conv2d(3, 4, 2),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(4 * (size - 1) ** 2, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("cls", [shap.GradientExplainer, shap.DeepExplainer])
def test_networks_of_images(cls: Any) -> None:
    model, background, x = Pooled().eval(), torch.randn(5, 1, 8, 8), torch.randn(3, 1, 8, 8)
    x[0] = background[1]  # quotients of zero by zero
    explainer = cls(model, background)
    adapter = differentiable(explainer)
    expected = seeded(lambda: explainer.shap_values(x.clone()))
    assert np.abs(seeded(lambda: adapter.shap_values(x)) - expected).max() < 1e-10
    check_differentiable(adapter, x, target=torch.tensor([0, 2, 1]))
    interim = cls((model, model.net[3]), background)
    expected = seeded(lambda: interim.shap_values(x.clone()))
    found = seeded(lambda: differentiable(interim)(x).tensor)
    assert np.abs(found.detach().numpy() - expected).max() < 1e-10
    by_captum = seeded(lambda: differentiable(interim).attribute(x, target=1))
    assert torch.allclose(by_captum, found[..., 1])


def test_overlapping_windows_add_up() -> None:
    """Where SHAP writes shares over each other and loses a part of the sum."""
    model, background = Pooled(3, 1).eval(), torch.randn(5, 1, 8, 8)
    x = torch.randn(2, 1, 8, 8)
    adapter = differentiable(shap.DeepExplainer(model, background))
    total = adapter(x).tensor.sum((1, 2, 3)) + adapter(x).tensor_base
    assert torch.allclose(total, model(x), atol=1e-10)
    check_differentiable(adapter, x, target=1)


@pytest.mark.parametrize("cls", [shap.GradientExplainer, shap.DeepExplainer])
def test_several_inputs(cls: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 5)
            self.act, self.head = nn.Tanh(), nn.Linear(10, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(self.act(torch.cat([self.left(a), self.right(b)], 1)))

    model, background = Two(), [torch.randn(6, 4), torch.randn(6, 3)]
    inputs = (torch.randn(3, 4), torch.randn(3, 3))
    explainer = cls(model, background)
    adapter = differentiable(explainer)
    expected = seeded(lambda: explainer.shap_values([x.clone() for x in inputs]))
    found = seeded(lambda: adapter.shap_values(list(inputs)))
    assert all(np.abs(a - b).max() < 1e-10 for a, b in zip(found, expected, strict=True))
    check_differentiable(adapter, inputs, target=1)
    prior = AttributionPrior(adapter, l2)
    with leaves_no_trace(model, tensors=inputs):
        value = prior(inputs, target=torch.tensor([0, 1, 1]))
    each = [torch.as_tensor(e) for e in expected]
    chosen = [torch.stack([e[i, ..., t] for i, t in enumerate([0, 1, 1])]) for e in each]
    if cls is shap.DeepExplainer:  # without draws
        assert torch.allclose(value, l2(tuple(c.to(inputs[0]) for c in chosen)).mean())
    gradients = parameter_gradients(value, list(model.parameters()))
    assert all(float(g.abs().max()) > 0 for g in gradients[:-1])  # all but the last bias


def test_ways_agree_on_a_smooth_model() -> None:
    model = mlp(1)
    explainer = shap.GradientExplainer(model, torch.as_tensor(table(7, 0)))
    x, gradients = torch.as_tensor(table(3, 1)), []
    for way in ROWS["GradientExplainer"].differentiations:
        value = differentiable(explainer, differentiation=way).attribute(x, rseed=0)
        loss = value.square().sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-10)
    difference = gradients[0] - gradients[2][: len(gradients[0])]
    assert float(difference.norm() / gradients[0].norm()) < 5e-3  # a finite step


SCRIPT = """
import sys
order = sys.argv[1].split(",")
import {first}
assert "shap" not in sys.modules or order[0] == "shap"
import {second}
import shap, torch, numpy as np
before = {{n: set(vars(m)) for n, m in sys.modules.items() if n.startswith("shap")}}
def members_of(n):  # without what Python's copying keeps on a class
    return {{k: v for k, v in vars(getattr(shap, n)).items() if k != "__slotnames__"}}
members = {{n: members_of(n) for n in dir(shap) if n.endswith("Explainer")}}
from captum_priors import differentiable
net = torch.nn.Linear(3, 1)
f = lambda x: net(torch.tensor(x, dtype=torch.float32)).detach().numpy()[:, 0]
stock = shap.PermutationExplainer(f, np.eye(3), seed=0)
np.random.seed(0); a = stock(np.ones((2, 3))).values
differentiable(stock, model=net)(np.ones((2, 3)))
np.random.seed(0); b = stock(np.ones((2, 3))).values
assert np.array_equal(a, b)
assert members == {{n: members_of(n) for n in members}}
assert all(names == set(vars(sys.modules[n])) for n, names in before.items())
assert type(stock) is shap.PermutationExplainer and type(stock.model) is shap.models.Model
"""


@pytest.mark.parametrize(
    ("first", "second"), [("captum_priors", "shap"), ("shap", "captum_priors")]
)
def test_shap_is_left_as_it_is(first: str, second: str) -> None:
    code = SCRIPT.format(first=first, second=second)
    done = subprocess.run(
        [sys.executable, "-c", code, f"{first},{second}"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
