"""What the site and the pages beside it promise, without building it (``make docs`` does)."""

import re
import sys
from pathlib import Path

import pytest

import captum_priors

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import _api  # noqa: E402  # after the path
from check_links import broken_links  # noqa: E402  # after the path


def test_reference_has_a_page_and_an_entry_for_every_public_name(tmp_path: Path) -> None:
    _api.write(tmp_path)
    lines = [(p.stem, line) for p in tmp_path.glob("*.rst") for line in p.read_text().splitlines()]
    written = (".. autoclass::", ".. autofunction::")
    entries = {line.split(":: ")[1] for _, line in lines if line.startswith(written)}
    entries |= {f"{page}.{s.split(':: ')[1]}" for page, s in lines if s.startswith(".. py:data::")}
    homes = _api.homes()
    assert {f"captum_priors.{name}" for name in captum_priors.__all__} <= homes.keys()
    assert set(homes.values()) <= entries
    assert "captum_priors.differentiable.register" in entries


def test_a_short_name_stands_for_the_full_one() -> None:
    assert "captum_priors.attr.ExpectedGradients.attribute" in _api.spellings(
        "ExpectedGradients.attribute"
    )
    assert _api.spellings("captum_priors.Lazy") == ["captum_priors.priors.Lazy"]
    assert _api.spellings("nothing_of_the_kind") == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text('<p id="here">')
    links = ["there.html#here", "there.html", "#top", "https://elsewhere.org/x", "there.html#gone"]
    page = '<a id="top">' + "".join(f'<a href="{link}">' for link in [*links, "gone.html"])
    (tmp_path / "index.html").write_text(page)
    assert broken_links(tmp_path) == ["index.html: gone.html", "index.html: there.html#gone"]
    assert broken_links(tmp_path / "empty") != []


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_relative_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    local = [link.partition("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_citation_has_the_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == captum_priors.__version__
