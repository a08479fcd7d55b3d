"""Killed at a random step, a run goes on from its checkpoint as if nothing had been.

``python -m tests.integrations.test_resume FOLDER`` is that run: it prints each step that it is done
with.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import nn

from captum_priors import (
    AttributionPrior,
    ExpectedGradients,
    Guarded,
    Lazy,
    StabilityPrior,
    Subsample,
)
from captum_priors.distances import mse
from captum_priors.penalties import l1, l2
from captum_priors.priors import Prior
from tests.asserts import assert_same_state

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 60, 7


def make() -> tuple[nn.Module, Prior]:
    """A model that draws, and a prior of everything that counts or draws."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Softplus(), nn.Dropout(0.2), nn.Linear(6, 3)
    )
    background, own = torch.randn(9, 4), torch.Generator().manual_seed(8)
    drawn = AttributionPrior(ExpectedGradients(model), l1, baselines=background)
    by_generator = AttributionPrior(
        ExpectedGradients(model), l2, baselines=background, generator=own
    )
    stable = StabilityPrior(Saliency(model), mse, lambda x: x + 0.1 * torch.randn_like(x))
    # The limit of the last one lets it fail at some steps.
    limited = Guarded(stable, "skip", max_value=8e-6)
    return model, 0.3 * (Lazy(drawn, every=3) + Subsample(by_generator, 0.5) + limited)


def run(folder: Path, report: Any, steps: int = STEPS) -> dict[str, Any]:
    """Train from the checkpoint in the folder, if there is one, and return where it ends."""
    model, prior = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    order = torch.Generator().manual_seed(6)
    x = torch.randn(32, 4, generator=order)
    y = torch.randint(3, (32,), generator=order)
    file, step = folder / "checkpoint.pt", 0
    torch.manual_seed(7)
    if file.exists():
        saved = torch.load(file, weights_only=True)
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        prior.load_state_dict(saved["prior"])
        torch.set_rng_state(saved["global"])
        order.set_state(saved["order"])

    def state() -> dict[str, Any]:
        return {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "prior": prior.state_dict(),
            "global": torch.get_rng_state(),
            "order": order.get_state(),
        }

    while step < steps:
        rows = torch.randint(32, (8,), generator=order)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        (loss + prior(x[rows], target=y[rows])).backward()
        optimizer.step()
        step += 1
        if step % SAVE_EVERY == 0:
            torch.save(state(), folder / "new.pt")
            (folder / "new.pt").replace(file)  # a checkpoint is whole or not there
        report(step)
    return state()


def start(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integrations.test_resume", str(folder)],
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    where = Path(sys.argv[1])
    torch.save(run(where, lambda step: print(step, flush=True)), where / "end.pt")
