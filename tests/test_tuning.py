"""The gradients of a loss and of a prior, compared: by hand, without a trace, and in training."""

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from captum_priors import AttributionPrior, ExpectedGradients, Guarded, Lazy, Subsample
from captum_priors.penalties import l1, l2, outside
from captum_priors.priors import Prior
from captum_priors.stability import HessianPenalty, JacobianRegularization
from captum_priors.tuning import PriorLog, choose_weight
from tests.asserts import leaves_no_trace
from tests.cases import DIFFERENTIATIONS, Everything
from tests.integrations.launch import restarted

N_BATCHES, ROWS = 3, 6


@dataclass
class Task:
    """A model with a loss and a prior on batches of its own."""

    model: nn.Module
    prior: Prior
    batches: list[Any]
    loss: Callable[[Any], Tensor]
    arguments: Callable[[Any], dict[str, Any]]

    def report(self, prior: Prior | None = None, **options: Any) -> Any:
        options = {"prior_arguments": self.arguments, **options}
        return choose_weight(self.model, self.loss, prior or self.prior, self.batches, **options)


def _task(prior_of: Callable[[nn.Module], Prior], model: nn.Module | None = None) -> Task:
    model = model or nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batches = [(torch.randn(ROWS, 4), torch.randint(3, (ROWS,))) for _ in range(N_BATCHES)]
    return Task(
        model,
        prior_of(model),
        batches,
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        lambda batch: {"inputs": batch[0], "target": batch[1]},
    )


def _eg(model: nn.Module, way: Any = "double_backprop") -> Prior:
    explainer = ExpectedGradients(model, differentiation=way)
    return AttributionPrior(explainer, l1, baselines=torch.randn(5, 4), n_samples=2)


def _batch_norm() -> Task:
    return _task(_eg, nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))


def _frozen() -> Task:
    task = _task(_eg)
    task.model[0].requires_grad_(False)
    return task


TASKS = {
    **{way: lambda way=way: _task(lambda m: _eg(m, way)) for way in DIFFERENTIATIONS},
    "weighted": lambda: _task(lambda m: 3 * _eg(m)),
    "sum": lambda: _task(lambda m: 2 * (_eg(m) + 0.5 * JacobianRegularization(m)) + _eg(m)),
    "wrapped": lambda: _task(lambda m: Lazy(0.2 * Subsample(_eg(m), 0.5), 3)),
    "batch_norm": _batch_norm,
    "frozen": _frozen,
}


@pytest.mark.parametrize("name", TASKS)
def test_ratios_are_those_of_two_backward_passes(name: str) -> None:
    task = TASKS[name]()
    twin = copy.deepcopy(task)  # one network, which the copied loss would not share
    expected = []
    for batch in task.batches:
        sizes = []
        prior = task.prior.eval()
        for value in (task.loss(batch), prior(**task.arguments(batch))):
            task.model.zero_grad()
            value.backward()
            grads = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
            sizes.append(torch.cat(grads).norm().item())
        expected.append(sizes[1] / sizes[0])
    for buffer, value in zip(task.model.buffers(), twin.model.buffers(), strict=True):
        buffer.data.copy_(value)
    task.prior.train()
    report = task.report(target_ratio=0.3)
    assert report.ratios == pytest.approx(expected, rel=1e-9)  # sums in another order
    assert report.weight == pytest.approx(0.3 / statistics.median(expected), rel=1e-9)
    # The proposal has the ratio that was asked for.
    assert task.report(report.weight * task.prior).ratio == pytest.approx(0.3, rel=1e-9)


def test_terms_of_a_sum_are_reported_as_each_alone() -> None:
    task = _task(lambda m: 0.1 * (_eg(m) + 5 * JacobianRegularization(m)))
    report = task.report()
    for term, found in zip(task.prior.prior.terms, report.terms, strict=True):
        inner = getattr(term, "prior", term)
        alone = task.report(inner)
        assert (found.ratios, found.prior, alone.terms) == (alone.ratios, inner.formula(), ())
    assert str(report.terms[1]) in str(report)


def test_a_term_gets_what_it_takes_and_unknown_words_are_refused() -> None:
    may = torch.ones(ROWS, 4)
    may[:, 0] = 0

    def both(model: nn.Module) -> Prior:
        explainer = ExpectedGradients(model)
        told = AttributionPrior(explainer, outside, baselines=torch.randn(5, 4))
        return told + JacobianRegularization(model)

    task = _task(both)
    pair = task.arguments
    task.arguments = lambda batch: {**pair(batch), "annotation": may}
    assert all(min(term.ratios) > 0 for term in task.report().terms)
    task.arguments = lambda batch: {**pair(batch), "anotation": may}
    with pytest.raises(TypeError, match="'anotation'"):
        task.report()


def _in_training() -> tuple[Everything, Prior, DataLoader[Any]]:
    """A model with gradients, a prior with counters, and a loader that shuffles by itself."""
    model = Everything()
    data = TensorDataset(torch.randn(20, 6, 4), torch.randint(2, (20,)))
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    eg = AttributionPrior(
        ExpectedGradients(model), l2, baselines=data.tensors[0], generator=generator
    )
    prior = 0.5 * (Subsample(Guarded(eg, "skip"), 0.5) + Lazy(HessianPenalty(model, smooth=9), 2))
    x, y = next(iter(DataLoader(data, batch_size=8)))
    (F.cross_entropy(model(x), y) + prior(x, target=y)).backward()
    prior.prior.terms[1].eval()  # modes that differ stay so
    return model, prior, loader


@pytest.mark.parametrize("fails_after", [None, 0, 3])
def test_no_trace(fails_after: int | None) -> None:
    model, prior, loader = _in_training()
    model.fails_after = fails_after

    def loss(batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    place = loader.generator.get_state()
    drawn = torch.randn(3, generator=torch.Generator().set_state(place))
    with leaves_no_trace(model, prior, tensors=loader.dataset.tensors), torch.no_grad():
        if fails_after is None:
            assert len(choose_weight(model, loss, prior, loader).ratios) == 3
        else:
            with pytest.raises(RuntimeError, match="fails midway"):
                choose_weight(model, loss, prior, loader)
        model.fails_after = None
    assert torch.equal(torch.randn(3, generator=loader.generator), drawn)


@pytest.mark.parametrize("name", ["sampler", "batch_sampler"])
def test_the_generator_of_a_sampler_stays_where_it_is(name: str) -> None:
    task, generator = _task(_eg), torch.Generator()
    data = TensorDataset(*map(torch.cat, zip(*task.batches, strict=True)))
    samples: Any = RandomSampler(data, generator=generator)
    samples = BatchSampler(samples, 6, False) if name == "batch_sampler" else samples
    task.batches = DataLoader(data, **{name: samples})
    before = generator.get_state()
    task.report()
    assert torch.equal(generator.get_state(), before)


def test_batches_are_taken_one_by_one_and_no_more_than_asked_for() -> None:
    task = _task(_eg)
    endless = iter(lambda: task.batches[0], None)
    assert len(choose_weight(task.model, task.loss, task.prior, endless, n_batches=2).ratios) == 2


def test_mixed_precision_proposes_the_same() -> None:
    torch.set_default_dtype(torch.float32)
    task = _task(_eg)
    full, plain = task.report().weight, task.loss

    def half(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(batch)

    task.loss = half
    # Two layers, forward and backward, each within 2⁻⁸.
    assert task.report().weight == pytest.approx(full, rel=4 * 2**-8)
    with torch.autocast("cpu", torch.bfloat16):
        assert task.report().weight == pytest.approx(full, rel=8 * 2**-8)


class MeanOutput(Prior):
    """A prior of a user's, with the model as its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, list[bool]()

    def forward(self, inputs: Any, *_: Any, **named: Any) -> Tensor:
        self.seen.append(self.model.training)
        return self.model(inputs).square().mean()


def test_the_model_is_measured_in_the_mode_that_it_is_in() -> None:
    task = _task(MeanOutput, nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    task.report()
    task.model.eval()
    task.report()
    assert task.prior.seen == [True] * N_BATCHES + [False] * N_BATCHES
    assert task.prior.training


# ---- PriorLog -------------------------------------------------------------------------------


def _steps(task: Task, log: PriorLog | None) -> Iterator[tuple[int, Any]]:
    optimizer = torch.optim.SGD(task.model.parameters(), 0.1)
    for step in range(7):
        batch = task.batches[step % N_BATCHES]
        loss, value = task.loss(batch), task.prior(**task.arguments(batch))
        yield step, None if log is None else log(loss, value)
        optimizer.zero_grad()
        (loss + value).backward()
        optimizer.step()


@pytest.mark.parametrize("way", DIFFERENTIATIONS)
def test_log_measures_training_and_leaves_it_alone(way: Any) -> None:
    def lazy() -> Task:
        torch.manual_seed(5)
        return _task(lambda m: restarted(Lazy(_eg(m, way), 2)))

    task, twin = lazy(), lazy()
    for _ in _steps(task, None):
        pass
    log = PriorLog(twin.model, every=3)
    found = dict(_steps(twin, log))
    # Lazy has a prior at 0, 2, 4, 6: step 3 waits for the next one.
    assert {k: v for k, v in found.items() if v is not None} == log.ratios
    assert [*log.ratios] == [0, 4]
    for a, b in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)
    # At the first step it is what choose_weight measures, with the weight of Lazy.
    torch.manual_seed(5)
    task = _task(lambda m: Lazy(JacobianRegularization(m, n_samples=None), 2))
    log = PriorLog(task.model)
    next(_steps(task, log))
    assert log.ratios[0] == pytest.approx(2 * task.report(n_batches=1).ratio, rel=1e-9)


def test_log_leaves_statistics_alone_that_checkpointing_computes_again() -> None:
    found = []
    for log in (False, True):
        torch.manual_seed(5)
        model, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(ROWS, 4)
        value = checkpoint(model, x, use_reentrant=False).square().mean()
        if log:
            assert PriorLog(model)(value, 0.5 * value) == 0.5
        value.backward()
        found.append([*model.buffers(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))
