"""Imports point one way, and what is private to torch or Captum is touched in one place each."""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import nn

import captum_priors
from captum_priors import AttributionPrior, ExpectedGradients, differentiable
from captum_priors.penalties import total_variation

ROOT = Path(captum_priors.__file__).parent

# From the bottom up: a module may import from its own layer and the layers before it.
LAYERS = [
    ["_types", "_errors", "_extras", "_captum", "_checks", "_shown"],
    ["engine"],
    ["_rows", "outputs"],
    ["penalties", "distances"],
    ["_probe", "_slopes", "_state", "attr", "concepts"],
    ["adapters"],
    ["attacks"],
    ["priors", "testing"],
    ["metrics", "stability", "tuning"],
    ["integrations"],
    ["_demo"],
    ["__init__", "__main__"],
]
# Private or undocumented names of torch, by the files that may use them. The engine has one file
# for them; what else is listed runs Captum's or SHAP's own code, which is built on them.
PRIVATE_OF_TORCH = {
    "torch._C": {"engine/_torch.py", "adapters/keep_graph.py"},
    "_sequence_nr": {"engine/_torch.py"},
    "._backward_hooks": {"engine/_torch.py"},
    "_NormBase": {"engine/_torch.py"},
    '"_saved_': {"engine/_torch.py"},
    "default_generator": {"engine/_torch.py", "engine/random.py"},
    "_execution_engine": set(),
    "gc.get_objects": set(),
    "ctypes": set(),
}


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


def files_that_mention(text: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if text in path.read_text(encoding="utf-8")
    }


@pytest.mark.parametrize("name", PRIVATE_OF_TORCH)
def test_private_names_of_torch(name: str) -> None:
    assert files_that_mention(name) == PRIVATE_OF_TORCH[name]


def test_private_names_of_captum() -> None:
    # KeepGraph names Captum's modules to tell its calls from others, and imports none of them.
    assert files_that_mention("from captum._utils") == {"_captum.py"}
    assert files_that_mention("from captum.attr._") == {"_captum.py"}


def test_one_place_takes_gradients_of_models() -> None:
    """The seam, the way back of values whose gradient comes later, and the certificate.

    An attack and the Hessian differentiate what is made of such gradients already; tuning takes
    those of a loss and a prior by parameters.
    """
    assert files_that_mention("torch.autograd.grad(") == {
        "attacks/attack.py",
        "stability/hessian.py",
        "engine/gradients.py",
        "engine/replay.py",
        "testing.py",
        "tuning.py",
    }


def traced(call: Callable[[], Any]) -> tuple[int, int, int]:
    """Python calls inside the package, its files, and the depth of the stack in it."""
    calls, files, depth, key = [0], set(), [0], f"{ROOT}{os.sep}"

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(key):
            calls[0] += 1
            files.add(frame.f_code.co_filename)
            deep, caller = 0, frame
            while caller is not None:
                deep += caller.f_code.co_filename.startswith(key)
                caller = caller.f_back
            depth[0] = max(depth[0], deep)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls[0], len(files), depth[0]


def test_a_reader_follows_one_call_through_few_files() -> None:
    model = nn.Sequential(nn.Linear(118, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y, background = torch.randn(4, 118), torch.randint(2, (4,)), torch.randn(20, 118)
    prior = AttributionPrior(ExpectedGradients(model), total_variation, n_samples=1)
    integrated = AttributionPrior(
        differentiable(IntegratedGradients(model)), total_variation, n_steps=4
    )
    for _ in range(2):  # the first call checks more
        calls, files, depth = traced(lambda: prior(x, baselines=background, target=y))
        _, files_of_adapter, _ = traced(lambda: integrated(x, target=y))
    assert (calls <= 90, files <= 12, depth <= 10) == (True,) * 3, (calls, files, depth)
    assert files_of_adapter <= 14


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
