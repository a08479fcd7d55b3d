"""The site's tables are those of the registries and of what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks import _claims, _summary
from captum_priors.adapters.captum import ADAPTERS
from captum_priors.adapters.shap import ROWS as SHAP_ROWS
from tests.support_table import DOCS, PAGES, in_place

RESULTS = Path(_summary.RESULTS)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_registries_and_the_measurements(page: str) -> None:
    """``python -m tests.support_table`` writes them."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in text for name in PAGES[page])
    assert in_place(text, PAGES[page]) == text


def test_summary_of_the_benchmarks_is_that_of_their_figures() -> None:
    """``python -m tests.support_table`` writes it."""
    written = (RESULTS / "summary.md").read_text(encoding="utf-8")
    assert written == f"{_claims.table()}\n{_summary.table()}"
    scripts = {path.stem for path in RESULTS.parent.glob("[a-z]*.py")}
    found = {path.stem.removesuffix("_noise") for path in RESULTS.glob("*.json")}
    assert found <= scripts


def test_what_was_measured_is_within_what_is_promised() -> None:
    support = json.loads((RESULTS / "adapter_support.json").read_text())["results"]
    assert support.keys() == {cls.__name__ for cls in ADAPTERS}
    for row in support.values():
        assert row["values"] <= 1e-10
        assert max(row["certificate"].values()) <= 1e-6
    shap = json.loads((RESULTS / "adapter_shap.json").read_text())["results"]
    assert shap.keys() == SHAP_ROWS.keys()
    assert all(row["certificate"] <= 1e-6 for row in shap.values())
