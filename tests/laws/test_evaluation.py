"""What is explained is the model as it predicts: without dropout, whatever mode it is in."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.laws.leaves import CLASSES, Around, Leaf, every_leaf


class DropsInputs(nn.LSTM):
    """A recurrent module with dropout of its own."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(F.dropout(x, 0.5, self.training), hx)


class Drops(Around):
    """A model with dropout behind it, as a module and inside a recurrent one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.dropout = nn.Dropout(0.5)
        self.lstm = DropsInputs(CLASSES, CLASSES, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        states: Tensor = self.lstm(self.dropout(logits).unsqueeze(1))[0]
        return logits + states.squeeze(1)


@every_leaf
def test_models_in_training_are_explained_as_in_evaluation(leaf: Leaf) -> None:
    model, x = Drops(leaf.model()), leaf.batch()
    prior = leaf.make(model).eval()  # draws the same at each call
    expected = prior.forward(x, **leaf.call(x))
    for training in (True, False):
        model.train(training)
        assert torch.equal(prior(x, **leaf.call(x)), expected)
