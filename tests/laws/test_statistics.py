"""Numbers about numbers: estimators that meet their mean, intervals, one reading of maps."""

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from torch import Tensor, nn

from captum_priors import ExpectedGradients
from captum_priors import distances as d
from captum_priors import metrics as m
from captum_priors.attacks import RandomAttack
from captum_priors.metrics import stability_report
from captum_priors.penalties import total_variation

U, V = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [2.0], [0.0], [5.0]])


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return self.same(u)[:, 0] * v[:, 0]


@pytest.mark.parametrize("estimator", ["control_variate", "monte_carlo"])
@pytest.mark.parametrize("n_samples", [1, 2, 3, 4, 8, 64])
def test_tables_of_other_lengths_are_drawn_independently(estimator: Any, n_samples: int) -> None:
    """f = uv at (1, 1): E (1 - u') (v' + a (1 - v')) over all pairs, a uniform."""
    exact = float(((1 - U) * (1 + V.T) / 2).mean())
    n = 400
    x, u, v = (t.to(torch.get_default_dtype()) for t in (torch.ones(n, 1), U, V))
    found = (
        ExpectedGradients(Product())
        .attribute((x, x), (u, v), n_samples=n_samples, estimator=estimator)[0]
        .detach()
    )
    assert float((found.mean() - exact).abs()) < 4.5 * float(found.std()) / n**0.5 + 1e-12


@pytest.mark.parametrize("n_samples", [1, 2, 3])
def test_tables_of_one_length_are_drawn_jointly(n_samples: int) -> None:
    """Rows of one table belong together: (0, 0), (2, 2), so E (1 - u') (v' + a (1 - v')) = -1/2."""
    x, u = (t.to(torch.get_default_dtype()) for t in (torch.ones(400, 1), U))
    found = ExpectedGradients(Product()).attribute((x, x), (u, u), n_samples=n_samples)[0].detach()
    assert float((found.mean() + 0.5).abs()) < 4 * float(found.std()) / 20 + 1e-12


def report(metric: Callable[[Any, Any], Tensor], **attacks: Any) -> dict[str, Any]:
    """Scores of a linear model, whose map is the same everywhere, for eight examples."""
    explainer = ca.Saliency(nn.Linear(5, 3))
    found = stability_report(
        {"linear": explainer},
        {"linear": {"first": RandomAttack(explainer, radius=1e-6), **attacks}},
        [(torch.randn(8, 5), torch.zeros(8, dtype=torch.long))],
        k=2,
        metrics={"metric": metric},
        control="control" if attacks else None,
    )
    (row,) = (row for row in found.rows if row.attack == "first")
    return row.scores


def test_intervals_of_means_are_students() -> None:
    """Eight errors of 0 do not make an error of .32 likely; zeros and ones may be errors, too."""
    for values in ([0.0] * 8, [1.0] * 8, [0.0, 1.0] * 4, [0.0] * 7 + [1.0]):
        score = report(lambda a, b, v=values: torch.tensor(v))["metric"]
        each = torch.tensor(values)
        half = 2.364624 * float(each.std()) / 8**0.5  # Student's .975 quantile, 7 degrees
        assert score.low == pytest.approx(float(each.mean()) - half, abs=1e-6)
        assert score.high == pytest.approx(float(each.mean()) + half, abs=1e-6)


def test_intervals_of_differences_contain_zero() -> None:
    """What two attacks differ by may be 0 or 1 in a sample, and is no share for that."""
    values = [0.0] * 7 + [1.0]
    turn = iter([values, [0.0] * 8])
    score = report(
        lambda a, b: torch.tensor(next(turn)),
        control=Moved(),
    )["metric - control"]
    assert score.mean == pytest.approx(1 / 8)
    assert score.low < 0 < score.high  # the truth may be a difference of 0 or less


class Moved:
    def perturb(self, inputs: Tensor, target: Any = None) -> Tensor:
        return inputs + 1e-6


def test_intervals_of_shares_are_wilsons() -> None:
    score = report(lambda a, b: a.flatten(1)[:, 0])["prediction kept"]
    assert score.mean == 1
    assert (score.low, score.high) == pytest.approx((0.675592, 1), abs=1e-4)  # 8 of 8


def reading(function: Callable[[Tensor], Tensor], a: Tensor) -> str:
    """How three dimensions are read: as maps, as channels of sequences, or not at all."""
    try:
        found = function(a)
    except ValueError as error:
        return "refused" if "`dim`" in str(error) else str(error)
    return "maps" if torch.allclose(found, function(a.unsqueeze(1))) else "channels"


def test_three_dimensions_have_one_reading() -> None:
    a, b = torch.randn(2, 6, 7), torch.randn(2, 6, 7)
    shape = list(a.shape)
    other = lambda t: b.reshape(shape if t.dim() == 3 else t.shape)  # noqa: E731  # beside its like
    found = {
        "total_variation": reading(total_variation, a),
        "distances.ssim": reading(lambda t: d.ssim(t, other(t)), a),
        "metrics.ssim": reading(lambda t: m.ssim(t, other(t)), a),
    }
    assert len(set(found.values())) == 1, found
