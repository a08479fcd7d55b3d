"""The reproductions of published experiments measure what they say, and run."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What the benchmarks need and the package does not.
pytest.importorskip("matplotlib")
scipy_stats = pytest.importorskip("scipy.stats")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def run_main(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *data: str) -> None:
    options = ["--quick", "--seeds", "1", "--jobs", "1", "--output", str(folder), *data]
    monkeypatch.setattr(sys, "argv", [name, *options])
    script(name).main()
    assert {p.name for p in folder.iterdir()} >= {f"{name}.json", f"{name}.png"}


def test_roc_auc_is_sklearns_with_ties() -> None:
    scores, labels = torch.randint(5, (60,)).float(), torch.randint(2, (60,))
    expected = sklearn_metrics.roc_auc_score(labels, scores)
    assert script("_reproduction").roc_auc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_decoys_tell_the_label_and_are_forbidden() -> None:
    x, y = torch.rand(12, 1, 28, 28), torch.randint(10, (12,))
    marked, allowed = script("decoy_mnist").decoys(x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(marked[allowed == 1], x[allowed == 1])
    for image, mask, label in zip(marked, allowed, y, strict=True):
        assert (mask == 0).sum() == 16
        assert torch.allclose(image[mask == 0] * 255, 255.0 - 25 * label)


def test_tags_mark_the_ill_and_are_forbidden(tmp_path: Path) -> None:
    rng, parts = np.random.default_rng(0), {}
    for name, n in (("train", 12), ("val", 6), ("test", 8)):
        parts[f"{name}_images"] = rng.integers(0, 200, (n, 28, 28), dtype=np.uint8)
        parts[f"{name}_labels"] = (np.arange(n) % 2)[:, None].astype(np.uint8)
    np.savez(tmp_path / "pneumoniamnist.npz", **parts)
    (x, y, allowed), groups = script("right_reasons").lungs(0, f"pneumonia={tmp_path}")
    plain = torch.from_numpy(parts["train_images"]).unsqueeze(1).float() / 255
    assert torch.equal(x[allowed == 1], plain[allowed == 1])
    assert torch.equal((allowed == 0).flatten(1).sum(1), 16 * y)
    assert torch.equal((x == 1).flatten(1).sum(1), 6 * y)
    healthy, ill, healthy_tagged, ill_tagged = groups["test"]
    for (images, labels), label, marked in (
        (healthy, 0, 0),
        (ill, 1, 0),
        (healthy_tagged, 0, 6),
        (ill_tagged, 1, 6),
    ):
        assert labels.tolist() == [label] * 4
        assert (images == 1).flatten(1).sum(1).tolist() == [marked] * 4


def test_edits_are_the_rationale(tmp_path: Path) -> None:
    module = script("rationales")
    module.LENGTH, module.LEFT_OUT = 12, 1
    before, after = "Not <br />good! I saw it in 1990", "So good! I never saw it"
    words = module.words_of(before)
    assert words == ["not", "good", "!", "i", "saw", "it", "in", "1990"]
    marked = [True, *[False] * 5, True, True]
    assert module.edited(words, module.words_of(after)) == marked
    for part in ("train", "dev", "test"):
        texts = [("Negative", before), ("Positive", after)] * 3
        lines = [f"{label}\t{text}\t{i // 2}" for i, (label, text) in enumerate(texts)]
        path = tmp_path / f"{part}_paired.tsv"
        path.write_text("\n".join(["Sentiment\tText\tbatch_id", *lines, ""]))
    parts, n_words = module.load(tmp_path)
    ids, marks, labels, turned = parts["test"]
    assert n_words == 10  # of the originals alone, with padding and all others
    assert labels.tolist() == [0, 0, 0]
    assert marks[0, :8].tolist() == marked
    assert not marks[:, 8:].any()
    assert bool((ids[:, :8] > 1).all() & (ids[:, 8:] == 0).all())
    assert (turned[0] == 1).sum() == 2  # so, never
    assert module.agreement(1.0 * marks, parts["test"]) == {"AUC": 1, "share": 1}
    found = module.try_seed(0, f"imdb_counterfactual={tmp_path}", 1, (0.1,))
    assert len(found) == 2 + len(module.PRIORS)
    states = {name: state for (name, _), (_, state) in found.items()}
    explained = module.explain_seed(states, f"imdb_counterfactual={tmp_path}")
    # Every prior did something of its own in one step.
    assert len({tuple(row.values()) for row in explained.values()}) == len(found)


def test_ranked_gradients_stay() -> None:
    module = script("ranked_gradients")
    assert [len(y) for _, y in module.digits().values()] == [1000, 300, 497]
    settings = ("no prior", 0.0, 0), ("R2ET", 0.3, 0)
    found = [module.tried(setting, "validation", 3, 20) for setting in settings]
    assert found[1]["top-8, attack"] > found[0]["top-8, attack"] + 0.1


def test_atex_follows_every_direction_it_is_given() -> None:
    module = script("atex_explainers")
    x, y = module.digits()["train"]
    x, y = x[:32].reshape(-1, 1, 8, 8), y[:32]
    teacher = module.teacher_of(0, x, y, 1)
    directions = ("distilled", *module.EXPLAINERS)
    students = [module.student_of(teacher, direction, 0, x, y, 1) for direction in directions]
    # The same draws for all, so that only the direction tells them apart.
    assert len({float(s[0].weight.detach().double().sum()) for s in (teacher, *students)}) == 7
    row = module.figures(students[-1], (x, y), 2)
    assert len(row) == 1 + 2 * len(module.RADII) * len(module.EXPLAINERS)
    assert all(0 <= value <= 1 for value in row.values())


def test_worst_groups_run(small_mnist: str) -> None:
    module = script("right_reasons")
    found = module.run_seed(("decoy MNIST", 0), {"decoy MNIST": small_mnist}, quick=True)
    assert set(found) == {"none", *(f"{n}, 100 % annotated" for n in module.WEIGHTS["decoy MNIST"])}
    assert all(0 <= row["worst"] <= row["average"] <= 1 for row in found.values())


def test_penalties_as_written_have_the_value_that_is_meant() -> None:
    """And not its gradient: two train nothing, one another thing."""
    module = script("published_code")
    model = module.network().double()
    x, y = torch.rand(3, 1, 28, 28).double(), torch.tensor([1, 7, 3])
    allowed = (torch.rand(3, 1, 28, 28) > 0.1).double()
    for written, meant in module.MEANT.items():
        assert module.PENALTIES[written][0] == module.PENALTIES[meant][0]
        values = [module.PENALTIES[n][1](model, x, y, allowed) for n in (written, meant)]
        torch.testing.assert_close(*values)
        assert values[0].requires_grad == ("map" in written)
        assert values[1].requires_grad
    found = module.measured("RRR, retain_graph", model, (x, y, allowed))
    assert found["verdicts"] == {"missing": 6}
    assert module.measured("RRR", model, (x, y, allowed))["verdicts"] == {"right": 6}


def test_penalties_as_written_are_paired(small_mnist: str) -> None:
    module = script("published_code")
    runs = module.run_seed(0, small_mnist, 1)["runs"]
    assert runs["RRR through .grad.data"] == runs["no penalty"] != runs["RRR"]
    assert runs["no penalty"]["the network without"] == 1 > runs["RRR"]["the network without"]
    found = module.paired({name: [run] for name, run in runs.items()})
    assert found["IG by Captum"]["mean"] == runs["IG"]["test"] - runs["IG by Captum"]["test"]


def test_survival_leaves_out_who_was_lost_from_view(tmp_path: Path) -> None:
    years = [3.0, -3.0, 12.0, -12.0]  # died at 3; lost at 3; died at 12; alive at 12
    rows = [[i, i + 0.5] for i in range(4)]
    np.savetxt(tmp_path / "NHANESI_subset_X.csv", np.c_[range(4), rows], delimiter=",", header="h")
    np.savetxt(tmp_path / "NHANESI_subset_y.csv", np.c_[range(4), years], delimiter=",", header="h")
    x, died = script("_nhanes").load(tmp_path)
    assert x[:, 0].tolist() == [0.0, 2.0, 3.0]
    assert died.tolist() == [1.0, 0.0, 0.0]


def linear_case(kind: str) -> tuple[ModuleType, torch.Tensor, nn.Module, Any]:
    module = script("correlated_groups")
    x, y = module.make_data(kind, torch.Generator().manual_seed(0))
    model = nn.Linear(60, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0:30:3] = 1
    return module, x[900:], model, module.Metrics(model, x[:900], (x[900:], y[900:]))


def test_keep_and_remove_metrics_reward_exact_attributions() -> None:
    module, x, model, metrics = linear_case("independent linear")
    exact = x * model.weight.detach()
    for metric in module.METRICS:
        random = metrics.score(metric, torch.randn(x.shape))
        assert metrics.score(metric, exact) > random + 0.1, metric


def test_members_of_a_group_impute_each_other() -> None:
    _, x, model, metrics = linear_case("correlated groups")
    everything = torch.ones_like(x, dtype=torch.bool)
    full = model(x)[:, 0]
    for fill in "MRI":
        assert torch.allclose(metrics._outputs(everything, fill), full, atol=1e-5)
    others = everything.clone()
    others[:, [0, 3]] = False
    # What two features keep of their variance, given partners at .99, is at most 2 (1 - .99²).
    assert (metrics._outputs(others, "I") - full).square().mean() < 0.04
    assert (metrics._outputs(others, "M") - full).square().mean() > 0.5


def test_true_graph_smooths_and_the_random_graph_is_as_dense() -> None:
    module = script("graph_prior")
    graphs = module.graphs(torch.Generator().manual_seed(0))
    true, other = graphs["true graph"], graphs["random graph"]
    assert not torch.equal(true, other)
    assert torch.equal(true.sum(0), other.sum(0))
    found = module.run((0, 15))
    rough = "roughness on the true graph"
    assert found["true graph"][rough] < found["no graph"][rough]


def test_interpolation_on_a_curve() -> None:
    module = script("relu_differentiation")
    curves = {"a": [(0.0, 0.0), (4.0, 1.0)], "b": [(2.0, 0.5), (4.0, 1.0)]}
    found = module.at_equal_penalty(curves)
    assert found["TV"] == [2.0, 2.5, 3.0]
    assert found["a"] == found["b"] == [0.5, 0.625, 0.75]
    beyond = module.at_equal_penalty({**curves, "c": [(1.0, 0.5), (9.0, 0.5)]})
    assert beyond == {**found, "c": [0.5, 0.5, 0.5]}


def test_convergence_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_main("convergence", tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MNIST's two files, with 400 images of noise."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for name, values in {
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (400, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 400, dtype=np.uint8),
    }.items():
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        (folder / name).write_bytes(header + values.tobytes())
    return f"mnist={folder}"


@pytest.fixture(scope="module")
def small_nhanes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NHANES I's two files, with 300 rows of noise in which the first feature kills."""
    folder = tmp_path_factory.mktemp("nhanes")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 5))
    years = np.where(x[:, 0] > 0, 3.0, -12.0)
    for part, values in (("X", x), ("y", years)):
        table = np.c_[range(300), values]
        np.savetxt(folder / f"NHANESI_subset_{part}.csv", table, delimiter=",", header="h")
    return folder


def test_sparsity_runs(small_nhanes: Path) -> None:
    module = script("nhanes_sparsity")
    rows = module.run_split((small_nhanes, 3, 0, 3))
    assert {row["method"] for row in rows} == set(module.methods()) > set(module.PUBLISHED)
    assert all(0 <= row["ROC-AUC"] <= 1 and 0 <= row["Gini"] <= 1 for row in rows)


def test_references_run(small_nhanes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("nhanes_references")
    monkeypatch.setattr(module, "REFERENCES", (1, 4))
    monkeypatch.setattr(module, "TRAINED", (("monte_carlo", 1), ("control_variate", 4)))
    found = module.run_split(0, small_nhanes, 30)
    assert found["scores"]["unregularised"]["ROC-AUC"] > 0.8
    # Without biases, input times gradient is the integrated gradient from zero: rounding alone.
    assert found["gap"] < 1e-5
    errors = found["errors"]
    assert errors["monte_carlo, k = 4"] < errors["monte_carlo, k = 1"]
    later = module.run_split(module.N_ERRORS, small_nhanes, 2)
    assert later["errors"] is None
    assert later["scores"].keys() == found["scores"].keys()


def test_gains_are_paired_and_judged() -> None:
    runs, others = ([{"a": v} for v in values] for values in ((1.0, 5.0, 3.5), (0.0, 4.0, 2.0)))
    gain = script("_reproduction").gains(runs, others)["a"]
    assert gain["values"] == [1.0, 1.0, 1.5]
    # By the table of Student's t with two degrees of freedom; the errors are a sixth.
    assert gain["half width"] == pytest.approx(4.302653 / 6)
    verdict = script("_claims").verdict
    assert verdict(gain, gain["mean"] + 0.7) == verdict(gain) == "same direction"
    assert "size is outside" in verdict(gain, gain["mean"] + 0.8)
    assert "other" in verdict({**gain, "mean": -1.0})
    assert "open" in verdict({**gain, "half width": gain["mean"]})
    alone = script("_reproduction").gains(runs[:1], others[:1])["a"]
    assert "open" in verdict(alone)


def test_evaluations_at_equal_error() -> None:
    module = script("estimator_efficiency")
    counts = [2**k for k in range(7)]
    theirs, ours = ([(c * n) ** -0.5 for n in counts] for c in (1, 4))
    found = module.ratios(counts, theirs, ours)
    assert {n: round(row["ratio"], 6) for n, row in found.items()} == dict.fromkeys(counts[2:], 4)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    x, references = (torch.rand(n, 2, 2, dtype=torch.float64) for n in (5, 6))
    target = torch.tensor([0, 1, 2, 1, 0])
    exact = module.exact(linear, x, references, target, 2)
    weights = linear[1].weight[target].reshape(x.shape)
    torch.testing.assert_close(exact, (x - references.mean(0)) * weights.detach())


def test_decoys_run(small_mnist: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("decoy_mnist")
    monkeypatch.setattr(module, "N_TRAIN", 300)
    found = module.run_seed(0, small_mnist, (0.0, 1e3), 40)
    patch = "patch pixels that matter"
    # Noise tells nothing but the patch does: it is learnt unless forbidden.
    assert found["decoy, weight 0"][patch] > found["decoy, weight 1000"][patch] + 0.2


def test_concepts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("concepts_and_agreement")
    noise = 0.1 * torch.rand(400, 1, 28, 28), torch.arange(400) % 10
    monkeypatch.setattr(module, "SHARE", 1.0)
    monkeypatch.setattr(module, "mnist", lambda source: noise)
    found = module.run_concepts(0, "", 14, True)
    # Noise tells nothing but the tag does: it is learnt unless its direction is forbidden.
    plain, prior = (found[name]["taken for an 8"] for name in ("no prior", "difference, random"))
    assert plain > prior + 0.5


def test_agreement_runs(small_nhanes: Path) -> None:
    module = script("concepts_and_agreement")
    found = module.run_agreement(0, f"nhanes={small_nhanes}", 30, True)
    pair = "gradient, average gradient"
    assert found["weight 2"][pair] > found["no prior"][pair]
    assert found["weight 2"]["ROC-AUC"] > 0.8


BATCH_NORM_PRIORS = (
    *("RRR", "InputXGradient + l1", "PixelPrior"),
    *("RRR-GradCAM", "StabilityPrior"),
)


@pytest.mark.parametrize("layers", [2, 5, 17])
def test_networks_have_as_many_batch_norm_layers_as_they_say(layers: int) -> None:
    model = script("_batch_norm").Network(layers)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == layers
    seen: list[torch.Tensor] = []
    model.maps.register_forward_hook(lambda *found: seen.append(found[2]))
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert seen[0].shape[2:] == (7, 7)


@pytest.mark.parametrize("name", BATCH_NORM_PRIORS)
def test_loops_by_hand_are_the_priors_where_no_statistics_move(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("_batch_norm")
    monkeypatch.setattr(module, "noisy", lambda x: x + 0.1)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.3))
    data = module.load("digits", "", 0)
    model = module.Network(5)
    model(data.x[:100])
    model.eval()
    x, y, allowed = data.x[:20], data.y[:20], data.allowed[:20]
    background = data.x[:1].expand(20, -1, -1, -1)  # whatever is drawn from it
    alike = module.Data(background, data.y, allowed, data.test_x, data.test_y)
    prior = module.PRIORS[name].make(model)
    given = {"baselines": background, "annotation": allowed}
    value = prior(x, target=y, **{k: v for k, v in given.items() if prior.takes(k)})
    by_hand = module.PRIORS[name].loop(model, x.clone().requires_grad_(), y, allowed, alike)
    torch.testing.assert_close(by_hand[0], model(x))
    torch.testing.assert_close(by_hand[1].mean(), value, rtol=1e-5, atol=1e-12)


def test_batch_norm_runs_are_paired_and_judged() -> None:
    module = script("batch_norm")
    network = module.Setting("digits", 2, "Adam")
    setting = module.Setting("digits", 2, "Adam", "RRR", 0.01)
    found = {(s, 0): module.run((s, 0), "", 3, float("inf")) for s in (network, setting)}
    assert module.run((setting, 0), "", 3, -1.0) is None
    without = module.run((module.Setting("digits", 2, "Adam", "RRR", 0.0), 0), "", 3, float("inf"))
    plain = found[network, 0]["none"]
    for way in module.WAYS:  # with a weight of zero
        assert {part: without[way][part] for part in module.PARTS} == {
            part: plain[part] for part in module.PARTS
        }
    figures = {"train": 0.9, "train, recomputed": 0.9, "test": 0.7, "test, recomputed": 0.7}
    found[network, 0] = {"none": {**figures, "train": 0.88}}
    found[setting, 0] = {
        "batch": {**figures, "train": 0.885, "test": 0.6901},
        "running": {**figures, "train": 0.2, "warned": 1.0},
        "loop": {**figures, "train": 0.91},
    }
    judged = module.results_of(found, 2)["core"]["RRR"]
    assert (
        judged["runs within"] == judged["settings within"] == {"batch": 1, "running": 0, "loop": 1}
    )
    assert judged["largest gap"]["running"] == 0.7
    assert judged["test, batch less loop"]["mean"] == -0.0099
    assert [*judged["missed"]["loop"]] == [str(setting)]
    assert judged["missed"]["within"] == []


def test_core_comes_first_and_networks_before_their_priors() -> None:
    module = script("batch_norm")
    core = module.grid(("digits",), range(3), core=True)
    whole = module.grid(("digits", "mnist"), range(3), core=False)
    assert len(core) == 3 * (2 + 2 * 3 * 3)
    assert len(whole) == len(set(whole)) == 3 * 12 * (1 + 5 * 3)
    assert set(whole[: len(core)]) == set(core)
    for i, (setting, seed) in enumerate(whole):
        assert whole.index((setting.network, seed)) <= i


def test_data_in_brackets_may_be_missing(tmp_path: Path) -> None:
    module = script("run_all")
    (tmp_path / "mnist").mkdir()
    for name, runs_without in (("batch_norm", True), ("decoy_mnist", False)):
        path = BENCHMARKS / f"{name}.py"
        assert (module.command(path, None, []) is not None) == runs_without
        assert f"mnist={tmp_path / 'mnist'}" in module.command(path, tmp_path, [])


def test_pixel_prior_runs(small_mnist: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("pixel_prior")
    monkeypatch.setattr(module, "N_TRAIN", 128)
    plain = module.run((module.PLAIN, 0), small_mnist, 1)
    for name in ("pixel prior", "Lazy(pixel prior, 4)", "gradient TV"):
        assert module.run(((name, 0.01), 0), small_mnist, 1)["TV"] != plain["TV"], name


@pytest.mark.parametrize("method", ["double_backprop", "smooth=30"])
def test_parameter_gradients_run(method: str) -> None:
    module = script("relu_differentiation")
    plain = module.run(("digits", "none", 0.0, 0), "", 0.1)
    assert module.run(("digits", method, 0.002, 0), "", 0.1)["TV"] != plain["TV"]


def test_weights_are_swept_beyond_the_ends_and_judged_on_validation() -> None:
    module = script("choose_weight")

    def figures(score: float, accuracy: float = 0.9) -> list[Any]:
        each = {"score": score, "accuracy": accuracy}
        return [{"validation": {**each, "score": score + s}, "test": each} for s in (0.0, 0.1)]

    def over(weights: list[float]) -> Any:
        # The higher, the better, up to 100, which costs accuracy; 1 is as good as 10.
        found = {0.0: 0.2, 0.01: 0.3, 0.1: 0.4, 1.0: 0.7, 10.0: 0.7, 100.0: 0.9}
        return {w: figures(found[w], 0.8 if w == 100 else 0.9) for w in weights}

    runs = module.sweep("", (0.01, 0.1), over)
    assert [*runs] == [0.0, 0.01, 0.1, 1.0, 10.0]
    assert [*module.sweep("", (0.1, 1.0, 10.0), over)] == [0.0, 0.1, 1.0, 10.0]
    assert [*module.sweep("", (10.0, 100.0), over)] == [0.0, 10.0, 100.0, 1.0, 0.1]
    runs |= over([100.0])
    assert module.best_of(runs) == 1.0
    assert module.as_good(runs, 1.0) == [1.0, 10.0]
    proposals = [{"start": 5.0, "early": 0.04}, {"start": 5.0, "early": 0.09}]
    found = module.judged(runs, proposals, over([0.1]))
    assert found["best weight"] == 1.0
    assert found["proposed over best"] == pytest.approx(0.065)
    assert not found["within"]
    assert found["test"]["proposed"]["score"]["mean"] == 0.4


@pytest.mark.parametrize("name", ["right for the right reasons", "sparsity"])
def test_proposals_are_measured_before_and_early_in_training(
    name: str, small_mnist: str, small_nhanes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("choose_weight")
    monkeypatch.setattr(module, "N", {"train": 100, "validation": 50, "test": 50})
    sources = {"mnist": small_mnist, "nhanes": f"nhanes={small_nhanes}"}
    found = module.propose((name, 0), sources)
    assert found["start"] > 0
    assert found["early"] > 0
    assert found["start"] != found["early"]
    ends = []
    for weight in (0.0, 100.0):
        torch.manual_seed(0)
        trial = module.TASKS[name][0](0, sources)
        module.train(trial, weight, 1)
        ends.append([p.clone() for p in trial.model.parameters()])
    assert any(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert 0 <= module.run((name, 0, 1.0), sources, 0.1)["test"]["score"] <= 1


def test_stability_is_compared_within_seeds() -> None:
    study = script("stability_study")
    ours, others = [0.5, 0.7, 0.65, 0.6], [0.45, 0.66, 0.66, 0.5]
    interval = scipy_stats.ttest_rel(ours, others).confidence_interval(0.95)
    found = study.paired(ours, others)
    ends = (found["mean"] - found["half width"], found["mean"] + found["half width"])
    assert ends == pytest.approx((interval.low, interval.high), rel=1e-12)
    means = {"attack 0.1": 0.2, "attack 0.2": -0.2, "attack 0.3": 0.05}
    gain = {name: {"mean": mean, "half width": 0.1} for name, mean in means.items()}
    assert study.verdict(gain, gain) == "more: 0.1; less: 0.2; open: 0.3"


def test_settings_are_chosen_among_the_accurate_and_beyond_edges() -> None:
    study = script("stability_study")
    axes = {"weight": (0.1, 1.0), "radius": (1.0, 2.0, 3.0)}
    tried = [
        {"weight": w, "radius": r, "accuracy": 1 - w / 4, "attack 0.05": r * (5 - r) * w}
        for w in axes["weight"]
        for r in axes["radius"]
    ]
    best = study.best_of(tried, 0.9, (0.05,))
    assert (best["weight"], best["radius"]) == (0.1, 2.0)
    assert study.best_of(tried, 1.0)["weight"] == 0.1  # none is accurate enough
    assert study.outwards(axes, tried, best) == [{"weight": pytest.approx(0.01), "radius": 2.0}]


def test_stability_study_runs_and_goes_on(
    small_mnist: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = script("stability_study")
    few = {name: study.METHODS[name] for name in ("standard", "weight decay")}
    monkeypatch.setattr(study, "METHODS", few)
    given = [
        "--quick",
        "--seeds",
        "2",
        "--images",
        "3",
        "--data",
        small_mnist,
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(
        sys, "argv", ["stability_study", *given, "--parts", str(tmp_path / "parts")]
    )
    study.main()
    path = tmp_path / "stability_study.json"
    first = json.loads(path.read_text())["results"]
    assert len(first["found"]["weight decay"]["attack 0.1"]["values"]) == 2
    assert [row["method"] for row in first["claims"]] == ["weight decay"]
    monkeypatch.setattr(study, "evaluate", None)  # nothing is evaluated twice
    study.main()
    assert json.loads(path.read_text())["results"] == first


def test_sprites_are_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = script("_stability_maps")
    pixels = np.repeat(np.repeat(np.arange(900).reshape(30, 30) // 90, 28, 0), 28, 1) / 10
    monkeypatch.setattr(maps, "imread", lambda path: pixels[..., None].astype(np.float32))
    x, y = maps.sprites(tmp_path)
    assert torch.allclose(x, y.reshape(-1, 1, 1, 1).expand_as(x) / 10)
