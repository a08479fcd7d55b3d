"""Benchmarks of time compare in turns, with a reference beside itself, and say what they ran."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
SCRIPTS = [path for path in BENCHMARKS.glob("[a-z]*.py") if path.stem != "run_all"]


script = importlib.import_module

THEIRS = '''
"""The interface of the authors' module, which knows what it was given."""
import torch
from torch.utils.data import DataLoader

DEFAULT_DEVICE = torch.device("meta")

class AttributionPriorExplainer:
    def __init__(self, background_dataset, batch_size, random_alpha=True, k=1):
        assert random_alpha
        self.k, self.loader = k, DataLoader(background_dataset, batch_size * k, shuffle=True)

    def shap_values(self, model, input_tensor, sparse_labels=None):
        references = next(iter(self.loader))[0].to(DEFAULT_DEVICE)
        rows = len(input_tensor)
        alpha = torch.rand(rows, self.k).unsqueeze(2)
        moves = input_tensor.unsqueeze(1) - references.reshape(rows, self.k, -1)
        points = (input_tensor.unsqueeze(1) - (1 - alpha) * moves).requires_grad_()
        outputs = model(points)[torch.arange(rows), :, sparse_labels]
        return (moves * torch.autograd.grad(outputs.sum(), points, create_graph=True)[0]).mean(1)
'''


def test_a_reference_takes_part_twice() -> None:
    common = script("_common")
    now, calls = 0.0, []

    def run(name: str, seconds: float) -> Any:
        def go() -> None:
            nonlocal now
            calls.append(name)
            now += seconds * (1 + len(calls) // 4)  # the machine gets slower, round by round

        return go

    runs = {"plain": run("plain", 1.0), "prior": run("prior", 3.0)}
    seconds, again = common.in_turns(runs, 4, lambda: now, "plain")
    assert (calls.count("plain"), calls.count("prior")) == (8, 4)
    assert len({tuple(calls[i : i + 3]) for i in range(0, 12, 3)}) > 1
    assert seconds.keys() == runs.keys()
    assert again["plain"]["rounds"] == 4
    low, high = again["plain"]["quartiles"]
    assert low <= again["plain"]["median"] <= high
    shown = script("_speed").again({"MLP": {"A/A": again}}, "plain")
    assert f"A/A {again['plain']['median']:.2f} (quartiles {low:.2f} to {high:.2f})" in shown
    assert script("_speed").again({"MLP": {"A/A": again}}, "prior") == ""
    alone, again = common.in_turns({"a": lambda: None}, 1, iter(range(9)).__next__, "a")
    assert (alone, again["a"]["median"]) == ({"a": [1]}, 1.0)


def test_published_loop_is_run_from_its_authors_code(tmp_path: Path) -> None:
    published = script("_published")
    assert published.loop_from(None) is published.PublishedLoop
    with pytest.raises(SystemExit, match="--authors-code: expected DIR/attributionpriors"):
        published.loop_from(tmp_path)
    (tmp_path / "attributionpriors").mkdir()
    (tmp_path / "attributionpriors" / "pytorch_ops.py").write_text(THEIRS)
    network = script("_networks").mlp(4, 6)
    model, found = network.make(), []
    for folder in (None, tmp_path):
        loop = published.loop_from(folder)(network.background, 4, 3)
        torch.manual_seed(0)
        found.append(loop.attribute(model, network.x, network.y))
    torch.testing.assert_close(*found)  # the same random numbers in the same order
    assert all(each.requires_grad for each in found)


def test_results_say_where_they_come_from(tmp_path: Path) -> None:
    given = {"authors_code": tmp_path, "output": tmp_path, "data": f"mnist={tmp_path}"}
    script("_common").save(tmp_path, "found", given, {"a": 1.0})
    text = (tmp_path / "found.json").read_text()
    document = json.loads(text)
    assert str(tmp_path) not in text
    assert document["settings"] == {"authors_code": "DIR", "data": "mnist=DIR", "seeds": 1}
    assert {"python", "torch", "captum", "commit", "processor"} <= document["versions"].keys()


def test_sizes_name_scripts_and_options_that_there_are(tmp_path: Path) -> None:
    module = script("run_all")
    shared = "".join((BENCHMARKS / f"{n}.py").read_text() for n in ("_common", "_reproduction"))
    for name, options in (*module.REDUCED.items(), *module.FULL.items()):
        text = (BENCHMARKS / f"{name}.py").read_text() + shared
        assert all(f'"{o}"' in text for o in options if o.startswith("--")), name
    given = {path.stem: module.command(path, tmp_path, [], tmp_path) or () for path in SCRIPTS}
    takes = {name for name, words in given.items() if "--authors-code" in words}
    assert takes == {"training_step", "gpu_training_step", "cost_scaling"}
    data = {
        n for path in SCRIPTS for o in (False, True) for n in module.data_sets(path, optional=o)
    }
    assert data == {"mnist", "nhanes", "pneumonia", "imdb_counterfactual", "atex_fashion"}
    assert all(re.search(rf"\b{name}\b", module.__doc__) for name in data)


def test_every_script_has_rows_in_the_summary() -> None:
    assert {path.stem for path in SCRIPTS} <= script("_summary").ROWS.keys()
    assert script("_claims").CLAIMS.keys() <= script("_summary").ROWS.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what curvlinops calls
def test_hessian_penalty_beside_curvlinops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("hessian_penalty")
    if module.curvlinops is not None:
        torch.manual_seed(0)
        x, y = torch.rand(3, 64, dtype=torch.float64), torch.tensor([1, 0, 2])
        found = module.values(module.Additive().double(), x, y, 2)
        for name in ("HessianPenalty", "curvlinops"):  # a diagonal Hessian: no variance
            assert abs(found[name]["relative difference"]) < 1e-12
    monkeypatch.setattr(module, "curvlinops", None)
    monkeypatch.setattr(sys, "argv", ["hessian_penalty", "--output", str(tmp_path)])
    module.main()
    assert "skipped" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
