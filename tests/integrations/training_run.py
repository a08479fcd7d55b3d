"""A training run that is killed and goes on from its checkpoint, as a script or a function.

``python -m tests.integrations.training_run FOLDER`` prints each step that it is done with.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import Saliency
from torch import Tensor, nn

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

STEPS, SAVE_EVERY = 60, 7


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


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
    stable = StabilityPrior(Saliency(model), mse, noisy)
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    where = Path(sys.argv[1])
    torch.save(run(where, lambda step: print(step, flush=True)), where / "end.pt")
