"""Frameworks that train on two processes: what ``torchrun`` runs, writing what each found.

``python -m torch.distributed.run --nproc-per-node 2 -m
tests.integrations.frameworks_in_two_processes FILE``
"""

import json
import sys
import tempfile
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
from transformers import Trainer

from captum_priors import AttributionPrior, Lazy, differentiable
from captum_priors.integrations.accelerate import AcceleratedPrior
from captum_priors.integrations.huggingface import LogitsOf, PriorTrainerMixin
from captum_priors.integrations.lightning import PriorMixin
from captum_priors.penalties import l2
from captum_priors.priors import Prior
from tests.integrations import test_huggingface as hf

STEPS, LR = 3, 0.3


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3))


def prior_of(model: nn.Module) -> Prior:
    """Without draws, so that one process can say the same."""
    return Lazy(AttributionPrior(Saliency(model), l2, abs=False), every=2)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8 * STEPS, 4, generator=generator)
    return TensorDataset(x, torch.randint(3, (8 * STEPS,), generator=generator))


def values_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compared(model: nn.Module, twin: nn.Module, start: Tensor) -> dict[str, float]:
    """How far the processes are apart, and from one process with the whole batches."""
    found, expected = values_of(model), values_of(twin)
    both: list[Any] = [None, None]
    dist.all_gather_object(both, found)
    return {
        "apart": float((both[0] - both[1]).abs().max()),
        "error": float((found - expected).abs().max()),
        "moved": float((found - start).abs().max()),
    }


def together(call: Any) -> list[Any]:
    """What both processes saw."""
    both: list[Any] = [None, None]
    dist.all_gather_object(both, call)
    return both


def alone(steps: list[list[tuple[Tensor, Tensor]]]) -> nn.Module:
    """One process, whose batches are those of both."""
    twin = net()
    prior, optimizer = prior_of(twin), torch.optim.SGD(twin.parameters(), lr=LR)
    for parts in steps:
        x, y = (torch.cat([part[i] for part in parts]) for i in range(2))
        optimizer.zero_grad()
        (F.cross_entropy(twin(x), y) + prior(x, target=y)).backward()
        optimizer.step()
    return twin


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=LR)


class PriorModule(PriorMixin, Module):
    def __init__(self) -> None:
        super().__init__()
        self.prior = prior_of(self.net)


def lightning(*, static_graph: bool) -> Any:
    """The training step runs inside the wrapper's forward pass."""
    module = PriorModule()
    start = values_of(module.net)
    LightningTrainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(static_graph=static_graph),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(data(), batch_size=4))
    steps = [list(parts) for parts in zip(*together(module.seen), strict=True)]
    return compared(module.net, alone(steps), start) | {"steps": len(steps)}


def accelerate() -> Any:
    accelerator = Accelerator(cpu=True)
    model = net()
    start, seen = values_of(model), []
    prior = AcceleratedPrior(prior_of(model), accelerator)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    wrapped, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(data(), batch_size=4)
    )
    for x, y in loader:
        seen.append((x, y))
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(wrapped(x), y) + prior(x, target=y))
        optimizer.step()
    steps = [list(parts) for parts in zip(*together(seen), strict=True)]
    logs = together(prior.log())
    return compared(model, alone(steps), start) | {
        "steps": len(steps),
        "same_logs": logs[0] == logs[1],
    }


class PriorTrainer(PriorTrainerMixin, Trainer):
    pass


def prior_of_words(model: Any) -> Prior:
    """Without draws; it needs double backpropagation, and so attention that is not fused."""
    explainer = LayerGradientXActivation(LogitsOf(model), model.bert.embeddings.word_embeddings)
    return AttributionPrior(differentiable(explainer), l2)


def huggingface(*, static_graph: bool) -> Any:
    """The trainer hands its loss a wrapped model; the prior runs the one inside."""
    seen, model = hf.Recorder(), hf.bert(attention="eager")
    start = values_of(model)
    with tempfile.TemporaryDirectory() as folder:
        options = hf.arguments(
            Path(folder),
            max_steps=STEPS,
            ddp_backend="gloo",
            ddp_static_graph=static_graph,
            gradient_accumulation_steps=1,
            average_tokens_across_devices=False,
        )
        PriorTrainer(
            model,
            options,
            train_dataset=hf.data(),
            prior=prior_of_words,
            prior_arguments=seen,
        ).train()
    twin = hf.bert(attention="eager")
    prior, optimizer = prior_of_words(twin), torch.optim.SGD(twin.parameters(), lr=0.5)
    for parts in zip(*together(seen.calls), strict=True):
        names = parts[0].keys()
        call = {name: torch.cat([part[name] for part in parts]) for name in names}
        logits = LogitsOf(twin)(call["inputs"], call["additional_forward_args"])
        optimizer.zero_grad()
        (F.cross_entropy(logits, call["target"]) + prior(**call)).backward()
        optimizer.step()
    return compared(model, twin, start) | {"steps": len(seen.calls)}


def fused() -> Any:
    """Each process draws for itself: they stay together, and no other process can say the same."""
    model = hf.bert()
    start = values_of(model)
    with tempfile.TemporaryDirectory() as folder:
        options = hf.arguments(
            Path(folder), max_steps=STEPS, ddp_backend="gloo", ddp_static_graph=True
        )
        PriorTrainer(model, options, train_dataset=hf.data(), prior=hf.make_prior).train()
    return compared(model, model, start)


def main(path: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = {
        "huggingface": huggingface(static_graph=False),
        "huggingface static_graph": huggingface(static_graph=True),
        "huggingface fused": fused(),
        "accelerate": accelerate(),
        "lightning": lightning(static_graph=False),
        "lightning static_graph": lightning(static_graph=True),
    }
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
