"""Concept vectors against scikit-learn, and those of Captum's TCAV."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import LayerActivation
from captum.concept import TCAV, Concept
from torch import Tensor, nn
from torch.utils.data import DataLoader

from captum_priors.concepts import fit, from_captum
from captum_priors.priors import ConceptPrior

linear_model = pytest.importorskip("sklearn.linear_model")


def samples(n: int, features: int) -> tuple[Tensor, Tensor]:
    """Correlated features, some of which a third of the examples has more of."""
    labels = torch.arange(n) % 3 == 0
    rows = torch.randn(n, features) @ torch.randn(features, features)
    return rows + 2 * labels.unsqueeze(1) * torch.randn(features), labels


def unit(vector: Any) -> Tensor:
    vector = torch.as_tensor(vector).flatten()
    return vector / vector.norm()


ORACLES: dict[str, Callable[[Tensor, Tensor, float], Any]] = {
    "difference": lambda a, y, alpha: a[y].mean(0) - a[~y].mean(0),
    "ridge": lambda a, y, alpha: linear_model.Ridge(alpha=alpha).fit(a, 2 * y.double() - 1).coef_,
    "logistic": lambda a, y, alpha: (
        linear_model.LogisticRegression(C=1 / alpha, tol=1e-10, max_iter=10_000).fit(a, y).coef_
    ),
}


@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(60, 5), (20, 40)], ids=["tall", "wide"])
@pytest.mark.parametrize("method", ORACLES)
def test_directions_are_scikit_learns(method: Any, shape: tuple[int, int], alpha: float) -> None:
    activations, labels = samples(*shape)
    expected = unit(ORACLES[method](activations, labels, alpha))
    # Both minimise to a gradient of 1e-10 or so, over a curvature of at least alpha.
    tolerance = 1e-6 if method == "logistic" else 1e-10
    found = fit(activations, labels, method, alpha=alpha)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    again = fit(activations.float(), labels.long(), method, alpha=alpha)
    assert again.dtype == torch.float32
    # Of float32 numbers, in double precision.
    torch.testing.assert_close(again.double(), expected, rtol=0, atol=1e-4)
    whole = (10 * activations).round().long()  # a unit vector of whole numbers would be zero
    rounded = fit(whole.float(), labels, method, alpha=alpha)
    torch.testing.assert_close(fit(whole, labels, method, alpha=alpha), rounded)


@pytest.mark.parametrize("method", ORACLES)
def test_maps_are_averaged_over_places(method: Any) -> None:
    maps, labels = torch.randn(30, 4, 3, 5), torch.arange(30) % 2
    expected = fit(maps.mean((2, 3)), labels, method)
    torch.testing.assert_close(fit(maps, labels, method), expected)
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(fit(tokens, labels, method, channel_dim=-1), expected)


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(method: Any, context: Any) -> None:
    activations, labels = samples(30, 4)
    expected = fit(activations.requires_grad_(), labels, method)
    assert not expected.requires_grad
    with context():
        found = fit(activations * 1, labels, method)
    torch.testing.assert_close(found, expected)


def test_what_else_varies_moves_filters_and_not_patterns() -> None:
    """A distractor that two features share: ridge cancels it, the difference of means does not."""
    labels = torch.arange(2000) % 2
    distractor = 5 * torch.randn(2000)
    activations = torch.stack([labels + distractor, distractor], 1) + 0.1 * torch.randn(2000, 2)
    # The concept is the first feature; means over 1,000 rows are off by 5 / sqrt(1000), twice.
    assert abs(float(fit(activations, labels, "ridge") @ torch.tensor([1.0, 1.0]))) < 0.1
    pattern = fit(activations - distractor.unsqueeze(1), labels)
    assert float(pattern[0]) > 0.99


class Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


@pytest.mark.filterwarnings("ignore:Using default classifier for TCAV")
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")
def test_vectors_of_captums_tcav(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    plain, dark, tagged = torch.randn(3, 40, 1, 6, 6)
    tagged[:, :, :2, :2] += 6
    dark -= 3
    tag, noise, shade = (
        Concept(i, name, DataLoader(Images(images), 8))
        for i, (name, images) in enumerate([("tag", tagged), ("noise", plain), ("dark", dark)])
    )
    tcav = TCAV(model, ["1"], save_path=f"{tmp_path}/")
    cavs = tcav.compute_cavs([[tag, noise]])
    vector = from_captum(tcav, "1", tag)
    assert vector.norm().item() == pytest.approx(1, abs=1e-6)  # float32
    assert torch.equal(from_captum(cavs, "1", noise), -vector)
    assert torch.equal(from_captum(cavs["0-1"]["1"], "1", tag), vector)
    activations = LayerActivation(model, model[1]).attribute(torch.cat([tagged, plain]))
    own = fit(activations.flatten(1), torch.arange(80) < 40)
    assert float(own @ vector) > 0.3  # 32 numbers: random directions are within .2 of a right angle
    # What the prior makes of it is the mean of Captum's own products, all of one sign or not.
    weight = model[3].weight[1]
    value = ConceptPrior(model, model[1], vector)(plain, target=1)
    torch.testing.assert_close(value, (weight @ vector).abs())
    tcav.compute_cavs([[tag, shade]])
    for wrong in ((tcav, "1", tag), (tcav, "1", Concept(9, "none", None)), (tcav, "0", tag)):
        with pytest.raises(ValueError, match="`cavs`: expected one vector of"):
            from_captum(*wrong)
