"""What the README shows is what happens."""

import json
import re
from pathlib import Path

import torch

from benchmarks import _summary
from captum_priors.adapters.captum import ADAPTERS
from captum_priors.adapters.shap import ROWS as SHAP_ROWS
from tests.support_table import TABLES, in_place

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run() -> None:
    torch.set_default_dtype(torch.float32)  # what a user has; the fixture puts float64 back
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_first_example_is_ten_lines() -> None:
    block = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    lines = [line for line in block.group(1).splitlines() if line.strip()]
    assert len(lines) <= 10


def test_tables_are_those_of_the_registries_and_the_measurements() -> None:
    """``python -m tests.support_table`` writes them."""
    assert all(f"<!-- {name} -->" in README for name in TABLES)
    assert in_place(README) == README


def test_summary_of_the_benchmarks_is_that_of_their_figures() -> None:
    """``python -m tests.support_table`` writes it."""
    written = (_summary.RESULTS / "summary.md").read_text(encoding="utf-8")
    assert written == _summary.table()
    scripts = {path.stem for path in _summary.RESULTS.parent.glob("[a-z]*.py")}
    assert {path.stem for path in _summary.RESULTS.glob("*.json")} <= scripts


def test_what_was_measured_is_within_what_is_promised() -> None:
    results = ROOT / "benchmarks" / "results"
    support = json.loads((results / "adapter_support.json").read_text())["results"]
    assert support.keys() == {cls.__name__ for cls in ADAPTERS}
    for row in support.values():
        assert row["values"] <= 1e-10
        assert max(row["certificate"].values()) <= 1e-6
    shap = json.loads((results / "adapter_shap.json").read_text())["results"]
    assert shap.keys() == SHAP_ROWS.keys()
    assert all(row["certificate"] <= 1e-6 for row in shap.values())


def test_commands_are_make_targets() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(commands) <= set(targets)
