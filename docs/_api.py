"""Pages of the API reference: one for each public module, made from its ``__all__``."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.pycode import ModuleAnalyzer

_MODULE = """\
{title}
{rule}

.. automodule:: {name}
   :no-members:

.. currentmodule:: {name}

{summary}{entries}
"""


def public_modules() -> list[ModuleType]:
    """Return the package, the packages below it, and single modules that export names.

    Files without ``__all__``, and packages inside others, are how things are done.
    """
    names = ["captum_priors"]
    for name in names:
        within = getattr(importlib.import_module(name), "__path__", [])
        names += sorted(
            f"{name}.{found.name}"
            for found in pkgutil.iter_modules(within)
            if not found.name.startswith("_") and not (found.ispkg and "." in name)
        )
    modules = [importlib.import_module(name) for name in sorted(names)]
    return [module for module in modules if hasattr(module, "__all__")]


def homes() -> dict[str, str]:
    """Where each public name is documented: ``module.name`` to the name of its one entry.

    That is in the subpackage, also for names that the package itself exports: Sphinx's pages of
    source code lead back to one module for each file. A name that is a file's, too, is the file's.
    """
    entry: dict[int, str] = {}
    found: dict[str, str] = {}
    for module, name, thing in sorted(_exports(), key=lambda each: -each[0].__name__.count(".")):
        full = f"{module.__name__}.{name}"
        if full in sys.modules:
            full = f"captum_priors.{name}"
        found[f"{module.__name__}.{name}"] = entry.setdefault(id(thing), full)
    return found


def documented_names() -> list[str]:
    """Return the names that the reference must have entries for."""
    return sorted(set(homes().values()))


def spellings(target: str) -> list[str]:
    """Return full names that a short or an alternative one may stand for."""
    found = homes()
    alternatives = []
    for full, home in found.items():
        module_and_name, short = full, full.rpartition(".")[2]
        for spelling in (module_and_name, short):
            if target == spelling or target.startswith(spelling + "."):
                alternatives.append(home + target.removeprefix(spelling))
    return alternatives


def write(folder: Path) -> None:
    """Write ``index.rst`` and a page for each module."""
    folder.mkdir(exist_ok=True)
    modules = public_modules()
    pages = {"index.rst": _index(modules)} | {f"{m.__name__}.rst": _page(m) for m in modules}
    for old in folder.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _exports() -> Iterator[tuple[ModuleType, str, Any]]:
    for module in public_modules():
        for name in module.__all__:
            yield module, name, getattr(module, name)


def _index(modules: list[ModuleType]) -> str:
    entries = "\n".join(f"   {module.__name__}" for module in modules)
    return f"API reference\n=============\n\n.. toctree::\n   :maxdepth: 1\n\n{entries}\n"


def _page(module: ModuleType) -> str:
    home = homes()
    names = [f"{module.__name__}.{name}" for name in module.__all__]
    here = [name for name in names if home[name] == name]
    return _MODULE.format(
        title=module.__name__,
        rule="=" * len(module.__name__),
        name=module.__name__,
        summary=_summary([home[n] for n in names], f"{module.__name__}."),
        entries="\n".join(_entry(full) for full in here),
    )


def _summary(names: list[str], prefix: str) -> str:
    names = [name for name in names if not _is_value(name)]
    if not names:
        return ""
    entries = "\n".join(f"   {name.removeprefix(prefix)}" for name in names)
    return f".. autosummary::\n   :nosignatures:\n\n{entries}\n\n"


def _entry(full: str) -> str:
    thing = _thing(full)
    if inspect.isclass(thing):
        return f".. autoclass:: {full}\n   :members:\n"
    if _is_value(full):
        said = "\n".join(f"   {line}".rstrip() for line in _said_below(full))
        return f".. py:data:: {full.rpartition('.')[2]}\n\n{said}\n"
    text = f".. autofunction:: {full}\n"
    for method in vars(type(thing)):
        if not inspect.isroutine(thing) and not method.startswith("_"):
            text += f"\n.. autofunction:: {full}.{method}\n"
    return text


def _thing(full: str) -> Any:
    module, _, name = full.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _is_value(full: str) -> bool:
    """Whether a name stands for another library's object, such as ``Callable[..., Tensor]``."""
    thing = _thing(full)
    ours = type(thing).__module__.startswith("captum_priors")
    return not (inspect.isclass(thing) or inspect.isroutine(thing) or ours)


def _said_below(full: str) -> list[str]:
    """Return the string below a value, from the file of the package that defines it."""
    package, _, name = full.rpartition(".")
    for module in [m for key, m in sorted(sys.modules.items()) if key.startswith(f"{package}.")]:
        lines = ModuleAnalyzer.for_module(module.__name__).find_attr_docs().get(("", name))
        if lines:
            return lines
    raise LookupError(f"{full}: expected a string below its definition, found none.")
