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


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
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


HEADINGS = [
    (page.name, heading)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("choose weight", "weight.md"),
        ("batchnorm", "gotchas.md"),
        ("annotation", "recipes.md"),
        ("memory", "troubleshooting.md"),
        ("hugging face", "training.md"),
        ("ddp", "training.md"),
        ("accuracy fell", "troubleshooting.md"),
        ("time series", "recipes.md"),
        ("fourier", "recipes.md"),
        ("graph networks", "recipes.md"),
        ("distillation", "recipes.md"),
        ("explaining loss", "recipes.md"),
        ("captum", "coming-from.md"),
        ("install", "installation.md"),
        ("gallery", "gallery.md"),
        ("rationale", "guide.md"),
        ("two texts", "recipes.md"),
        ("penalty train", "troubleshooting.md"),
        ("attack", "troubleshooting.md"),
        ("shap", "coming-from.md"),
        ("attributionpriors", "coming-from.md"),
    ],
)
def test_what_people_search_for_is_in_a_heading(query: str, page: str) -> None:
    """The site's search ranks words of headings above those of the text."""
    found = {name for name, heading in HEADINGS if all(w in heading.lower() for w in query.split())}
    assert page in found


def test_extras_on_the_page_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    options = project.partition("[project.optional-dependencies]")[2].partition("\n[tool")[0]
    extras = set(re.findall(r"^(\w+) = \[", options, re.MULTILINE))
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == extras - {"dev", "docs"}


def test_every_page_is_reached_from_the_first() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(index.split())
