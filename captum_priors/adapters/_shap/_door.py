"""The only way to SHAP: it is imported when it is needed, never with this package."""

import importlib
from typing import Any


def shap() -> Any:
    """Return the ``shap`` module."""
    return importlib.import_module("shap")


def shap_module(name: str) -> Any:
    """Return one of SHAP's submodules."""
    return importlib.import_module(f"shap.{name}")
