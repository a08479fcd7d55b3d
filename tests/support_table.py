"""The site's tables of classes, settings and benchmarks, from registries and measurements.

``python -m tests.support_table`` writes them, and the summary of the benchmarks.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import _claims, _summary
from captum_priors.adapters.captum import ADAPTERS, REFUSED, held_fixed
from captum_priors.adapters.shap import ROWS as SHAP_ROWS
from tests.integrations.settings import settings_table

ROOT = Path(__file__).parents[1]
_WAYS = ("double_backprop", "recompute", "finite_difference")


def captum_table() -> str:
    """One row for each of Captum's classes."""
    support, cost = (_results(name) for name in ("adapter_support", "adapter_overhead"))
    lines = [
        "| class | values | certificate | `double_backprop` | `recompute` | `finite_difference` | "
        "cost: values / with graph / with backward | held fixed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(cls.__name__ for cls in ADAPTERS):
        measured, paid = support[name], cost[name]
        ways = [_yes(way in measured["differentiations"]) for way in _WAYS]
        errors = (measured["values"], max(measured["certificate"].values()))
        times = (paid["values"], paid["with graph"], paid["with backward"])
        cells = [
            f"`{name}`",
            *(f"{error:.0e}" if error else "0" for error in errors),
            *ways,
            " / ".join(f"{time:.1f}" for time in times),
            held_fixed(name),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    refused = "; ".join(f"`{name}`, {reason}" for name, reason in sorted(_once(REFUSED).items()))
    return "\n".join(lines) + f"\n\nRefused: {refused}.\n"


def shap_table() -> str:
    """One row for each of SHAP's classes."""
    measured = _results("adapter_shap")
    lines = [
        "| class | values | certificate | differentiations | cost: with graph / with backward | "
        "how | held fixed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(SHAP_ROWS.items()):
        found = measured[name]
        cells = [
            f"`{name}`",
            *(f"{found[k]:.0e}" if found[k] else "0" for k in ("value_error", "certificate")),
            ", ".join(f"`{way}`" for way in row.differentiations),
            f"{found['with graph']:.1f} / {found['with backward']:.1f}",
            row.mechanism,
            row.held_fixed,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def settings() -> str:
    """One row for each setting, with links as they are from the pages."""
    return settings_table().replace("](tests/", "](../tests/")


def measured() -> str:
    """When, and with which versions, what ``benchmarks/results`` holds was measured."""
    stored: dict[tuple[str, str], list[str]] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        date = found.get("date", "November 2026")  # when those without a date were measured
        versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in _VERSIONS)
        stored.setdefault((date, versions), []).append(f"`{path.stem}`")
    most = max(stored, key=lambda key: len(stored[key]))
    lines = [f"Measured in {most[0]} with {most[1]}, on one thread."]
    lines += [
        f"{', '.join(names)}: {date}, {versions}."
        for (date, versions), names in stored.items()
        if (date, versions) != most
    ]
    return "\n".join(lines) + "\n"


_VERSIONS = ("python", "torch", "captum", "captum_priors")
DOCS = ROOT / "docs"
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "support.md": {"measured": measured, "support table": captum_table, "shap table": shap_table},
    "training.md": {"settings table": settings},
    "benchmarks.md": {
        "measured": measured,
        "claims table": _claims.table,
        "benchmark table": _summary.table,
    },
}
"""The tables of each page."""


def in_place(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Put the tables between their marks."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(start)
        after = rest.partition(end)[2]
        text = before + start + table() + end + after
    return text


def _once(refused: dict[str, str]) -> dict[str, str]:
    """Join the classes that are refused for one reason."""
    names: dict[str, list[str]] = {}
    for name, reason in sorted(refused.items()):
        names.setdefault(reason, []).append(name)
    return {"`, `".join(each): reason for reason, each in names.items()}


def _yes(supported: bool) -> str:
    return "✓" if supported else "–"


def _results(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return results


def main() -> None:
    """Write the tables into the site's pages, and the summary beside the benchmarks' figures."""
    _summary.write(claims=_claims.table())
    for page, tables in PAGES.items():
        path = DOCS / page
        path.write_text(in_place(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
