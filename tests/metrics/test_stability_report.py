"""The stability report: what it computes, how it is called, and what it shows on digits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_priors import ExpectedGradients, differentiable
from captum_priors.attacks import DistanceAttack, RandomAttack
from captum_priors.distances import mse
from captum_priors.metrics import (
    ReportScore,
    StabilityReport,
    pearson,
    spearman,
    stability_report,
    top_k_intersection,
)
from tests.asserts import leaves_no_trace
from tests.cases import TwoInputs

Batch = tuple[Any, Any]


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))


def _batches(*sizes: int) -> list[Batch]:
    return [(torch.randn(n, 6), torch.randint(3, (n,))) for n in sizes]


def _noise(explainer: Any, seed: int | None = 1) -> RandomAttack:
    return RandomAttack(explainer, radius=0.3, seed=seed)


def _attack(explainer: Any) -> DistanceAttack:
    return DistanceAttack(explainer, mse, radius=0.3, step_num=4, seed=1)


def report(
    explainer: Any, batches: Any, *attacks: Callable[[Any], Any], **options: Any
) -> StabilityReport:
    """One explainer, named plain, under attacks made of it, named by their makers."""
    of = explainer[0] if isinstance(explainer, tuple) else explainer
    made = {make.__name__.strip("_"): make(of) for make in attacks or (_noise,)}
    return stability_report({"plain": explainer}, {"plain": made}, batches, **{"k": 3, **options})


def test_equals_a_computation_by_hand() -> None:
    model = _net().train()
    batches = _batches(4, 3)
    found = report(Saliency(model), batches, _noise, _attack, control="noise")
    twin = model.eval()
    explainer = differentiable(Saliency(twin))
    by_hand: dict[str, dict[str, list[Tensor]]] = {"noise": {}, "attack": {}}
    for make in (_noise, _attack):
        columns = by_hand[make.__name__.strip("_")]
        for x, y in batches:
            target = twin(x).argmax(1)
            moved = make(explainer).perturb(x, target=target)
            maps = [explainer.attribute(z, target=target).detach() for z in (x, moved)]
            for name, value in {
                "top-3": top_k_intersection(*maps, 3),
                "pearson": pearson(*maps),
                "spearman": spearman(*maps),
                "accuracy": (target == y).double(),
                "accuracy, attacked": (twin(moved).argmax(1) == y).double(),
                "prediction kept": (twin(moved).argmax(1) == target).double(),
            }.items():
                columns.setdefault(name, []).append(value)
    for attack, columns in by_hand.items():
        scores = found.row(attack=attack).scores
        for name, values in columns.items():
            assert scores[name].n == 7
            assert scores[name].mean == pytest.approx(float(torch.cat(values).mean()))
    for name in ("top-3", "pearson", "spearman"):
        differences = torch.cat(by_hand["attack"][name]) - torch.cat(by_hand["noise"][name])
        mean = found.row(attack="attack").scores[f"{name} - control"].mean
        assert mean == pytest.approx(float(differences.mean()))
    assert "pearson - control" not in found.row(attack="noise").scores


def test_every_attack_on_every_explainer_has_a_row_in_order() -> None:
    models = {"a": _net(), "b": _net()}
    explainers = {f"{n} grad": Saliency(m) for n, m in models.items()}
    explainers["b IG"] = (IntegratedGradients(models["b"]), {"n_steps": 4})
    attacks = {
        name: {"noise": _noise(e[0] if isinstance(e, tuple) else e)}
        for name, e in explainers.items()
    }
    attacks["a grad"]["attack"] = _attack(explainers["a grad"])
    found = stability_report(explainers, attacks, _batches(3), k=3)
    assert [(r.explainer, r.attack) for r in found.rows] == [
        ("a grad", "noise"),
        ("a grad", "attack"),
        ("b grad", "noise"),
        ("b IG", "noise"),
    ]
    assert found.row("b IG") is found.rows[3]
    with pytest.raises(KeyError, match="expected one row for explainer='a grad', attack=''"):
        found.row("a grad")


def test_draws_and_options_of_the_explainer_are_common_to_both_maps() -> None:
    class Still:
        def perturb(self, inputs: Tensor, target: Any = None) -> Tensor:
            return inputs.clone()

    options = {"baselines": torch.randn(9, 6), "n_samples": 1}
    still = {"plain": {"still": Still()}}
    explainer = {"plain": (ExpectedGradients(_net()), options)}
    found = stability_report(explainer, still, _batches(5), k=3)
    assert found.row().scores["pearson"].mean == pytest.approx(1)


def test_labels_axes_and_several_inputs() -> None:
    net = _net()
    found = report(Saliency(net), _batches(4, 2)).row().scores
    assert (found["top-3"].n, found["accuracy"].n) == (6, 6)
    assert "accuracy" not in report(Saliency(net), [torch.randn(4, 6)]).row().scores

    class ThreeInputs(TwoInputs):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return super().forward(a, b, torch.ones(1), 2.0)

    batches = [((torch.randn(4, 2, 2), torch.randn(4, 3)), torch.tensor([0, 1, 0, 1]))]
    metrics = {"mine": lambda a, b: mse(a[1], b[1]), "share": lambda a, b: mse(a, b) > 0}
    with pytest.raises(ValueError, match="`dim`: expected which of the 2 axes"):
        report(InputXGradient(ThreeInputs()), batches, k=2)
    found = report(InputXGradient(ThreeInputs()), batches, metrics=metrics, dim=1, k=2)
    scores = found.row().scores
    assert {"mine", "share", "top-2"} <= set(scores)
    assert not {"spearman", "pearson"} & set(scores)


def test_an_attack_may_change_the_prediction() -> None:
    class Turned:
        def perturb(self, inputs: Tensor, target: Any = None) -> Tensor:
            return -inputs

    x, model = torch.randn(5, 3), nn.Linear(3, 2, bias=False)
    y = model(x).argmax(1)
    y[0] = 1 - y[0]
    turned = {"plain": {"turned": Turned()}}
    found = stability_report({"plain": Saliency(model)}, turned, [(x, y)], k=1).row().scores
    columns = ("accuracy", "accuracy, attacked", "prediction kept")
    assert [found[name].mean for name in columns] == pytest.approx([0.8, 0.2, 0])


def test_leaves_no_trace() -> None:
    model, batches = _net().train(), _batches(4)
    model(batches[0][0]).sum().backward()
    with leaves_no_trace(model, tensors=batches[0]):
        report(Saliency(model), batches, _noise, _attack)


def test_seed_decides_the_draws() -> None:
    model, batches = _net(), _batches(4)

    def noise(explainer: Any) -> RandomAttack:
        return _noise(explainer, None)

    first, again, other = (report(Saliency(model), batches, noise, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_is_text_and_a_frame_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(Saliency(_net()), _batches(4), _noise, _attack)
    assert capsys.readouterr() == ("", "")
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["explainer", "attack", "n"]
    assert "top-3" in lines[0]
    assert len(lines) == 4
    frame = found.to_frame()
    assert list(frame.columns) == ["explainer", "attack", "score", "mean", "low", "high", "n"]
    one = frame[(frame.attack == "attack") & (frame.score == "pearson")].iloc[0]
    score = found.row(attack="attack").scores["pearson"]
    assert (one["mean"], one.low, one.high, one.n) == (score.mean, score.low, score.high, 4)


def test_scores_of_nothing_of_one_and_of_what_is_known() -> None:
    assert ReportScore.of(torch.tensor([math.nan]), 0.95).n == 0
    alone = ReportScore.of(torch.tensor([2.0]), 0.95)
    assert (alone.mean, alone.n) == (2.0, 1)
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    score = ReportScore.of(torch.tensor([1.0, 2.0, 3.0, math.nan]), 0.95)
    assert (score.mean, score.n) == (2.0, 3)


ONE = torch.ones(2, 6, dtype=torch.float64)
BAD: dict[str, Callable[[], Any]] = {
    r"`loader`: expected .* class indices .*, found labels of shape \(3,\)": lambda: report(
        Saliency(_net()), [(ONE, torch.ones(3))]
    ),
    r"`explainers` and `attacks`: expected two dictionaries .*, found .*Saliency.* and {'a'}": (
        lambda: stability_report(Saliency(_net()), {"a": {}}, [])
    ),
    r"`explainers` and `attacks`: .*, found {'a'} and {'b'}": lambda: stability_report(
        {"a": Saliency(_net())}, {"b": {}}, []
    ),
    r"`explainer`: expected an object with Captum's .*, found Sequential": lambda: report(
        _net(), []
    ),
    r"`confidence`: expected": lambda: report(Saliency(_net()), [], confidence=95),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_gives_one_clear_error(text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        BAD[text]()
