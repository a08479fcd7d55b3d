"""The code on every page of the site is what happens: each section runs as a doctest.

A page's set-up stands before its first section, and runs before each of them.
"""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import torch.distributed as dist

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def sections(text: str) -> list[tuple[str, str]]:
    """Titles and texts; the first is what stands before all titles but the page's own."""
    start, *rest = re.split(r"^#{2,3} ", text, flags=re.MULTILINE)
    return [("", start), *(part.partition("\n")[::2] for part in rest)]


def blocks(text: str) -> list[tuple[str, str]]:
    """Languages and contents; those in lists are indented."""
    return [(language, dedent(body)) for _, language, body in BLOCK.findall(text)]


def code(text: str) -> str:
    return "\n".join(body for language, body in blocks(text) if language == "python")


CASES = [
    pytest.param(page, title, code(text), id=f"{page}: {title}")
    for page, whole in PAGES.items()
    for title, text in sections(whole)
    if code(text)
]


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """Single precision, and no processes left behind by a section that fails."""
    torch.set_default_dtype(torch.float32)  # the fixture of all tests puts float64 back
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(("page", "title", "examples"), CASES)
def test_section(page: str, title: str, examples: str) -> None:
    start = code(sections(PAGES[page])[0][1]) if title else ""
    parser = doctest.DocTestParser()
    test = parser.get_doctest(f"{start}\n{examples}", {}, title or page, page, 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_kind_that_is_checked(page: str) -> None:
    """Python is executed here, and commands are looked up in the Makefile by their test."""
    for language, body in blocks(PAGES[page]):
        assert language in {"python", "sh", "{include}", "{toctree}"}, body
        assert language != "python" or body.startswith(">>> "), body


def test_messages_that_troubleshooting_lists_are_those_that_appear() -> None:
    """The examples below a message run, so the message that they show is the one raised."""
    _, _, by_message = PAGES["troubleshooting.md"].partition("\n## By message\n")
    titled = sections(by_message)[1:]
    assert len(titled) > 10
    for title, text in titled:
        assert title in code(text), title
