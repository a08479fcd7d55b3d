"""What the check of the site in a browser finds; ``make docs`` looks at the site itself."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from check_browser import browser, faults  # after the path

STYLE = '<style>[data-theme="dark"] {background: rgb(20, 20, 20); color: rgb(COLOR)}</style>'
PAGE = "<!doctype html><html>{style}<body><article><h1>Title</h1></article>{more}"


@pytest.mark.skipif(browser() is None, reason="there is no browser")
def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    """On the first page; the other is right."""
    link, table = '<a href="{}.html">on</a>', '<div style="width: {}px">table</div>'
    pages = {
        "index": ("60, 60, 60", link.format("gone") + link.format("there") + table.format(900)),
        "there": ("200, 200, 200", table.format(300)),
    }
    for name, (color, more) in pages.items():
        page = PAGE.format(style=STYLE.replace("COLOR", color), more=more)
        (tmp_path / f"{name}.html").write_text(page)
    broken, wide, dark = faults(tmp_path, browser() or "")
    assert broken.endswith("gone.html leads nowhere")
    assert wide.startswith("index.html: 9")
    assert dark == "index.html: dark, not readable: Title"
