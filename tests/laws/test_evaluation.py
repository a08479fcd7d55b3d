"""What is explained: without dropout, and with BatchNorm as the model is trained on the batch."""

from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor, nn

from captum_priors import AttributionPrior, differentiable
from captum_priors.penalties import l2
from tests.laws.leaves import CLASSES, FEATURES, Leaf, every_leaf


class Drops(nn.Module):
    """A model with dropout behind it, as a module and inside a recurrent one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.5)
        self.lstm = nn.LSTM(CLASSES, CLASSES, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        states: Tensor = self.lstm(self.dropout(logits).unsqueeze(1))[0]
        return logits + states.squeeze(1)

    def __getitem__(self, i: int) -> nn.Module:
        return self.inner[i]


@every_leaf
def test_models_in_training_are_explained_as_in_evaluation(leaf: Leaf) -> None:
    model, x = Drops(leaf.model()), leaf.batch()
    prior = leaf.make(model).eval()  # draws the same at each call
    expected = prior.forward(x, **leaf.call(x))
    for training in (True, False):
        model.train(training)
        assert torch.equal(prior(x, **leaf.call(x)), expected)


class Normed(nn.Module):
    """A layer of BatchNorm that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = torch.tanh(self.norm(layer(x)))
        return self.head(x)

    def written_out(self, x: Tensor, batch: Tensor) -> Tensor:
        """The function of x that has the statistics of a batch."""
        for layer in (self.first, self.second):
            x, batch = layer(x), layer(batch)
            scale = self.norm.weight / (batch.var(0, correction=0) + self.norm.eps).sqrt()
            mean = batch.mean(0)
            x, batch = (torch.tanh((t - mean) * scale + self.norm.bias) for t in (x, batch))
        return self.head(x)


@pytest.mark.parametrize("way", ["double_backprop", "recompute"])
def test_batch_norm_in_training_is_explained_on_the_batch(way: Any) -> None:
    """Its statistics are constants for the inputs, and functions of the parameters."""
    model, x = Normed().train(), torch.randn(6, FEATURES)
    explainer = differentiable(ca.Saliency(model), differentiation=way)
    value = AttributionPrior(explainer, l2, abs=False)(x, target=1)
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model.written_out(z, x)[:, 1].sum(), z, create_graph=True)
    expected = l2(g).mean()
    torch.testing.assert_close(value, expected)
    parameters = [model.first.weight, model.second.weight, model.norm.weight, model.head.weight]
    found, wanted = (torch.autograd.grad(v, parameters) for v in (value, expected))
    torch.testing.assert_close(found, wanted)
