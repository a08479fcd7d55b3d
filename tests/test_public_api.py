"""Every exported name exists, is documented, and has an example that runs as a doctest."""

import importlib
import inspect
import pkgutil
from importlib.metadata import version
from typing import Any

import pytest

import captum_priors

INSIDE = ("engine", "adapters")  # what users do not call by name
NAMES = [m.name for m in pkgutil.iter_modules(captum_priors.__path__) if m.name not in INSIDE]
FRAMEWORKS = [f"integrations.{name}" for name in ("accelerate", "huggingface", "lightning")]
PUBLIC = [n for n in [*NAMES, *FRAMEWORKS] if not n.startswith("_")]
LOADED = [captum_priors, *(importlib.import_module(f"captum_priors.{n}") for n in PUBLIC)]
MODULES = [module for module in LOADED if hasattr(module, "__all__")]
EXPORTS = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module in MODULES
    for name in module.__all__
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_teach_and_export_in_order(module: Any) -> None:
    assert module.__doc__
    assert module.__all__ == sorted(module.__all__, key=_isort_key)


def _isort_key(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order that the linter keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("thing", EXPORTS)
def test_documented_with_an_example(thing: Any) -> None:
    doc = inspect.getdoc(thing)
    assert doc
    assert ">>> " in doc
    first = doc.splitlines()[0]
    assert first.endswith(".")


def test_version_is_the_distribution_s() -> None:
    assert captum_priors.__version__ == version("captum_priors")
