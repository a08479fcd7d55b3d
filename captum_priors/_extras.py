"""Packages that only a part of the library needs, imported when that part is used."""

import importlib
from typing import Any

from captum_priors._errors import refusal


def extra(module: str, name: str) -> Any:
    """Import a module of an optional extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise refusal(
            ImportError,
            f"package {module.partition('.')[0]!r}",
            "it to be installed",
            "that it is not",
            f"Run: pip install 'captum_priors[{name}]'",
        ) from error
