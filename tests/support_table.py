"""The README's table of Captum's classes, made from the registry and from what was measured.

``python -m tests.support_table`` writes it.
"""

import json
from pathlib import Path
from typing import Any

from captum_priors.adapters._table import ADAPTERS, REFUSED, held_fixed

ROOT = Path(__file__).parents[1]
START, END = "<!-- support table -->\n", "<!-- end of support table -->\n"
_WAYS = ("double_backprop", "recompute", "finite_difference")


def render() -> str:
    """One row for each class."""
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
    """Write the table into the README."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + START + render() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
