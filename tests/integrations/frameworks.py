"""Cases of frameworks that train on two processes, with tasks of their own.

Each trains with the batches that its framework gave the processes, and is compared with one process
that has both.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from captum.attr import LayerGradientXActivation, Saliency
from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_priors import AttributionPrior, Lazy, differentiable
from captum_priors.integrations.accelerate import AcceleratedPrior
from captum_priors.integrations.huggingface import LogitsOf
from captum_priors.integrations.lightning import PriorMixin
from captum_priors.penalties import l2
from captum_priors.priors import Prior
from tests.integrations import test_huggingface as hf
from tests.integrations.scenarios import alike, case, values_of

STEPS, LR = 3, 0.3


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3))


def prior_of(model: nn.Module) -> Prior:
    """Without draws, so that one process can say the same."""
    return Lazy(AttributionPrior(Saliency(model), l2, abs=False), every=2)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8 * STEPS, 4, generator=generator)
    y = torch.randint(3, (8 * STEPS,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def compared(
    model: nn.Module,
    twin: nn.Module,
    prior: Prior,
    calls: list[dict[str, Any]],
    forward: Callable[[dict[str, Any]], Tensor],
    lr: float = LR,
) -> dict[str, float]:
    """Train the twin in one process, on the batches of both, and compare."""
    both: list[Any] = [None, None]
    dist.all_gather_object(both, calls)
    assert len(calls) == STEPS
    start, optimizer = values_of(twin), torch.optim.SGD(twin.parameters(), lr=lr)
    for parts in zip(*both, strict=True):
        call = {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
        optimizer.zero_grad()
        (F.cross_entropy(forward(call), call["target"]) + prior(**call)).backward()
        optimizer.step()
    found, expected = values_of(model), values_of(twin)
    assert float((found - start).abs().max()) > 0.1  # it trained
    return {"error": float((found - expected).abs().max()), "apart": alike(found)}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append({"inputs": batch[0], "target": batch[1]})
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=LR)


class PriorModule(PriorMixin, Module):
    def __init__(self) -> None:
        super().__init__()
        self.prior = prior_of(self.net)


@case(False)
@case(True, name="static_graph")
def lightning(static_graph: bool) -> Any:
    """The training step runs inside the wrapper's forward pass."""
    module, twin = PriorModule(), net()
    LightningTrainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(static_graph=static_graph),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data())
    return compared(
        module.net, twin, prior_of(twin), module.seen, lambda call: twin(call["inputs"])
    )


@case()
def accelerate() -> Any:
    accelerator = Accelerator(cpu=True)
    model, twin, seen = net(), net(), []
    prior = AcceleratedPrior(prior_of(model), accelerator)
    wrapped, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=LR), data()
    )
    for x, y in loader:
        seen.append({"inputs": x, "target": y})
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(wrapped(x), y) + prior(x, target=y))
        optimizer.step()
    logs: list[Any] = [None, None]
    dist.all_gather_object(logs, prior.log())
    assert logs[0] == logs[1]  # means over both
    return compared(model, twin, prior_of(twin), seen, lambda call: twin(call["inputs"]))


def words_prior(model: Any) -> Prior:
    """Without draws; attention is fused where the model trains."""
    explainer = LayerGradientXActivation(LogitsOf(model), model.bert.embeddings.word_embeddings)
    return AttributionPrior(differentiable(explainer), l2)


@case(False)
@case(True, name="static_graph")
def huggingface(static_graph: bool) -> Any:
    """The trainer hands its loss a wrapped model; the prior runs the one inside."""
    seen, model, twin = hf.Recorder(), hf.bert(), hf.bert()
    with tempfile.TemporaryDirectory() as folder:
        options = hf.arguments(
            Path(folder),
            max_steps=STEPS,
            ddp_backend="gloo",
            ddp_static_graph=static_graph,
            average_tokens_across_devices=False,
        )
        hf.PriorTrainer(
            model,
            options,
            train_dataset=hf.data(),
            prior=words_prior,
            prior_arguments=seen,
        ).train()

    def logits(call: dict[str, Any]) -> Tensor:
        out: Tensor = LogitsOf(twin)(call["inputs"], call["additional_forward_args"])
        return out

    return compared(model, twin, words_prior(twin), seen.calls, logits, lr=0.5)
