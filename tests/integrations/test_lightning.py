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
from torch.utils.data import DataLoader, TensorDataset

from captum_priors import AttributionPrior, ExpectedGradients, Lazy
from captum_priors.integrations.lightning import PriorMixin
from captum_priors.penalties import l1, l2
from captum_priors.priors import Prior
from captum_priors.tuning import PriorLog
from tests.integrations.launch import restarted

# Most of these modules have nothing to validate.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

L1, L2 = "AttributionPrior", "small"


class Classifier(LightningModule):
    """As a user has it, without a prior."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.automatic_optimization:
            self.training_step(batch, batch_idx)  # as some do; it adds no prior here
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def make_prior(net: nn.Module, every: int = 2) -> Prior:
    torch.manual_seed(4)
    background = torch.randn(7, 4)
    sparse = AttributionPrior(ExpectedGradients(net), l1, baselines=background)
    small = AttributionPrior(ExpectedGradients(net), l2, baselines=background, name="small")
    return restarted(0.5 * (sparse + Lazy(small, every=every)))


class Regularized(PriorMixin, Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.prior = make_prior(self.net)


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


class InTheStep(PriorMixin, Classifier):
    """Its own step comes before the mixin's."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = make_prior(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1]) + self.prior_loss(batch)


class Manual(PriorMixin, Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.prior = make_prior(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.manual_backward((F.cross_entropy(self.net(x), y) + self.prior_loss(batch)) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Forgetful(PriorMixin, Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.prior = make_prior(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class ForgetfulManual(Forgetful):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def states_differ(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return any(not torch.equal(value, other[name]) for name, value in a.state_dict().items())


def loader(n: int = 24) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 4, generator=generator)
    y = torch.randint(3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(**options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    few = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    return Trainer(**{**quiet, **few, "max_epochs": 2, "accumulate_grad_batches": 2, **options})


def by_hand(epochs: int = 2, micro_batches: int = 2) -> tuple[nn.Module, list[float], list[float]]:
    """The same training, written out; what the prior added, and the value of its first term."""
    net = Classifier().net
    prior = make_prior(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    added, term = [], []
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            sparse, lazy = prior.prior.terms
            first = sparse(x, target=y)
            value = 0.5 * (first + lazy(x, target=y))
            ((F.cross_entropy(net(x), y) + value) / micro_batches).backward()
            added.append(value.item())
            term.append(first.item())
            if (i + 1) % micro_batches == 0:
                optimizer.step()
                optimizer.zero_grad()
    return net, added, term


def assert_same_parameters(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    # The same operations; the terms are summed in another order.
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [Regularized, RegularizedDict, AddedOnce, InTheStep, Manual])
def test_fit_is_the_loop_written_by_hand(kind: Any) -> None:
    """Under accumulation, with validation in between, which must move nothing."""
    module = kind()
    accumulation = {"accumulate_grad_batches": 1} if kind is Manual else {}
    trainer(**accumulation).fit(module, loader(), loader(8))
    expected, added, _ = by_hand()
    assert_same_parameters(module.net, expected)
    assert added[0] > 0
    # Not a training without the prior.
    plain = Classifier()
    trainer().fit(plain, loader())
    assert (plain.net[0].weight - module.net[0].weight).abs().max() > 1e-3


def test_logger_gets_every_term(tmp_path: Path) -> None:
    module = Regularized()
    logger = CSVLogger(tmp_path)
    trainer(logger=logger, accumulate_grad_batches=1).fit(module, loader(), loader(8))
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    _, added, term = by_hand(micro_batches=1)

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
    module = kind()
    module.log_gradients_every = 5
    fitting = trainer()
    fitting.fit(module, loader())
    assert_same_parameters(module.net, by_hand()[0])
    net, (x, y) = Classifier().net, next(iter(loader()))
    log = PriorLog(net)
    first = log(F.cross_entropy(net(x), y), make_prior(net)(x, target=y))
    assert [*module._ratios.ratios] == [0, 5, 10]
    assert module._ratios.ratios[0] == pytest.approx(first, rel=1e-9)  # another order of sums
    assert fitting.logged_metrics["prior_gradient_ratio"] == module._ratios.ratios[10]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_alone_under_inference_mode(stage: str) -> None:
    module, data = Regularized(), loader(10)
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
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


# Runs that stop and go on write to folders of their own.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_checkpoint_continues_draws_and_counters(tmp_path: Path) -> None:
    whole = Regularized()

    def saving(folder: str) -> Trainer:
        keep = ModelCheckpoint(
            tmp_path / folder, filename="{step}", every_n_train_steps=3, save_top_k=-1
        )
        return trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep])

    saving("whole").fit(whole, loader())
    resumed = Regularized()
    assert states_differ(whole, resumed)
    saving("resumed").fit(resumed, loader(), ckpt_path=tmp_path / "whole" / "step=3.ckpt")
    assert not states_differ(whole, resumed)
    assert int(whole.prior.prior.terms[1].counter) == 18


@pytest.mark.parametrize("kind", [Forgetful, ForgetfulManual])
def test_step_that_goes_without_the_prior_is_refused(kind: Any) -> None:
    text = (
        r"training_step: expected the prior in the loss, found a step .*\. List PriorMixin before"
    )
    with pytest.raises(RuntimeError, match=text):
        trainer(accumulate_grad_batches=1).fit(kind(), loader(), loader(8))


def test_order_of_bases() -> None:
    with pytest.raises(TypeError, match=r"bases of Late: expected PriorMixin before .* Change"):
        type("Late", (Classifier, PriorMixin), {})


def test_the_bar_shows_the_prior_if_asked() -> None:
    class OnTheBar(Regularized):
        prior_on_bar = True

    for kind, shown in ((Regularized, set()), (OnTheBar, {"prior"})):
        fit = trainer()
        fit.fit(kind(), loader())
        assert fit.progress_bar_metrics.keys() == shown
        assert f"prior/{L2}" in fit.logged_metrics


@pytest.mark.parametrize("batch", [{"x": 1, "y": 2}, (1, 2, 3), torch.ones(2)])
def test_batches_that_are_no_pairs_name_prior_arguments(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a pair .* Override prior_arguments\(self, batc"):
        Regularized().prior_loss(batch)
