"""The committed notebooks as they are; ``make tutorials`` runs them."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# A clone should not grow by pictures, and pages should load at once.
MOST_BYTES = 300_000
ABSOLUTE_PATH = re.compile(r"""(?<![\w.:/<])/(home|root|tmp|work|Users|usr|opt|mnt)/|[A-Z]:\\\\""")


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def path(request):
    return request.param


def _cells(path, kind):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def test_notebooks_are_numbered_from_one():
    assert [p.name[:3] for p in NOTEBOOKS] == [f"{n:02}_" for n in range(1, len(NOTEBOOKS) + 1)]


def test_opens_with_a_title_and_what_the_reader_will_be_able_to_do(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    opening = "".join(first["source"])
    assert opening.startswith("# ")
    assert "you will be able to" in opening


def test_was_run_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in _cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))


def test_outputs_are_neither_errors_nor_warnings(path):
    for cell in _cells(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]


def test_holds_no_path_of_the_machine_it_was_written_on(path):
    assert not ABSOLUTE_PATH.search(_without_pictures(path))


def _without_pictures(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
    return json.dumps(notebook)


def test_is_small_and_has_a_picture(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) <= MOST_BYTES
    assert '"image/png"' in text


def test_checks_its_own_claims(path):
    assert any("assert " in "".join(cell["source"]) for cell in _cells(path, "code"))


def test_uses_no_network_and_no_file_of_its_own(path):
    code = "\n".join("".join(cell["source"]) for cell in _cells(path, "code"))
    assert not re.search(r"from_pretrained\(['\"]|fetch_|urllib|requests|download=True", code)
