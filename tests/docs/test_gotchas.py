"""The code on the gotchas page is what happens: each section runs as a doctest."""

import doctest
import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "gotchas.md").read_text(encoding="utf-8")
START, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
BY_TITLE = {section.partition("\n")[0]: section for section in SECTIONS if "```python" in section}


def code(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.parametrize("title", BY_TITLE)
def test_section(title: str) -> None:
    torch.set_default_dtype(torch.float32)  # what a user has; the fixture puts float64 back

    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    start, section = code(START), code(BY_TITLE[title])
    parser = doctest.DocTestParser()
    assert parser.get_examples(section)
    test = parser.get_doctest(f"{start}\n{section}", {}, title, "docs/gotchas.md", 0)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
