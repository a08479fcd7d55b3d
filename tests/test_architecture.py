"""Imports point one way, and what is private to torch or Captum is touched in one place each."""

import ast
from pathlib import Path

import captum_priors

ROOT = Path(captum_priors.__file__).parent

# From the bottom up: a module may import from its own layer and the layers before it.
LAYERS = [
    ["_types", "_errors", "_extras", "_rows", "_lift", "_importance", "_captum", "_checks"],
    ["_engine", "penalties", "distances"],
    ["_probe"],
    ["attr"],
    ["adapters"],
    ["priors", "attacks", "metrics", "testing"],
    ["stability"],
    ["integrations"],
    ["_demo"],
    ["__init__", "__main__"],
]
# Within a layer these stand beside each other and do not know each other.
SIBLINGS = [
    {"_engine", "penalties", "distances"},
    {"priors", "attacks", "metrics", "testing"},
]


def part_of(module: str) -> str:
    """Top-level part of ``captum_priors.part.…``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports() -> list[tuple[str, str]]:
    """All imports within the package, as pairs of parts (from, to)."""
    found = []
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found += [(inside[0], part_of(n)) for n in names if n.startswith("captum_priors")]
    return found


def test_every_part_has_a_layer() -> None:
    parts = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts == {part for layer in LAYERS for part in layer}


def test_imports_point_down() -> None:
    height = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    seen = [(a, b) for a, b in imports() if a != "__init__"]
    assert len(seen) > 50  # the walk found the package
    upward = [(a, b) for a, b in seen if height[b] > height[a]]
    assert upward == []
    across = [(a, b) for a, b in seen if a != b and any({a, b} <= group for group in SIBLINGS)]
    assert across == []


def files_that_mention(text: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if text in path.read_text(encoding="utf-8")
    }


def test_private_doors() -> None:
    # The second names Captum's modules to tell its calls from others, and imports none of them.
    assert files_that_mention("captum._utils") == {"_captum.py", "adapters/_graph_mode.py"}
    assert files_that_mention("captum.attr._utils") == {"_captum.py"}
    # The seam, its value-only half, the pullback of both, and the certificate that checks them.
    assert files_that_mention("torch.autograd.grad(") == {
        "_engine/_first_order.py",
        "_engine/_graph.py",
        "_engine/_surrogate.py",
        "testing.py",
    }


def test_import_is_light() -> None:
    """The core neither needs nor imports the extras."""
    extras = {"shap", "sklearn", "matplotlib", "rich", "scipy", "torchmetrics"}
    for path in ROOT.rglob("*.py"):
        if "_demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & extras
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in extras
