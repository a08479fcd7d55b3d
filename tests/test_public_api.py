"""Every exported name exists, is documented, and has an example that runs as a doctest."""

import inspect
from typing import Any

import pytest

import captum_priors
from captum_priors import (
    attacks,
    attr,
    concepts,
    distances,
    integrations,
    metrics,
    outputs,
    penalties,
    priors,
    stability,
    testing,
    tuning,
)
from captum_priors.integrations import accelerate, huggingface, lightning

MODULES = [
    captum_priors,
    attacks,
    attr,
    concepts,
    distances,
    integrations,
    accelerate,
    huggingface,
    lightning,
    metrics,
    outputs,
    penalties,
    priors,
    stability,
    testing,
    tuning,
]
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
    from importlib.metadata import version

    assert captum_priors.__version__ == version("captum_priors")
