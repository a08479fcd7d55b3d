"""The core's doctests pass without extras: those that need one that is missing are skipped."""

import re
from importlib.util import find_spec

import pytest

IMPORTED = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
DEMO = ("matplotlib", "sklearn")
collect_ignore_glob = [] if all(map(find_spec, DEMO)) else ["captum_priors/_demo/*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip examples that import a package which is not there."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            source = "".join(example.source for example in item.dtest.examples)
            missing = [name for name in IMPORTED.findall(source) if find_spec(name) is None]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))
