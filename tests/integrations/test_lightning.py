"""Lightning: real fits, compared with the loop that one would write by hand."""

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from captum_priors.integrations.lightning import PriorMixin
from captum_priors.tuning import PriorLog
from tests.asserts import assert_same_parameters, assert_same_state
from tests.integrations.launch import batches, by_hand, net, prior_of

# Most of these modules have nothing to validate.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

L1, L2 = "AttributionPrior", "small"


class Classifier(LightningModule):
    """As a user has it, without a prior."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def loss(self, batch: Any) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.automatic_optimization:
            self.training_step(batch, batch_idx)  # as some do; it adds no prior here
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Regularized(PriorMixin, Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.prior = prior_of(self.net)


class ReturnsDict(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": 1}


class RegularizedDict(Regularized, ReturnsDict):
    pass


class AsksForIt(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.prior_loss(batch)


class AddedOnce(Regularized, AsksForIt):
    """The mixin sees a step that has added the prior."""


class InTheStep(Regularized):
    """Its own step comes before the mixin's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + self.prior_loss(batch)


class Manual(Regularized):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.manual_backward((self.loss(batch) + self.prior_loss(batch)) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Forgetful(Regularized):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class ForgetfulManual(Forgetful):
    automatic_optimization = False


def trainer(**options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    few = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    return Trainer(**{**quiet, **few, "max_epochs": 2, "accumulate_grad_batches": 2, **options})


def expected(micro: int = 2) -> tuple[nn.Module, list[float], list[float]]:
    """The same training, written out."""
    model = net()
    calls = [{"inputs": x, "target": y} for _ in range(2) for x, y in batches(24)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    logits = lambda call: model(call["inputs"])  # noqa: E731  # of what the prior is called with
    return model, *by_hand(prior_of(model), optimizer, logits, calls, micro=micro)


# The same operations; the terms are summed in another order.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("kind", [Regularized, RegularizedDict, AddedOnce, InTheStep, Manual])
def test_fit_is_the_loop_written_by_hand(kind: Any) -> None:
    """Under accumulation, with validation in between, which must move nothing."""
    module = kind()
    accumulation = {"accumulate_grad_batches": 1} if kind is Manual else {}
    trainer(**accumulation).fit(module, batches(24), batches(8))
    twin, added, _ = expected()
    assert_same_parameters(module.net, twin, **ROUNDING)
    assert added[0] > 0
    # Not a training without the prior.
    plain = Classifier()
    trainer().fit(plain, batches(24))
    assert (plain.net[0].weight - module.net[0].weight).abs().max() > 1e-3


class Searches(Regularized):
    """Its optimizer evaluates the loss several times in each batch."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=3)


def test_each_evaluation_of_the_loss_has_the_prior() -> None:
    module, model = Searches(), net()
    trainer(max_epochs=1, accumulate_grad_batches=1).fit(module, batches(8))
    prior, optimizer = prior_of(model), torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for x, y in batches(8):

        def loss(x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y) + prior(x, target=y)
            value.backward()
            return value

        optimizer.step(loss)
    assert_same_parameters(module.net, model, **ROUNDING)


def test_logger_gets_every_term(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fitting = trainer(logger=logger, accumulate_grad_batches=1)
    fitting.fit(Regularized(), batches(24), batches(8))
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    _, added, term = expected(micro=1)

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in rows if row[name]]

    # The logger keeps single precision.
    assert column("prior") == pytest.approx(added, rel=1e-6)
    assert column(f"prior/{L1}") == pytest.approx(term, rel=1e-6)
    # Lazy evaluates each second step; Lightning logs the last value again in between.
    lazy = column(f"prior/{L2}")
    assert lazy[::2] == lazy[1::2]
    assert len(set(lazy)) == 6
    assert len(column("val_prior")) == len(column(f"val_prior/{L1}")) == 2


@pytest.mark.parametrize("kind", [Regularized, RegularizedDict])
def test_ratio_of_gradients_is_logged_and_moves_nothing(kind: Any) -> None:
    module, fitting = kind(), trainer()
    module.log_gradients_every = 5
    fitting.fit(module, batches(24))
    assert_same_parameters(module.net, expected()[0], **ROUNDING)
    model, (x, y) = net(), next(iter(batches(24)))
    first = PriorLog(model)(F.cross_entropy(model(x), y), prior_of(model)(x, target=y))
    assert [*module._ratios.ratios] == [0, 5, 10]
    assert module._ratios.ratios[0] == pytest.approx(first, rel=1e-9)  # another order of sums
    assert fitting.logged_metrics["prior_gradient_ratio"] == module._ratios.ratios[10]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_alone_under_inference_mode(stage: str) -> None:
    module, data = Regularized(), batches(10)
    before = copy.deepcopy(module.state_dict())
    seen: list[bool] = []
    module.net.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    (found,) = getattr(trainer(), stage)(module, data, verbose=False)
    assert seen[0]  # the task's own pass; the prior leaves the mode
    prefix = {"validate": "val", "test": "test"}[stage]
    module.eval()
    values = [module.prior(x, target=y).item() for x, y in data]
    mean = sum(v * n for v, n in zip(values, (4, 4, 2), strict=True)) / 10
    assert found[f"{prefix}_prior"] == pytest.approx(mean, rel=1e-6)
    assert found[f"{prefix}_prior/{L2}"] > 0
    assert_same_state(before, module.state_dict())


# Runs that stop and go on write to folders of their own.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_checkpoint_continues_draws_and_counters(tmp_path: Path) -> None:
    whole, resumed = Regularized(), Regularized()

    def saving(folder: str) -> Trainer:
        keep = ModelCheckpoint(
            tmp_path / folder, filename="{step}", every_n_train_steps=3, save_top_k=-1
        )
        return trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep])

    saving("whole").fit(whole, batches(24))
    saved = tmp_path / "whole" / "step=3.ckpt"
    saving("resumed").fit(resumed, batches(24), ckpt_path=saved)
    assert_same_state(whole.state_dict(), resumed.state_dict())
    assert int(whole.prior.prior.terms[1].counter) == 18


@pytest.mark.parametrize("kind", [Forgetful, ForgetfulManual])
def test_step_that_goes_without_the_prior_is_refused(kind: Any) -> None:
    text = r"training_step: expected the prior in the loss, found a step .*\. List PriorMixin befor"
    with pytest.raises(RuntimeError, match=text):
        trainer(accumulate_grad_batches=1).fit(kind(), batches(24), batches(8))


def test_order_of_bases() -> None:
    with pytest.raises(TypeError, match=r"bases of Late: expected PriorMixin before .* Change"):
        type("Late", (Classifier, PriorMixin), {})


def test_the_bar_shows_the_prior_if_asked() -> None:
    class OnTheBar(Regularized):
        prior_on_bar = True

    for kind, shown in ((Regularized, set()), (OnTheBar, {"prior"})):
        fit = trainer()
        fit.fit(kind(), batches(24))
        assert fit.progress_bar_metrics.keys() == shown
        assert f"prior/{L2}" in fit.logged_metrics


@pytest.mark.parametrize("batch", [{"x": 1, "y": 2}, (1, 2, 3), torch.ones(2)])
def test_batches_that_are_no_pairs_name_prior_arguments(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a pair .* Override prior_arguments\(self, batc"):
        Regularized().prior_loss(batch)
