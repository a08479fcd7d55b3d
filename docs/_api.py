"""Pages of the API reference: one for each public module, made from its ``__all__``."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = """\
{title}
{rule}

.. automodule:: {name}
   :no-members:

.. currentmodule:: {name}

{summary}{elsewhere}{entries}
"""


def public_modules() -> list[ModuleType]:
    """Return the package and every module below it without a leading underscore in its name."""
    names = ["captum_priors"]
    for name in names:
        within = getattr(importlib.import_module(name), "__path__", [])
        names += sorted(
            f"{name}.{found.name}"
            for found in pkgutil.iter_modules(within)
            if not found.name.startswith("_")
        )
    return [importlib.import_module(name) for name in sorted(names)]


def exports(module: ModuleType) -> list[str]:
    """Return the names that a module exports, or those of its own that look public."""
    own = [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]
    return list(getattr(module, "__all__", own))


def homes() -> dict[str, str]:
    """Where each public name is documented: ``module.name`` to the name of its one entry."""
    entry: dict[int, str] = {}
    found: dict[str, str] = {}
    for module, name, thing in _exports():
        full = f"{module.__name__}.{name}"
        found[full] = entry.setdefault(id(thing), full)
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
        for name in exports(module):
            yield module, name, getattr(module, name)


def _index(modules: list[ModuleType]) -> str:
    entries = "\n".join(f"   {module.__name__}" for module in modules)
    return f"API reference\n=============\n\n.. toctree::\n   :maxdepth: 1\n\n{entries}\n"


def _page(module: ModuleType) -> str:
    home = homes()
    here, there = [], []
    for name in exports(module):
        full = f"{module.__name__}.{name}"
        (here if home[full] == full else there).append(full)
    return _MODULE.format(
        title=module.__name__,
        rule="=" * len(module.__name__),
        name=module.__name__,
        summary=_summary(here),
        elsewhere=_elsewhere([home[full] for full in there]),
        entries="\n".join(_entry(full) for full in here),
    )


def _summary(names: list[str]) -> str:
    if not names:
        return ""
    entries = "\n".join(f"   {name.rpartition('.')[2]}" for name in names)
    return f".. autosummary::\n   :nosignatures:\n\n{entries}\n\n"


def _elsewhere(names: list[str]) -> str:
    if not names:
        return ""
    links = ", ".join(f":py:obj:`{name}`" for name in names)
    return f"Also exported here: {links}.\n\n"


def _entry(full: str) -> str:
    module, _, name = full.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        return f".. autoclass:: {full}\n   :members:\n"
    text = f".. autofunction:: {full}\n"
    for method in vars(type(thing)):
        if not inspect.isroutine(thing) and not method.startswith("_"):
            text += f"\n.. autofunction:: {full}.{method}\n"
    return text
