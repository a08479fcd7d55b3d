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
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from captum_priors import AttributionPrior, Lazy, differentiable
from captum_priors.integrations.accelerate import AcceleratedPrior
from captum_priors.integrations.huggingface import LogitsOf
from captum_priors.penalties import l2
from captum_priors.priors import Prior
from tests.integrations import test_huggingface as hf
from tests.integrations import test_lightning as pl
from tests.integrations.launch import batches, net
from tests.integrations.scenarios import alike, case, values_of

STEPS, LR = 3, 0.3


def prior_of(model: nn.Module) -> Prior:
    """Without draws, so that one process can say the same."""
    return Lazy(AttributionPrior(Saliency(model), l2, abs=False), every=2)


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


class Module(pl.Regularized):
    """It keeps its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.seen = prior_of(self.net), list[dict[str, Any]]()

    def loss(self, batch: Any) -> Tensor:
        self.seen.append({"inputs": batch[0], "target": batch[1]})
        return super().loss(batch)


@case(False)
@case(True, name="static_graph")
def lightning(static_graph: bool) -> Any:
    """The training step runs inside the wrapper's forward pass."""
    module, twin, how = Module(), net(), DDPStrategy(static_graph=static_graph)
    trainer = pl.trainer(max_epochs=1, accumulate_grad_batches=1, devices=2, strategy=how)
    trainer.fit(module, batches(8 * STEPS))
    logits = lambda call: twin(call["inputs"])  # noqa: E731  # of what the prior is called with
    return compared(module.net, twin, prior_of(twin), module.seen, logits)


@case()
def accelerate() -> Any:
    accelerator = Accelerator(cpu=True)
    model, twin, seen = net(), net(), []
    prior = AcceleratedPrior(prior_of(model), accelerator)
    wrapped, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=LR), batches(8 * STEPS)
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
    how = {"prior": words_prior, "prior_arguments": seen}
    options: dict[str, Any] = {"ddp_backend": "gloo", "ddp_static_graph": static_graph}
    options |= {"average_tokens_across_devices": False, "max_steps": STEPS}
    with tempfile.TemporaryDirectory() as folder:
        hf.trainer(Path(folder), model, how, **options).train()
    return compared(model, twin, words_prior(twin), seen.calls, hf.logits_of(twin), lr=0.5)
