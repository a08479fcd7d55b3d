"""StepGuard: what is not finite never reaches the parameters, in plain loops and in frameworks."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import TrainerCallback

from captum_priors.integrations import StepGuard
from tests.asserts import assert_same_state
from tests.integrations.test_huggingface import arguments
from tests.integrations.test_lightning import Classifier, trainer


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, 3))


def batches(n: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 8, 4, generator=generator)
    y = torch.randint(3, (n, 8), generator=generator)
    return list(zip(x, y, strict=True))


def bad() -> tuple[Tensor, Tensor]:
    x, y = batches()[0]
    x[3, 1] = float("nan")
    return x, y


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


class Run:
    """A model in training under a guard."""

    def __init__(self, kind: str = "sgd", on_nonfinite: Any = "skip") -> None:
        self.model = net()
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.guard = StepGuard(self.optimizer, on_nonfinite, model=self.model)

    def train(
        self, data: list[tuple[Tensor, Tensor]], micro: int = 1, closure: bool = False
    ) -> None:
        for i in range(0, len(data), micro):

            def compute(first: int = i) -> None:
                self.optimizer.zero_grad()
                for x, y in data[first : first + micro]:
                    F.cross_entropy(self.model(x), y).backward()

            if closure:
                self.optimizer.step(compute)
            else:
                compute()
                self.optimizer.step()

    def state(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(state)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("micro", [1, 2])
def test_skipped_step_is_as_if_the_batch_had_not_been(
    kind: str, closure: bool, micro: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Parameters, the optimizer's state and BatchNorm's statistics, bit-identically."""
    good, spoiled = Run(kind), Run(kind)
    data = batches()
    good.train(data, micro, closure)
    with caplog.at_level(logging.WARNING, "captum_priors"):
        spoiled.train([*data[:2], *[bad()] * micro, *data[2:]], micro, closure)
    assert (good.guard.skipped, spoiled.guard.skipped) == (0, 1)
    assert_same_state(good.state(), spoiled.state())
    assert "Step skipped, 1 so far. norm of the gradient: expected a finite number, found nan" in (
        caplog.text
    )


def test_step_raises_before_anything_changes() -> None:
    run = Run(on_nonfinite="raise")
    run.train(batches())
    before = run.state()
    with pytest.raises(FloatingPointError, match="expected a finite number, found nan"):
        run.train([bad()])
    assert_same_state(before, run.state())


def test_step_without_gradients() -> None:
    run = Run(on_nonfinite="raise")
    before = run.state()["model"]
    run.optimizer.step()
    assert_same_state(before, run.state()["model"])


@pytest.mark.parametrize("slope", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite(slope: float) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    _ = StepGuard(optimizer)
    weight.grad = torch.tensor([1.0, slope])
    with pytest.raises(FloatingPointError, match="expected a finite number"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2))


def test_scaler_keeps_the_steps_that_it_skips() -> None:
    """A fused optimizer is stepped by a GradScaler although it found an overflow."""
    run = Run("fused", "raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(run.model[0].weight)
    scaler.scale(run.model(bad()[0]).sum()).backward()
    scaler.step(run.optimizer)
    scaler.update()
    assert torch.equal(run.model[0].weight, before)
    assert scaler.get_scale() == 2.0


class Guarding(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.guard = StepGuard(optimizer, "skip", model=self.net)
        return optimizer


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_lightning_whose_closure_computes_the_gradients() -> None:
    ends = []
    for data in (batches(), [*batches()[:2], bad(), *batches()[2:]]):
        module = Guarding()
        loader: DataLoader[Any] = DataLoader(data, batch_size=None)
        trainer(max_epochs=1, accumulate_grad_batches=1).fit(module, loader)
        ends.append(module.net.state_dict())
    assert module.guard.skipped == 1
    assert_same_state(*ends)


def test_hugging_face_by_a_callback(tmp_path: Path) -> None:
    class Guard(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.guard = StepGuard(kwargs["optimizer"], "skip", model=kwargs["model"])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.net(x), labels)}

    data = [{"x": a, "labels": int(b)} for a, b in zip(*bad(), strict=True)]
    model, callback = Model(), Guard()
    options = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4)
    HFTrainer(model, options, train_dataset=data, callbacks=[callback]).train()
    assert callback.guard.skipped == 1
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`on_nonfinite`: expected one of 'raise', 'skip'"):
        StepGuard(torch.optim.SGD(net().parameters(), lr=0.1), "ignore")
