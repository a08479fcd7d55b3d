# ruff: noqa: NPY002  # the generator that SHAP draws from
"""How often the model is called, on how many rows: values and draws are SHAP's all the same."""

from typing import Any

import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn

from captum_priors import differentiable
from captum_priors.adapters._shap import _coalitions, _torch_model
from tests.adapters.shap_cases import FEATURES, mlp, predictor, stock, table


class Counted(nn.Module):
    """Remembers how many rows each call had."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        output: Tensor = self.model(x)
        return output


def counted_adapter(explainer: Any, model: nn.Module) -> tuple[Any, Counted]:
    counted = Counted(model)
    adapter = differentiable(explainer, model=counted)
    adapter(table(1, 9))  # holds both functions against each other, once
    counted.rows.clear()
    return adapter, counted


@pytest.mark.parametrize("options", [{}, {"main_effects": True}, {"error_bounds": True}])
@pytest.mark.parametrize("max_evals", ["auto", 500, 4 * FEATURES + 2, 2 * FEATURES + 1])
def test_permutations_are_foreseen(max_evals: Any, options: dict[str, bool]) -> None:
    torch.set_default_dtype(torch.float64)
    model, x = mlp(2), table(3, 1)
    x[1, 2] = 0.5
    background = table(7, 0)
    background[:, 2] = 0.5  # constant, and in one row so is the input: its orders are shorter
    explainer = stock("PermutationExplainer", model, background)
    adapter, counted = counted_adapter(explainer, model)
    drawn = {}
    for name, of in (("stock", explainer), ("ours", adapter)):
        np.random.seed(3)
        drawn[name] = of(x, max_evals=max_evals, **options).values, np.random.get_state()[1:]
    np.testing.assert_allclose(drawn["ours"][0], drawn["stock"][0], atol=1e-10)
    np.testing.assert_equal(drawn["ours"][1], drawn["stock"][1])
    assert len(counted.rows) == len(x)  # one call for each row, whatever the number of orders


def test_what_is_not_foreseen_is_evaluated_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    model, x = mlp(1), table(2, 1)
    explainer = stock("PermutationExplainer", model)
    adapter, counted = counted_adapter(explainer, model)
    shuffle, foresee = np.random.shuffle, type(adapter)._look_ahead

    def other(order: np.ndarray) -> None:
        shuffle(order)
        order[:] = order[::-1].copy()

    def look_ahead(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "shuffle", shuffle)
            foresee(*args)

    monkeypatch.setattr(type(adapter), "_look_ahead", look_ahead)
    monkeypatch.setattr(np.random, "shuffle", other)  # as a later SHAP might
    drawn = []
    for of in (explainer, adapter):
        np.random.seed(3)
        drawn.append(of(x, max_evals=22).values)
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-10)
    assert len(counted.rows) > len(x)


@pytest.mark.parametrize("name", ["ExactExplainer", "PermutationExplainer", "KernelExplainer"])
def test_parts_are_as_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    model, x = mlp(3), table(2, 1)
    adapter, counted = counted_adapter(stock(name, model), model)
    found = []
    for rows in (1 << 13, 20):
        for module in (_coalitions, _torch_model):
            monkeypatch.setattr(module, "rows_at_once", lambda _, rows=rows: rows)
        counted.rows.clear()
        np.random.seed(0)
        values = adapter(x).tensor
        gradients = torch.autograd.grad(values.square().sum(), list(model.parameters()))
        found.append((values.detach(), *gradients))
        longest = max(counted.rows)
        assert longest <= rows
    assert longest > 1
    # Sums of at most 224 rows in another order, in double precision.
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_what_shap_requires_is_said_by_shap() -> None:
    model = mlp(1)
    adapter = differentiable(shap.PermutationExplainer(predictor(model), table(7, 0)), model=model)
    with pytest.raises(TypeError, match="max_evals"):
        adapter.explain_row(table(1, 1)[0])
