"""What a package index, a forge and a user without extras get."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import captum_priors

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github").rglob("*.yml"))
EXTRAS = ("accelerate", "lightning", "pandas", "scipy", "shap", "sklearn", "transformers")


@pytest.fixture
def hatch() -> Any:
    """The hook that makes the description, without hatchling, which only a build has."""
    text = (ROOT / "hatch_build.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    text = text.replace("from hatchling.metadata.plugin.interface import MetadataHookInterface", "")
    exec(text.replace("(MetadataHookInterface)", ""), names)
    return names


def test_the_description_has_no_dead_links(hatch: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    nowhere = hatch["description"](readme, "")
    assert "](docs/" in readme
    assert re.findall(r"\]\((?!https://|#)", nowhere) == []
    assert re.findall(r"```.*?```", nowhere, re.DOTALL) == re.findall(
        r"```.*?```", readme, re.DOTALL
    )
    there = hatch["description"](readme, "https://forge.example/us/it")
    assert "![" in there
    for link in re.findall(r"\]\(([^)\s]+)\)", there):
        assert link.startswith(("https://", "#"))
    assert hatch["description"]("[a](b.md), `x[i](j)`\n\n![c](d.png)\n\ne", "") == (
        "a, `x[i](j)`\n\ne"
    )
    assert hatch["urls"]("") == {}
    assert hatch["urls"]("https://x/y")["Issues"] == "https://x/y/issues"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_the_forge_reads_parses(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found.keys() & {"jobs", "body"}
    if "jobs" in found:
        assert "permissions" in found
        assert all(job["runs-on"] and job["steps"] for job in found["jobs"].values())


def test_workflows_run_make_targets_and_ci_the_same() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    (lists,) = re.findall(r"^        target: \[(\w+, .*)\]$", text, re.MULTILINE)
    run = {"test", "test-oldest", *lists.split(", ")}
    assert run <= targets
    assert (
        set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.M)) == run
    )


def test_versions_are_the_same_everywhere() -> None:
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"^        python: \[(.*)\]$", text, re.MULTILINE)
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert re.findall(r'"(.*?)"', matrix) == classified
    assert f'requires-python = ">={classified[0]}"' in PROJECT
    oldest = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / ".ci/oldest.txt").read_text(), re.M))
    bounds = dict(re.findall(r'^  "(\w+)>=([\d.]+)"', PROJECT, re.MULTILINE))
    assert oldest.keys() == {"torch", "captum", "shap"}
    assert {name: version.removesuffix(".0") for name, version in oldest.items()} == {
        name: bounds[name].removesuffix(".0") for name in oldest
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"OLDEST ?= captum=={oldest['captum']}\n" in makefile


def test_the_changelog_has_the_version_below_what_is_not_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## \[(.*?)\]", text, re.MULTILINE)
    assert titles[:2] == ["Unreleased", captum_priors.__version__]


@pytest.mark.slow
def test_examples_of_the_core_pass_without_extras() -> None:
    """Those that need one are skipped, or say so, rather than fail."""
    start = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r})); import pytest; "
    run = "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'captum_priors/integrations']))"
    done = subprocess.run(
        [sys.executable, "-c", start + run], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed, 3 skipped", done.stdout), done.stdout
