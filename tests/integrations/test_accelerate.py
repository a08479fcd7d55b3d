"""Accelerate: a real loop, compared with the one that one would write by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed

from captum_priors.integrations.accelerate import AcceleratedPrior
from captum_priors.penalties import l1
from tests.asserts import assert_same_parameters
from tests.integrations.launch import batches, by_hand, net, prior_of

L1, L2 = "AttributionPrior", "small"
N = 18  # five batches, the last one of two


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Accelerate's state belongs to the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Listener(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "listener"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, dict[str, float]]] = []

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.seen.append((step, values))


class Run:
    """A training run with everything in the accelerator's hands."""

    def __init__(self, steps: int = 1, **options: Any) -> None:
        self.listener, self.net = Listener(), net()
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=steps, log_with=self.listener, **options
        )
        self.accelerator.init_trackers("run")
        self.prior = AcceleratedPrior(prior_of(self.net), self.accelerator)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            self.net, optimizer, batches(N)
        )

    def epoch(self) -> None:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = F.cross_entropy(self.model(x), y) + self.prior(x, target=y)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.prior.log(step=1)


@pytest.mark.parametrize("steps", [1, 2])
def test_loop_is_the_one_written_by_hand(steps: int) -> None:
    run, model = Run(steps), net()
    run.epoch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    calls = [{"inputs": x, "target": y} for x, y in batches(N)]
    logits = lambda call: model(call["inputs"])  # noqa: E731  # of what the prior is called with
    added, _ = by_hand(prior_of(model), optimizer, logits, calls, micro=steps, fixed=True)
    assert_same_parameters(run.net, model)
    # One entry for each optimizer step, the mean over its micro-batches.
    assert [step for step, _ in run.listener.seen] == [1] * len(added)
    found = [values["prior"] for _, values in run.listener.seen]
    assert found == pytest.approx(added, rel=1e-12)
    assert all(values[f"prior/{L1}"] > 0 for _, values in run.listener.seen)
    # Lazy evaluates batches 1, 3 and 5.
    due = [f"prior/{L2}" in values for _, values in run.listener.seen]
    assert due == ([True, False, True, False, True] if steps == 1 else [True, True, True])


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_values_that_are_looked_at_are_not_logged(block: Any) -> None:
    run, (x, y) = Run(), next(iter(batches(N)))
    sparse, lazy = run.prior.prior.prior.terms
    with block():
        values = [prior(x, target=y).item() for prior in (run.prior, sparse, lazy)]
    assert values[0] == pytest.approx(0.5 * (values[1] + values[2]), rel=1e-12)
    assert int(lazy.counter) == 0
    assert run.prior.log() == {}


def test_values_that_are_not_finite_stay_out_of_the_logged_mean() -> None:
    run, (x, y) = Run(), next(iter(batches(N)))
    assert run.prior(x * float("nan"), target=y).isnan()
    value = run.prior(x, target=y).item()
    assert run.prior.log()["prior"] == pytest.approx(value)


def test_checkpoint_continues_draws_and_counters(tmp_path: Path) -> None:
    whole = Run(2)
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()
    resumed = Run(2)
    set_seed(99)
    resumed.prior(*next(iter(batches(N)))[:1], target=0)  # a step ahead
    resumed.accelerator.load_state(str(tmp_path))
    resumed.epoch()
    assert_same_parameters(whole.net, resumed.net)
    assert int(resumed.prior.prior.prior.terms[1].counter) == 10


def test_mixed_precision_reaches_the_prior() -> None:
    """``prepare`` changes the module's own forward pass, which the prior runs."""
    torch.set_default_dtype(torch.float32)
    run, alone, x = Run(mixed_precision="bf16"), net(), torch.randn(5, 4)
    dtypes: list[torch.dtype] = []
    run.net[0].register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    run.accelerator.backward(run.model(x).square().mean() + run.prior(x, target=1))
    assert set(dtypes) == {torch.bfloat16}
    (alone(x).square().mean() + prior_of(alone)(x, target=1)).backward()
    found, expected = (
        torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None])
        for each in (run.net, alone)
    )
    assert F.cosine_similarity(found, expected, dim=0) > 0.999  # eight bits through two layers


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`prior`: expected a prior, found function"):
        AcceleratedPrior(l1, Accelerator(cpu=True))
