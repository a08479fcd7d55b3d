"""The main job, called as a user calls it."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from captum_priors._demo import cli
from captum_priors._demo.cli import main


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)  # what a user has; the fixture above puts float64 back


def write_idx(path: Path, values: np.ndarray, *, claim: tuple[int, ...] | None = None) -> None:
    """Write an IDX file of bytes, with an honest or another shape in its header."""
    shape = claim or values.shape
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


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
    write_idx(folder / "t10k-labels-idx1-ubyte", labels)
    return folder


def test_report_of_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "report"
    assert main(["--epochs", "2", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert "accuracy, clean" in printed.out
    assert printed.err == ""
    result = json.loads((output / "report.json").read_text())
    assert result["settings"]["epochs"] == 2
    assert "PixelPrior" in result["settings"]["prior"]
    assert set(result["versions"]) >= {"python", "torch", "captum", "captum_priors"}
    without, with_prior = result["models"].values()
    assert [len(m["epochs"]) for m in (without, with_prior)] == [2, 2]
    assert without["epochs"][0]["penalty"] == 0
    assert with_prior["epochs"][0]["penalty"] > 0
    assert 0.5 < without["clean_accuracy"] <= 1  # two epochs are enough for more than half
    levels = [list(m["gaussian_accuracy"].values()) for m in (without, with_prior)]
    assert all(each[0] > each[-1] for each in levels)  # more noise, less accuracy
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


def test_seed_decides(tmp_path: Path) -> None:
    def run(seed: str, name: str) -> dict[str, object]:
        assert main(["--epochs", "1", "--seed", seed, "--output", str(tmp_path / name)]) == 0
        models = json.loads((tmp_path / name / "report.json").read_text())["models"]
        for model in models.values():
            del model["seconds"]
        return models

    first = run("3", "a")
    assert run("3", "b") == first
    assert run("4", "c") != first


def test_mnist_files(small_mnist: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["--data", f"mnist={small_mnist}", "--epochs", "1", "--output", str(output)]) == 0
    result = json.loads((output / "report.json").read_text())
    assert result["data"]["split"].startswith("120 training and 30 test images of 150")


BAD = [
    (["--epochs", "0"], "--epochs: expected an integer of at least 1"),
    (["--epochs", "many"], "argument --epochs: invalid int value"),
    (["--data", "cifar"], "--data: expected 'digits' or 'mnist=DIR'"),
    (["--data", "digits=here"], "--data: expected 'digits' or 'mnist=DIR'"),
    (["--data", "foo=x"], "--data: expected 'digits' or 'mnist=DIR'"),
    (["--data", "mnist="], "--data: expected 'digits' or 'mnist=DIR'"),
    (["--data", "mnist=/nowhere/at/all"], "in /nowhere/at/all, found neither"),
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
    labels = folder / "t10k-labels-idx1-ubyte"
    if how == "missing":
        images.unlink()
    elif how == "truncated gzip":
        images.write_bytes(images.read_bytes()[:-100])
    elif how == "truncated":
        labels.write_bytes(labels.read_bytes()[:-1])
    elif how == "empty":
        labels.write_bytes(b"")
    elif how == "text":
        images.write_text("<html>not found</html>")
    elif how == "shapes":
        write_idx(labels, np.zeros(140))
    elif how == "header":
        write_idx(labels, np.zeros(150), claim=(151,))


@pytest.mark.parametrize(
    "how", ["missing", "truncated gzip", "truncated", "empty", "text", "shapes", "header"]
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
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else name)
    output = tmp_path / "out"
    assert main(["--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error == "captum_priors: the demo needs rich: run pip install 'captum_priors[demo]'\n"
    assert not output.exists()


def test_exit_status_of_the_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "captum_priors", "--data", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_pixel_prior_on_real_mnist(mnist: Path, tmp_path: Path) -> None:
    """At least 15 points under heavy noise for at most one point of clean accuracy."""
    output = tmp_path / "out"
    assert main(["--data", f"mnist={mnist}", "--output", str(output)]) == 0
    result = json.loads((output / "report.json").read_text())
    without, with_prior = result["models"].values()
    heavy = "1.25"
    gain = with_prior["gaussian_accuracy"][heavy] - without["gaussian_accuracy"][heavy]
    assert gain >= 0.15
    assert with_prior["clean_accuracy"] >= without["clean_accuracy"] - 0.01
    assert with_prior["attribution_total_variation"] < without["attribution_total_variation"]
