"""What the README shows is what happens."""

import re
from pathlib import Path

import torch

from captum_priors.adapters._table import ADAPTERS

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


def test_support_table_lists_what_is_admitted() -> None:
    """Each admitted class once, and no other class of Captum's."""
    rows = [line for line in README.splitlines() if line.startswith("| `") and "1e-6" in line]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    own = {"ExpectedGradients", "LayerExpectedGradients"}
    admitted = {cls.__name__ for cls in ADAPTERS}
    assert sorted(listed) == sorted(admitted | own)
    assert f"{len(admitted)} Captum classes" in README


def test_commands_are_make_targets() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(commands) <= set(targets)
