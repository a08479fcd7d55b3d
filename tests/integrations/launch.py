"""What the tests of training share: a task, its training by hand, a script on two processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_priors import AttributionPrior, ExpectedGradients, Lazy
from captum_priors.engine import Stream
from captum_priors.penalties import l1, l2
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


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3))


def batches(n: int) -> DataLoader[Any]:
    """So many examples, in batches of four."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 4, generator=generator)
    y = torch.randint(3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def two_terms(explainer: Any, **options: Any) -> Prior:
    """A term at every step and one at every second, with draws that start alike each time."""
    sparse = AttributionPrior(explainer, l1, **options)
    small = AttributionPrior(explainer, l2, name="small", **options)
    return restarted(0.5 * (sparse + Lazy(small, every=2)))


def prior_of(model: nn.Module) -> Prior:
    torch.manual_seed(4)
    return two_terms(ExpectedGradients(model), baselines=torch.randn(7, 4))


def by_hand(
    prior: Prior,
    optimizer: torch.optim.Optimizer,
    logits: Callable[..., Tensor],
    calls: Sequence[dict[str, Any]],
    *,
    micro: int = 1,
    fixed: bool = False,
    divided: bool = True,
) -> tuple[list[float], list[float]]:
    """Train as one would write it: means of the prior, and of its first term, at each step.

    The number of micro-batches is the same for a last step with less of them where it is fixed; the
    loss is divided by it or not.
    """
    added: list[float] = []
    first: list[float] = []
    own: list[float] = []
    hook = prior.prior.terms[0].register_forward_hook(lambda *args: own.append(args[2].item()))
    for start in range(0, len(calls), micro):
        part, values = calls[start : start + micro], []
        n = micro if fixed else len(part)
        own.clear()
        for call in part:
            loss, value = F.cross_entropy(logits(call), call["target"]), prior(**call)
            (loss / (n if divided else 1) + value / n).backward()
            values.append(value.item())
        optimizer.step()
        optimizer.zero_grad()
        added.append(sum(values) / len(part))
        first.append(sum(own) / len(part))
    hook.remove()
    return added, first
