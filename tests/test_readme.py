"""What the README shows is what happens."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run() -> None:
    torch.set_default_dtype(torch.float32)  # what a user has; the fixture puts float64 back
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_first_example_is_ten_lines() -> None:
    block = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    lines = [line for line in block.group(1).splitlines() if line.strip()]
    assert len(lines) <= 10


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_commands_are_make_targets() -> None:
    targets = re.findall(
        r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    pages = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
    for text in pages:
        commands = re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)
        assert set(commands) <= set(targets)
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", README, re.MULTILINE))
