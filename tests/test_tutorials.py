"""The committed notebooks as they are; ``make tutorials`` runs them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# A clone should not grow by pictures, and pages should load at once.
MOST_BYTES = 300_000
ABSOLUTE_PATH = re.compile(r"""(?<![\w.:/<])/(home|root|tmp|work|Users|usr|opt|mnt)/|[A-Z]:\\\\""")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells_of(path: Path, kind: str) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def test_notebooks_are_numbered_from_one() -> None:
    assert NOTEBOOKS
    assert [p.name[:3] for p in NOTEBOOKS] == [f"{n:02}_" for n in range(1, len(NOTEBOOKS) + 1)]


@every_notebook
def test_opens_with_a_title_and_what_the_reader_will_be_able_to_do(path: Path) -> None:
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    assert "you will be able to" in "".join(first["source"])


@every_notebook
def test_code_checks_its_claims_and_needs_no_network(path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells_of(path, "code"))
    assert "assert " in code
    assert not re.search(r"from_pretrained|fetch_|urlopen|\brequests\.|download=True", code)


@every_notebook
def test_was_run_from_top_to_bottom_without_errors_or_warnings(path: Path) -> None:
    cells = cells_of(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]


@every_notebook
def test_is_small_has_a_picture_and_no_path_of_the_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) <= MOST_BYTES
    assert '"image/png"' in text
    assert not ABSOLUTE_PATH.search(re.sub(r'"image/png": "[^"]*"', "", text))
