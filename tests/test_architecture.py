"""Imports point one way, and what is private to torch or Captum is touched in one place each."""

import ast
import os
import re
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
# Names that torch, Captum and SHAP keep private, by the files that may use them: one file of the
# engine, one for Captum, SHAP's adapters; and those that run Captum's own code, built on them.
PRIVATE = {
    "_captum.py": {
        *("captum._utils.common", "_format_additional_forward_args", "_format_output"),
        *("_format_tensor_into_tuples", "_run_forward", "_select_targets"),
        *("captum._utils.gradient", "captum._utils.models.linear_model", "captum._utils.progress"),
        *("captum.attr._core.dataloader_attr", "captum.attr._core.deep_lift"),
        *("captum.attr._core.llm_attr", "captum.attr._core.lrp", "captum.attr._utils.lrp_rules"),
        "_forward_with_dataloader",
    },
    "adapters/keep_graph.py": {
        *("_C", "_getframe", "captum._utils", "torch._jit_internal", "torch._tensor"),
        "torch.utils._contextlib",
    },
    "adapters/shap/coalitions.py": {"shap.utils._masked_model", "_convert_delta_mask_to_full"},
    "adapters/shap/deep.py": {"shap.explainers._deep.deep_pytorch"},
    "adapters/shap/linear.py": {"_parse_model"},
    "adapters/shap/masked.py": {"_curr_base_value"},
    "engine/_torch.py": {
        *("_C", "_NormBase", "_autograd", "_backward_hooks", "_backward_pre_hooks"),
        *("_forward_hooks", "_forward_pre_hooks", "_saved_train", "_saved_training"),
        *("_sequence_nr", "_top_saved_tensors_default_hooks", "torch._dynamo"),
    },
}
# Not private by their names: undocumented, or what nobody may use.
UNDOCUMENTED = {
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


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def names_in(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Private names that a file defines, and those that it uses, also by text."""
    defined, used = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(value=ast.Name(id=owner), attr=name, ctx=ast.Store()):
                (defined if owner in ("self", "tensor") else used).add(name)
            case ast.Attribute(attr=name):
                used.add(name)
            case ast.ImportFrom(module=str(module), names=names):
                if not module.startswith("captum_priors"):
                    used |= {module, *(alias.name for alias in names)}
            case ast.Constant(value=str(text)) if text.replace(".", "").isidentifier():
                used.add(text.removeprefix("captum_priors._demo."))
            case _:
                pass
    return set(filter(private, defined)), set(filter(private, used)) - {"__future__"}


def test_private_names_of_others() -> None:
    """Each file that uses some says what for, and of which version."""
    files = {path: path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    names = {path: names_in(ast.parse(text)) for path, text in files.items()}
    own = set().union({"_replace"}, *(defined for defined, _ in names.values()))
    own |= {f"{function}Backward" for function in own}  # nodes of its own autograd functions
    found = {str(path.relative_to(ROOT)): used - own for path, (_, used) in names.items()}
    assert {file: used for file, used in found.items() if used} == PRIVATE
    for file in PRIVATE:
        assert re.search(r"torch 2\.\d+|Captum 0\.\d+|\(0\.5\d\.\d\)", files[ROOT / file]), file


@pytest.mark.parametrize("name", UNDOCUMENTED)
def test_undocumented_names_of_torch(name: str) -> None:
    assert files_that_mention(name) == UNDOCUMENTED[name]


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
