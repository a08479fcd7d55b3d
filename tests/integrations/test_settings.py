"""Every row of the site's table of settings rests on tests that are there and run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.settings import SETTINGS, settings_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Tests that pytest finds in the files that the table names."""
    files = sorted({test.partition("::")[0] for row in SETTINGS for test in row.tests})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines())


@pytest.mark.slow
def test_every_row_names_tests_that_are_there(collected: set[str]) -> None:
    for test in (test for row in SETTINGS for test in row.tests):
        pattern = re.compile(re.escape(test).replace(r"\*", ".*") + r"(\[.*)?")
        assert any(map(pattern.fullmatch, collected)), test


def test_every_row_is_tested_without_a_gpu() -> None:
    for row in SETTINGS:
        assert any(not test.startswith("tests/gpu/") for test in row.tests), row.name


def test_rows_say_what_holds() -> None:
    table = settings_table()
    assert table.count("\n") == len(SETTINGS) + 2
    assert all(row.how for row in SETTINGS if row.verdict != "works")
    names = [row.name for row in SETTINGS]
    assert len(set(names)) == len(names)
