"""What the tests of training share: a script run on two processes, priors that start alike."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from captum_priors.engine import Stream
from captum_priors.priors import Prior

ROOT = Path(__file__).parents[2]


def results_of(
    script: str, tmp_path_factory: pytest.TempPathFactory, worker_id: str, names: Sequence[str] = ()
) -> Any:
    """Return what the script wrote as JSON to the path that it was given, before the names."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder if worker_id == "master" else folder.parent) / f"{script}.json"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with FileLock(f"{path}.lock"):
        if not path.exists():
            done = subprocess.run(
                [sys.executable, "-m", *launch, "-m", f"tests.integrations.{script}", path, *names],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text(encoding="utf-8"))


def restarted(prior: Prior) -> Prior:
    """Start all streams of a prior as those of its twin, which are others while both live."""
    for place, stream in enumerate(m for m in prior.modules() if isinstance(m, Stream)):
        stream.set_extra_state(torch.tensor([place, 0]))
    return prior
