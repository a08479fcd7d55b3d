"""StepGuard: what is not finite never reaches the parameters, in plain loops and in frameworks."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from captum_priors import AttributionPrior, Guarded
from captum_priors.integrations import StepGuard
from captum_priors.integrations.lightning import PriorMixin
from captum_priors.penalties import l2
from tests.asserts import assert_same_state

nan = float("nan")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, 3))


def batches(n: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 8, 4, generator=generator)
    y = torch.randint(3, (n, 8), generator=generator)
    return list(zip(x, y, strict=True))


def with_nan(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x = batch[0].clone()
    x[3, 1] = nan
    return x, batch[1]


def root(attributions: Tensor) -> Tensor:
    """Finite at zero, and its gradient is not."""
    return attributions.square().flatten(1).sum(1).sqrt()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    penalty: Any = l2,
    micro_batches: int = 1,
    closure: bool = False,
) -> None:
    prior = 0.5 * AttributionPrior(Saliency(model), penalty)
    for i in range(0, len(data), micro_batches):

        def compute(first: int = i) -> Tensor:
            optimizer.zero_grad()
            for x, y in data[first : first + micro_batches]:
                loss = F.cross_entropy(model(x), y) + prior(x, target=y)
                loss.backward()
            return loss

        if closure:
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_skipped_step_is_as_if_the_batch_had_not_been(
    kind: str, closure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Parameters, the optimizer's state and BatchNorm's statistics, bit-identically."""
    ends = []
    for spoil in (False, True):
        model = net()
        optimizer = OPTIMIZERS[kind](model.parameters())
        guard = StepGuard(optimizer, "skip", model=model)
        data = batches()
        if spoil:
            data[2:2] = [with_nan(data[0])]
        with caplog.at_level(logging.WARNING, "captum_priors"):
            train(model, optimizer, data, closure=closure)
        assert guard.skipped == spoil
        ends.append({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})
    assert_same_state(*ends)
    assert "Step skipped, 1 so far. norm of the gradient: expected a finite number, found nan, not "
    assert "finite for 6 of 6 parameters (0.weight). Look at the batch" in caplog.text


def test_without_a_guard_the_parameters_are_poisoned() -> None:
    model = net()
    data = [batches()[0], with_nan(batches()[0])]
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    assert not model[0].weight.isfinite().any()


def test_step_raises_before_anything_changes() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    StepGuard(optimizer, model=model)
    train(model, optimizer, batches())
    before = copy.deepcopy(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    )
    text = r"norm of the gradient: expected a finite number, found nan, not finite for 6 of 6"
    with pytest.raises(FloatingPointError, match=text):
        train(model, optimizer, [with_nan(batches()[0])])
    assert_same_state(
        before, {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    )


def test_one_bad_micro_batch_skips_its_step() -> None:
    ends = []
    for data in (batches()[:2], [*batches()[:2], batches()[2], with_nan(batches()[3])]):
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        guard = StepGuard(optimizer, "skip", model=model)
        train(model, optimizer, data, micro_batches=2)
        ends.append(model.state_dict())
    assert guard.skipped == 1
    assert_same_state(*ends)


def test_finite_penalty_whose_gradient_is_not() -> None:
    """The guard of the prior lets it pass; that of the step does not."""
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    x, y = batches()[0]
    prior = Guarded(
        AttributionPrior(
            Saliency(
                model,
            ),
            root,
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(optimizer, "skip")
    value = prior(x, target=y)
    assert value.item() == 0
    (F.cross_entropy(model(x), y) + value).backward()
    assert model.bias.grad.isfinite().all()
    assert not model.weight.grad.isfinite().any()
    optimizer.step()
    assert (guard.skipped, model.weight.abs().max().item()) == (1, 0)


def test_gradient_beyond_the_limit() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(optimizer, max_norm=1e-3)
    text = r"expected a finite number of at most 0\.001, found [0-9.]+\. Look at the batch"
    with pytest.raises(FloatingPointError, match=text):
        train(model, optimizer, batches())
    guard.remove()
    train(model, optimizer, batches())


def test_training_that_has_died_does_not_go_on() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(optimizer, "skip", model=model, patience=3)
    bad, good = with_nan(batches()[0]), batches()[0]
    train(model, optimizer, [bad, bad, good, bad, bad])
    assert guard.skipped == 4
    with pytest.raises(FloatingPointError, match=r"^3 steps in a row were skipped\. norm of the"):
        train(model, optimizer, [bad])


def test_parameters_without_gradients_and_sparse_ones() -> None:
    table, unused = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*table.parameters(), *unused.parameters()], lr=0.1)
    guard = StepGuard(optimizer, "skip")
    optimizer.step()
    table(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = table.weight.clone()
    (table(torch.tensor([1, 3])) * nan).sum().backward()
    optimizer.step()
    assert guard.skipped == 1
    assert torch.equal(table.weight, before)


def test_scaler_keeps_the_steps_that_it_skips() -> None:
    """A fused optimizer is stepped by a GradScaler although it found an overflow."""
    model = net()
    optimizer = OPTIMIZERS["fused"](model.parameters())
    guard = StepGuard(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model[0].weight)
    scaler.scale(model(with_nan(batches()[0])[0]).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[0].weight, before)
    assert (guard.skipped, scaler.get_scale()) == (0, 2.0)


def test_limit_holds_under_a_scaler_too() -> None:
    """Gradients are still scaled when a fused optimizer steps."""
    for fused in (False, True):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
        guard = StepGuard(optimizer, "skip", max_norm=1e3)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = copy.deepcopy(model[0].weight)
        for size, skipped in ((1e6, 1), (1.0, 1)):
            optimizer.zero_grad()
            scaler.scale(size * model(batches()[0][0]).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert guard.skipped == skipped
            assert torch.equal(model[0].weight, before) == (size > 1)


def test_statistics_are_those_of_a_model_that_was_loaded_or_moved() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(optimizer, "skip", model=model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["1.running_mean"] += 5
    model.load_state_dict(state)
    x, y = with_nan(batches()[0])
    train(model, optimizer, [(x, y)])
    assert torch.equal(model[1].running_mean, state["1.running_mean"])
    model.float()  # other tensors in their place
    train(model, optimizer, [(x.float(), y)])
    assert guard.skipped == 2
    assert model[1].running_mean.isfinite().all()
    pickle.dumps(model)


def test_half_precision_does_not_overflow_in_the_norm() -> None:
    weight = nn.Parameter(torch.zeros(300, 300, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    guard = StepGuard(optimizer, "skip")
    weight.grad = torch.full_like(weight, 300.0)
    optimizer.step()
    assert guard.skipped == 0


class Guarding(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.guard = StepGuard(optimizer, "skip", model=self.net)
        return optimizer


class GuardingPrior(PriorMixin, Guarding):
    def __init__(self) -> None:
        super().__init__()
        self.prior = AttributionPrior(Saliency(self.net), l2)


def test_lightning_whose_closure_computes_the_gradients() -> None:
    ends = []
    for data in (batches(), [*batches()[:2], with_nan(batches()[0]), *batches()[2:]]):
        module = GuardingPrior()
        loader: DataLoader[Any] = DataLoader(data, batch_size=None)
        Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, loader)
        ends.append(module.net.state_dict())
    assert module.guard.skipped == 1
    assert_same_state(*ends)


def test_hugging_face_by_a_callback(tmp_path: Path) -> None:
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    class Guard(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.guard = StepGuard(kwargs["optimizer"], "skip", model=kwargs["model"])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.net(x), labels)}

    x, y = with_nan(batches()[0])
    data = [{"x": a, "labels": int(b)} for a, b in zip(x, y, strict=True)]
    model, callback = Model(), Guard()
    options = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
    )
    HFTrainer(model, options, train_dataset=data, callbacks=[callback]).train()
    assert callback.guard.skipped == 1
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_bad_arguments_are_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"`optimizer`: expected a torch.optim.Optimizer, found"):
        StepGuard(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"`on_nonfinite`: expected one of 'raise', 'skip'"):
        StepGuard(optimizer, "ignore")
    with pytest.raises(ValueError, match=r"`max_norm`: expected a positive finite number, found 0"):
        StepGuard(optimizer, max_norm=0)
    with pytest.raises(ValueError, match=r"`patience`: expected an integer of at least 1, found 0"):
        StepGuard(optimizer, patience=0)
    optimizer.step()  # none of them was left on it
