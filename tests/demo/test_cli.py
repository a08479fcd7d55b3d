"""The main job, called as a user calls it."""

import gzip
import json
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import captum_priors
from captum_priors._demo import cli, tag
from captum_priors._demo.cli import main
from captum_priors._demo.data import mnist as mnist_of


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)  # what a user has; the fixture above puts float64 back


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write a compressed IDX file of bytes."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """Two classes of noisy bright halves, 28 x 28, as IDX files."""
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 2
    images = rng.integers(0, 60, (150, 28, 28))
    images[labels == 0, :14] += 150
    images[labels == 1, 14:] += 150
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels)
    return folder


def report(output: Path, *arguments: str) -> dict[str, Any]:
    """Run a demo, and return what it wrote."""
    assert main([*arguments, "--output", str(output)]) == 0
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def test_the_tag_lies_and_one_line_sees_through_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least 50 points where the tag lies, for at most 3 where it tells."""
    monkeypatch.setattr(tag, "SEEDS", 1)
    found = report(tmp_path / "deep" / "report", "--epochs", "8")
    printed = capsys.readouterr()
    assert "tag lies" in printed.out
    assert printed.err == ""
    assert found["prior"] == "0.05 * RightForTheRightReasons(model)"
    assert set(found["versions"]) >= {"python", "torch", "captum", "captum_priors"}
    without, with_prior = found["models"].values()
    assert with_prior["tag lies"] >= without["tag lies"] + 0.5
    assert with_prior["tag tells"] >= without["tag tells"] - 0.03
    assert with_prior["attribution on the tag"] < 0.1 < without["attribution on the tag"]


# By demo: a figure that one epoch has, and its lowest and highest possible value.
OTHERS = {
    "sparsity": ("measurements that carry 90 %", 1, 30),
    "text": ("tag lies", 0, 1),
    "stability": ("top 25 pixels that stay", 0, 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_demos_report(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"captum_priors._demo.{name}.SEEDS", 1)
    models = report(tmp_path, name, "--epochs", "1")["models"]
    assert list(models) == ["without prior", "with prior"]
    figure, low, high = OTHERS[name]
    assert all(low <= each[figure] <= high for each in models.values())
    assert models["without prior"] != models["with prior"]


def test_seed_decides(tmp_path: Path) -> None:
    first, again, other = (
        report(tmp_path / str(i), "sparsity", "--epochs", "1", "--seed", seed)["models"]
        for i, seed in enumerate("334")
    )
    assert again == first
    runs, figure = other["with prior"]["seeds"], "sparsity (Gini)"
    assert [run["seed"] for run in runs] == [4, 5, 6]
    assert other["with prior"][figure] == pytest.approx(sum(run[figure] for run in runs) / 3)
    # A seed is one run, wherever it stands among the three.
    assert runs[:2] == first["with prior"]["seeds"][1:]


def test_mnist_is_read_as_it_was_written(small_mnist: Path) -> None:
    """The first half of each image is bright where its label is 0."""
    parts = mnist_of(small_mnist)
    assert [len(labels) for _, labels in parts] == [120, 30]
    for x, y in parts:
        assert x.shape[1:] == (1, 28, 28)
        assert (x.min() >= -1, x.max() <= 1) == (True, True)
        assert torch.equal(x[:, 0, 14:].mean((1, 2)) > x[:, 0, :14].mean((1, 2)), y == 1)


def test_mnist_adds_the_noise_curves(small_mnist: Path, tmp_path: Path) -> None:
    data = f"mnist={small_mnist}"
    found = report(tmp_path, "sparsity", "--data", data, "--epochs", "1")
    assert found["demo"] == "sparsity"
    figures = found["noise"]["models"]["with prior"].keys()
    assert figures >= {"clean", "Gaussian 1.25", "salt and pepper 0.3"}
    assert (tmp_path / "noise.png").exists()


def test_list_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert set(listed) == modules - {"__init__", "base", "cli", "data"}
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"captum_priors {captum_priors.__version__}\n"


BAD = [
    (["--epochs", "0"], "--epochs: expected an integer of at least 1"),
    (["--epochs", "many"], "argument --epochs: invalid int value"),
    (["--data", "cifar"], "--data: expected 'digits' or 'mnist=DIR'"),
    (["--data", "digits=here"], "--data: expected 'digits' or 'mnist=DIR'"),
    (["--data", "foo=x"], "--data: expected 'digits' or 'mnist=DIR'"),
    (["--data", "mnist="], "--data: expected 'digits' or 'mnist=DIR'"),
    (
        ["--data", "mnist=/nowhere/at/all"],
        "cannot read /nowhere/at/all/t10k-images-idx3-ubyte.gz (",
    ),
    (["noise"], "noise: expected --data mnist=DIR"),
    (["pixels"], "argument demo: invalid choice: 'pixels'"),
    (["--colour"], "unrecognized arguments: --colour"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_wrong_calls_are_one_line(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main([*arguments, "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in printed.err
    assert printed.err.count("\n") == 1
    assert not output.exists()


def damage(folder: Path, how: str) -> None:
    images = folder / "t10k-images-idx3-ubyte.gz"
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    if how == "missing":
        images.unlink()
    elif how == "truncated gzip":
        images.write_bytes(images.read_bytes()[:-100])
    elif how == "truncated":
        labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:-1]))
    elif how == "empty":
        labels.write_bytes(b"")
    elif how == "text":
        images.write_text("<html>not found</html>")
    elif how == "shapes":
        write_idx(images, np.zeros((150, 20, 20)))


@pytest.mark.parametrize(
    "how", ["missing", "truncated gzip", "truncated", "empty", "text", "shapes"]
)
def test_damaged_files_are_one_line(
    how: str, small_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(small_mnist, how)
    output = tmp_path / "out"
    assert main(["--data", f"mnist={small_mnist}", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("captum_priors: --data: ")
    assert error.count("\n") == 1
    assert not output.exists()


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for output in (taken, taken / "below"):
        assert main(["--output", str(output)]) == 2
        assert "--output: expected a folder that can be made, found" in capsys.readouterr().err
    assert taken.read_text() == "mine"


def test_missing_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sklearn" else name)
    output = tmp_path / "out"
    assert main(["--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error == "captum_priors: the demo needs sklearn: run pip install 'captum_priors[demo]'\n"
    assert not output.exists()


def test_exit_status_of_the_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["captum_priors", "--data", "nothing"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("captum_priors", run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_pixel_prior_on_real_mnist(mnist: Path, tmp_path: Path) -> None:
    """At least 15 points under heavy noise for at most one point of clean accuracy."""
    result = report(tmp_path, "noise", "--data", f"mnist={mnist}")
    without, with_prior = result["models"].values()
    heavy = "Gaussian 1.25"
    assert with_prior[heavy] >= without[heavy] + 0.15
    assert with_prior["clean"] >= without["clean"] - 0.01
