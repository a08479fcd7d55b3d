"""The stability report: what it computes, how it is called, and what it shows on digits."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from captum_priors import ExpectedGradients, differentiable
from captum_priors.attacks import DistanceAttack, RandomAttack, TopKAttack
from captum_priors.distances import mse
from captum_priors.metrics import (
    Score,
    StabilityReport,
    pearson,
    spearman,
    stability_report,
    top_k_intersection,
)
from tests.asserts import leaves_no_trace
from tests.cases import TwoInputs

quiet = functools.partial(stability_report, k=3, show_progress=False, show_table=False)


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))


def _batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 6), torch.randint(3, (n,))) for n in sizes]


def _noise(explainer: Any) -> RandomAttack:
    return RandomAttack(explainer, radius=0.3, seed=1)


def _attack(explainer: Any) -> DistanceAttack:
    return DistanceAttack(explainer, mse, radius=0.3, step_num=4, seed=1)


def test_equals_a_computation_by_hand() -> None:
    model = _net().train()
    batches = _batches(4, 3)
    report = quiet(model, Saliency, {"noise": _noise, "attack": _attack}, batches)
    twin = model.eval()
    explainer = differentiable(Saliency(twin))
    by_hand: dict[str, list[Tensor]] = {}
    for make in (_noise, _attack):
        for x, y in batches:
            target = twin(x).argmax(1)
            moved = make(explainer).perturb(x, target=target)
            maps = [explainer.attribute(z, target=target).detach() for z in (x, moved)]
            for name, value in {
                "top-3": top_k_intersection(*maps, 3),
                "pearson": pearson(*maps),
                "spearman": spearman(*maps),
                "accuracy": (target == y).double(),
                "prediction kept": (twin(moved).argmax(1) == target).double(),
            }.items():
                by_hand.setdefault(f"{make.__name__} {name}", []).append(value)
    for make in (_noise, _attack):
        row = report.row(attack=make.__name__.strip("_"))
        for name in ("top-3", "pearson", "spearman", "accuracy", "prediction kept"):
            values = torch.cat(by_hand[f"{make.__name__} {name}"])
            assert row.scores[name].n == 7
            assert row.scores[name].mean == pytest.approx(float(values.mean()))
    differences = torch.cat(by_hand["_attack pearson"]) - torch.cat(by_hand["_noise pearson"])
    found = report.row(attack="attack").scores["pearson - control"]
    assert found.mean == pytest.approx(float(differences.mean()))
    assert "pearson - control" not in report.row(attack="noise").scores


def test_every_combination_has_a_row_in_order() -> None:
    report = quiet(
        {"a": _net(), "b": _net()},
        {"grad": Saliency, "IG": (IntegratedGradients, {"n_steps": 4})},
        {"noise": _noise, "attack": _attack},
        _batches(3),
    )
    assert [(r.model, r.explainer, r.attack) for r in report.rows] == [
        (m, e, a) for m in "ab" for e in ("grad", "IG") for a in ("noise", "attack")
    ]
    with pytest.raises(KeyError, match="expected one row"):
        report.row(model="a")


def test_options_reach_the_explainer_and_its_attack() -> None:
    background, seen = torch.zeros(4, 6), []

    def attack(explainer: Any) -> Any:
        seen.append(explainer)
        return _attack(explainer)

    report = quiet(
        _net(), (ExpectedGradients, {"baselines": background, "n_samples": 2}), attack, _batches(3)
    )
    assert report.rows[0].explainer == "ExpectedGradients"
    assert seen[0].attribute(torch.ones(2, 6), target=0).shape == (2, 6)


def test_single_objects_do_with_a_single_model() -> None:
    model = _net()
    explainer = Saliency(model)
    report = quiet(model, explainer, _attack(explainer), _batches(3))
    assert (report.rows[0].explainer, report.rows[0].attack) == ("Saliency", "DistanceAttack")
    with pytest.raises(TypeError, match="`explainers`: expected functions of the model"):
        quiet({"a": model, "b": _net()}, explainer, _attack, _batches(3))
    with pytest.raises(TypeError, match="`attacks`: expected functions of the explainer"):
        quiet(model, {"a": Saliency, "b": Saliency}, _attack(explainer), _batches(3))


def test_draws_of_the_explainer_are_common_to_both_maps() -> None:
    class Still:
        def perturb(self, inputs: Tensor, target: Any = None) -> Tensor:
            return inputs.clone()

    options = {"baselines": torch.randn(9, 6), "n_samples": 1}
    report = quiet(_net(), (ExpectedGradients, options), lambda e: Still(), _batches(5))
    assert report.row().scores["pearson"].mean == pytest.approx(1)


def test_limits_labels_and_several_inputs() -> None:
    report = quiet(_net(), Saliency, _noise, _batches(4, 4, 4), max_examples=6, target="label")
    assert report.row().scores["top-3"].n == 6
    assert report.row().scores["accuracy"].n == 6
    report = quiet(_net(), Saliency, _noise, [torch.randn(4, 6)])
    assert "accuracy" not in report.row().scores
    inputs = (torch.randn(4, 2, 2), torch.randn(4, 3))
    report = quiet(
        TwoInputs(),
        InputXGradient,
        _noise,
        [(inputs, torch.tensor([0, 1, 0, 1]))],
        additional_forward_args=(torch.ones(1), 2.0),
        metrics={"mine": lambda a, b: mse(a, b)},
    )
    assert {"mine", "top-3"} <= set(report.row().scores)


def test_leaves_no_trace() -> None:
    model, batches = _net().train(), _batches(4)
    model(batches[0][0]).sum().backward()
    with leaves_no_trace(model, tensors=batches[0]):
        quiet(model, Saliency, {"noise": _noise, "attack": _attack}, batches)


def test_seed_decides_the_draws() -> None:
    model, batches = _net(), _batches(4)

    def noise(explainer: Any) -> RandomAttack:
        return RandomAttack(explainer, radius=0.3)

    first, again, other = (
        quiet(model, Saliency, noise, batches, seed=s).to_dict() for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_prints_its_table_and_bar(capsys: pytest.CaptureFixture[str]) -> None:
    report = stability_report(_net(), Saliency, _noise, _batches(4), k=3)
    captured = capsys.readouterr()
    assert captured.out == f"{report}\n"
    assert "stability" in captured.err
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "model"
    assert "top-3" in lines[0]
    json.dumps(report.to_dict())


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 4, 4)])
def test_draws_maps_side_by_side(shape: tuple[int, ...], tmp_path: Path) -> None:
    size = int(torch.tensor(shape).prod())
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 3))
    batches = [torch.randn(1, *shape), torch.randn(3, *shape)]
    path = tmp_path / "maps.png"
    attacks = {"a": _noise, "b": _noise}
    report = quiet(model, Saliency, attacks, batches, n_shown=2, figure_path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [e.attack for e in report.examples] == ["a", "a", "b", "b"]
    figure = report.figure(show=lambda row: row.attack == "b")
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 8
    assert figure.axes[0].get_title() == "input"
    with pytest.raises(ValueError, match="examples: expected at least one"):
        StabilityReport(report.rows, 0.95).figure()


def test_score_has_student_s_and_wilson_s_intervals() -> None:
    # t(.975, 2) = 4.302653, standard error 1 / sqrt(3).
    score = Score.of([1.0, 2.0, 3.0, float("nan")], 0.95)
    assert (score.mean, score.n) == (2.0, 3)
    assert score.high - score.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    share = Score.of([1.0] * 10, 0.95)
    # Wilson: n / (n + z^2) with z = 1.959964.
    assert (share.mean, share.high) == (1.0, 1.0)
    assert share.low == pytest.approx(10 / (10 + 1.959964**2), rel=1e-6)
    assert Score.of([], 0.95).n == 0
    assert Score.of([2.0], 0.95).low != Score.of([2.0], 0.95).low


BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("empty", lambda: quiet(_net(), Saliency, _noise, []), ValueError, "`loader`: expected at"),
    ("models", lambda: quiet(3, Saliency, _noise, []), TypeError, "`models`: expected models"),
    ("none", lambda: quiet({}, Saliency, _noise, []), ValueError, "`models`: expected at least"),
    (
        "explainer",
        lambda: quiet(_net(), lambda m: m, _noise, []),
        TypeError,
        "`explainer`: expected an object",
    ),
    (
        "attack",
        lambda: quiet(_net(), Saliency, lambda e: e, []),
        TypeError,
        r"`attacks`: expected functions that return a captum\.robust\.Perturbation",
    ),
    (
        "metrics",
        lambda: quiet(_net(), Saliency, _noise, [], metrics=["cosine"]),
        ValueError,
        "`metrics`: expected one of 'kendall'",
    ),
    (
        "batch",
        lambda: quiet(_net(), Saliency, _noise, [(torch.ones(2, 6),) * 3]),
        ValueError,
        "batch of `loader`: expected inputs or",
    ),
    (
        "labels",
        lambda: quiet(_net(), Saliency, _noise, [(torch.ones(2, 6), torch.ones(3))]),
        ValueError,
        "labels of `loader`: expected class indices",
    ),
    (
        "label",
        lambda: quiet(_net(), Saliency, _noise, [torch.ones(2, 6)], target="label"),
        ValueError,
        "`target`: expected 'predicted' for a loader without labels",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD]
)
def test_bad_input_gives_one_clear_error(
    call: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow
def test_attack_moves_the_maps_of_digits_further_than_noise() -> None:
    """An undefended ReLU network; sign noise at the same radius is the control."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    x = F.interpolate(x, scale_factor=2, mode="bilinear").clamp(0, 1)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1500], order[1500:1550]
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(10):
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    bounds: dict[str, Any] = {"radius": 0.1, "lower_bound": 0.0, "upper_bound": 1.0}
    report = stability_report(
        model,
        Saliency,
        {
            "noise": lambda e: RandomAttack(e, **bounds),
            "top-k": lambda e: TopKAttack(e, 25, step_num=40, **bounds),
        },
        [(x[test], y[test])],
        k=25,
        show_progress=False,
    )
    attacked = report.row(attack="top-k").scores
    assert attacked["accuracy"].mean > 0.9
    assert attacked["prediction kept"].mean == 1
    # Measured: .69 under noise and .53 under attack.
    assert attacked["top-25 - control"].high < -0.1
    assert attacked["pearson - control"].high < 0
