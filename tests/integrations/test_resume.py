"""Killed at a random step, a run goes on from its checkpoint as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.asserts import assert_same_state
from tests.integrations.training_run import SAVE_EVERY, STEPS, run

ROOT = Path(__file__).parents[2]


def start(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integrations.training_run", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_run_continues_bit_identically(tmp_path: Path) -> None:
    whole_folder = tmp_path / "whole"
    whole_folder.mkdir()
    whole = run(whole_folder, lambda step: None)

    last = random.SystemRandom().randint(SAVE_EVERY + 1, STEPS - SAVE_EVERY)
    with start(tmp_path) as killed:
        assert killed.stdout is not None
        for line in killed.stdout:
            if int(line) >= last:
                break
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "end.pt").exists()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert SAVE_EVERY <= saved["step"] < STEPS, f"killed after step {last}"

    with start(tmp_path) as resumed:
        printed, _ = resumed.communicate()
    assert resumed.returncode == 0
    assert int(printed.split()[0]) == saved["step"] + 1
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert_same_state(whole, end)
    # What counts has counted.
    counts = {name: int(t) for name, t in end["prior"].items() if t.numel() == 1}
    assert counts.pop("prior.terms.0.counter._extra_state") == STEPS
    assert 0 < counts.pop("prior.terms.2.skips._extra_state") < STEPS
    assert not counts
    assert end["prior"]["prior.terms.0.prior.stream._extra_state"][1] == STEPS / 3


@pytest.mark.parametrize("part", ["prior", "order", "global"])
def test_every_part_of_the_checkpoint_matters(part: str, tmp_path: Path) -> None:
    """The comparison above would see a prior that started anew."""

    run(tmp_path, lambda step: None, SAVE_EVERY)
    file = tmp_path / "checkpoint.pt"
    saved = torch.load(file, weights_only=True)
    whole = run(tmp_path, lambda step: None, SAVE_EVERY + 3)
    fresh = {"order": torch.Generator().get_state(), "global": torch.Generator().get_state()}
    if part == "prior":
        key = "prior.terms.1.prior.generator_state._extra_state"
        saved["prior"][key] = torch.Generator().get_state()
    else:
        saved[part] = fresh[part]
    torch.save(saved, file)
    other = run(tmp_path, lambda step: None, SAVE_EVERY + 3)
    assert not torch.equal(whole["model"]["0.weight"], other["model"]["0.weight"])
