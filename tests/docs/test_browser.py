"""What the check of the site in a browser finds; ``make docs`` looks at the site itself."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from check_browser import browser, faults  # after the path

STYLE = '<style>[data-theme="dark"] {background: rgb(20, 20, 20); color: rgb(COLOR)}</style>'
PAGE = "<!doctype html><html>{style}<body><article><h1>Title</h1></article>{more}"


def site(folder: Path, color: str, more: str) -> Path:
    page = PAGE.format(style=STYLE.replace("COLOR", color), more=more)
    (folder / "index.html").write_text(page)
    (folder / "there.html").write_text(PAGE.format(style="", more=""))
    return folder


@pytest.mark.skipif(browser() is None, reason="there is no browser")
def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "right").mkdir()
    link, table = '<a href="{}.html">on</a>', '<div style="width: {}px">table</div>'
    right = site(tmp_path / "right", "200, 200, 200", link.format("there") + table.format(300))
    wrong = site(tmp_path / "wrong", "60, 60, 60", link.format("gone") + table.format(900))
    command = browser() or ""
    assert faults(right, command) == []
    broken, wide, dark = faults(wrong, command)
    assert broken.endswith("gone.html leads nowhere")
    assert wide.startswith("index.html: 9")
    assert dark == "index.html: dark, not readable: Title"
