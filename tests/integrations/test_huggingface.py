"""Hugging Face Trainer: BERT with a prior on its word embeddings, through fused attention."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from captum_priors import AttributionPrior, LayerExpectedGradients
from captum_priors.integrations.huggingface import (
    LogitsOf,
    PriorTrainerMixin,
    classification_arguments,
)
from captum_priors.penalties import l1, outside
from captum_priors.priors import Prior
from captum_priors.tuning import PriorLog
from tests.asserts import assert_same_parameters, assert_same_state
from tests.integrations.launch import by_hand, restarted, two_terms

L1, L2 = "AttributionPrior", "small"
LENGTH = 6


class PriorTrainer(PriorTrainerMixin, Trainer):
    pass


def bert(dropout: float = 0.0, **options: Any) -> BertForSequenceClassification:
    """Without dropout, attention is fused in training, too."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    more = {"vocab_size": 20, "intermediate_size": 12, "max_position_embeddings": LENGTH}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(attn_implementation="sdpa", **{**sizes, **more, **drops, **options})
    return BertForSequenceClassification(config)


class Plain(nn.Module):
    """The same, with a forward that takes no further keywords: the trainer divides its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = bert()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        return self.inside(input_ids, attention_mask=attention_mask, labels=labels)


def words(model: Any, of: Any = LogitsOf, **way: Any) -> LayerExpectedGradients:
    """Of the words of BERT, which may be inside of something."""
    model = getattr(model, "inside", model)
    return LayerExpectedGradients(of(model), model.bert.embeddings.word_embeddings, **way)


PADDING = torch.zeros(1, LENGTH, dtype=torch.long)


def make_prior(model: Any) -> Prior:
    """Reference rows with padding, so that the mask matters; attention is fused."""
    return two_terms(words(model), baselines=PADDING, n_samples=2)


def logits_of(model: Any) -> Callable[[dict[str, Any]], Tensor]:
    """What a model says of what its prior is called with."""
    logits = LogitsOf(getattr(model, "inside", model))
    return lambda call: logits(call["inputs"], call["additional_forward_args"])


def data(n: int = 20) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 20, (n, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    ids[::2, 4:], mask[::2, 4:] = 0, 0
    return [
        {"input_ids": i, "attention_mask": m, "labels": int(i[0]) % 3}
        for i, m in zip(ids, mask, strict=True)
    ]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    simple = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    few = {"learning_rate": 0.5, "per_device_train_batch_size": 2, "logging_steps": 1}
    return TrainingArguments(str(folder), **{**quiet, **simple, **few, **options})


class Recorder:
    """The arguments of the prior, with the batches that the trainer drew."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(classification_arguments(inputs))
        return self.calls[-1]


def trainer(folder: Path, model: Any = None, how: Any = None, **options: Any) -> PriorTrainer:
    given = {"train_dataset": data(), "prior": make_prior, **(how or {})}
    return PriorTrainer(model or bert(), arguments(folder, **options), **given)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("make", "loss", "divided"),
    [
        # Its forward takes **kwargs, and its loss is a mean all the same: the trainer sums those.
        pytest.param(bert, None, False, id="takes_kwargs"),
        pytest.param(Plain, None, True, id="takes_none"),
        pytest.param(Plain, own_loss, True, id="own_loss"),
    ],
)
def test_training_is_the_loop_written_by_hand(
    make: Callable[[], Any],
    loss: Any,
    divided: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Accumulation over four micro-batches, of which the last step has two.

    The trainer divides the loss of some models by the steps and not that of others, which is said
    once; the prior is the mean over the micro-batches for all.
    """
    seen, model, twin = Recorder(), make(), make()
    how = {"compute_loss_func": loss, "prior_arguments": seen}
    run = trainer(tmp_path, model, how, gradient_accumulation_steps=4, num_train_epochs=1)
    run.train()
    assert run.state.global_step == 3
    assert len(seen.calls) == 10
    assert caplog.text.count("adds up the losses of 4 micro-batches") == (not divided)

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    added, own = by_hand(
        make_prior(twin), optimizer, logits_of(twin), seen.calls, micro=4, divided=divided
    )
    assert_same_parameters(model, twin, 1e-9, 1e-11)  # the same operations in another order
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["prior"] for entry in logs] == pytest.approx(added, rel=1e-9)
    assert [entry[f"prior/{L1}"] for entry in logs] == pytest.approx(own, rel=1e-9)
    assert min(added) > 0


@pytest.mark.parametrize(("make", "divided"), [(bert, 1), (Plain, 2)])
def test_ratio_of_gradients_is_logged_and_moves_nothing(
    make: Callable[[], Any], divided: int, tmp_path: Path
) -> None:
    seen, ends = Recorder(), []
    for every in (0, 3):
        how = {"prior_arguments": seen, "log_gradients_every": every}
        run = trainer(tmp_path, make(), how, gradient_accumulation_steps=2, max_steps=3)
        run.train()
        ends.append(run.model)
    assert_same_parameters(*ends)
    logged = [entry.get("prior_gradient_ratio") for entry in run.state.log_history[:3]]
    twin, call = make(), seen.calls[0]
    loss = F.cross_entropy(logits_of(twin)(call), call["target"]) / divided
    first = PriorLog(twin)(loss, make_prior(twin)(**call) / 2)
    # Micro-batches 0 and 3 of two in each step; single precision.
    assert logged == [pytest.approx(first, rel=1e-4), run._ratios.ratios[3], None]


def test_evaluation_reports_the_prior_and_leaves_the_loss(tmp_path: Path) -> None:
    model, held_out = bert(dropout=0.1), data(8)
    options = arguments(tmp_path, per_device_eval_batch_size=4)
    run = PriorTrainer(model, options, eval_dataset=held_out, prior=make_prior)
    found = run.evaluate()
    expected = Trainer(model, options, eval_dataset=held_out).evaluate()
    assert found["eval_loss"] == expected["eval_loss"]
    batches = [classification_arguments(run.data_collator(held_out[i : i + 4])) for i in (0, 4)]
    with torch.no_grad():
        values = [run.prior(**batch).item() for batch in batches]
    assert found["eval_prior"] == pytest.approx(sum(values) / 2)
    assert found[f"eval_prior/{L2}"] > 0  # Lazy does not skip what is looked at
    assert run.predict(held_out).metrics["test_prior"] == pytest.approx(sum(values) / 2)
    run.evaluate_prior = False
    assert not [name for name in run.evaluate() if "prior" in name]


def test_evaluation_in_between_does_not_change_training(tmp_path: Path) -> None:
    ends = []
    for strategy in ("no", "steps"):
        evaluation = {"eval_strategy": strategy, "eval_steps": 1}
        run = trainer(tmp_path, how={"eval_dataset": data(4)}, max_steps=3, **evaluation)
        run.train()
        ends.append(run.model)
    assert_same_parameters(*ends)


@pytest.mark.parametrize("resume", ["path", True])
def test_checkpoint_continues_draws_and_counters(resume: Any, tmp_path: Path) -> None:
    """Bit-identically, dropout and a shuffled epoch included."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    whole = trainer(tmp_path, bert(dropout=0.1), **saving)
    whole.train()
    resumed = trainer(tmp_path, bert(dropout=0.1), **saving)
    resumed.prior(**classification_arguments(resumed.data_collator(data(2))))  # a step ahead
    for newer in tmp_path.glob("checkpoint-[45]"):
        newer.rename(newer.with_name("newer"))
    saved = str(tmp_path / "checkpoint-3")
    resumed.train(resume_from_checkpoint=saved if resume == "path" else True)
    assert_same_parameters(whole.model, resumed.model)
    assert_same_state(whole.prior.state_dict(), resumed.prior.state_dict())


def test_checkpoint_without_a_prior_starts_it_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    options = arguments(tmp_path, **saving, max_steps=1)
    Trainer(bert(), options, train_dataset=data()).train()
    run = trainer(tmp_path, **saving, max_steps=2)
    with caplog.at_level("WARNING", "captum_priors"):
        run.train(resume_from_checkpoint=True)
    assert re.search(r"There is no .*prior_state_0\.pt: the prior starts anew", caplog.text)
    assert int(run.prior.prior.terms[1].counter) == 1


def test_prior_on_another_model_is_refused(tmp_path: Path) -> None:
    text = r"expected an explainer of the model that is trained, found one of .* prior=lambda model"
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, how={"prior": make_prior(bert())})


def test_model_init_makes_the_prior_anew(tmp_path: Path) -> None:
    options = arguments(tmp_path, max_steps=1)
    how: dict[str, Any] = {"train_dataset": data(), "prior": make_prior}
    run = PriorTrainer(model_init=lambda: bert(), args=options, **how)
    first = run.prior
    run.train()
    assert run.prior is not first
    assert int(run.prior.prior.terms[1].counter) == 1


@pytest.mark.parametrize("of", [LogitsOf, lambda model: model])
def test_pairs_of_sentences_with_an_annotation(of: Any, tmp_path: Path) -> None:
    """Token types travel with the mask, and a column that the model does not take is popped."""
    types, seen, rationales = torch.arange(LENGTH) // 3, Recorder(), list[Tensor]()
    rows = [{**row, "token_type_ids": types, "rationale": [1.0] * LENGTH} for row in data(4)]

    def marked(attributions: Tensor, *, rationale: Tensor) -> Tensor:
        rationales.append(rationale)
        return (attributions.sum(2) * rationale).square().sum(1)

    def prior(model: Any) -> Prior:
        return restarted(1.0 * AttributionPrior(words(model, of), marked, baselines=PADDING))

    def popped(batch: dict[str, Any]) -> dict[str, Any]:
        return {"rationale": batch.pop("rationale"), **seen(batch)}

    how = {"train_dataset": rows, "prior": prior, "prior_arguments": popped}
    run = trainer(tmp_path, how=how, max_steps=1, remove_unused_columns=False)
    twin = prior(copy.deepcopy(run.model))
    run.train()
    call = {**seen.calls[-1], "rationale": rationales[0]}
    assert torch.equal(call["additional_forward_args"][1], types.expand(2, -1))
    assert rationales[0].shape == (2, LENGTH)
    expected = twin(**call).item()
    assert run.state.log_history[0]["prior"] == pytest.approx(expected, rel=1e-9)
    plain = {**call, "additional_forward_args": call["additional_forward_args"][:1]}
    assert restarted(twin)(**plain).item() != pytest.approx(expected, rel=1e-3)


class Pair(nn.Module):
    """Two texts, of different lengths, through one BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert().bert
        self.head = nn.Linear(16, 3)

    def forward(self, a: Tensor, b: Tensor, labels: Any = None) -> Any:
        encoded = [self.encoder(input_ids=ids).pooler_output for ids in (a, b)]
        logits = self.head(torch.cat(encoded, 1))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_two_texts_through_one_encoder(tmp_path: Path) -> None:
    seen: list[Any] = []

    def of_both(maps: Any) -> Tensor:
        seen.append(tuple(m.shape for m in maps))
        return l1(maps)

    def prior(model: Any) -> Prior:
        explainer = LayerExpectedGradients(model, model.encoder.embeddings.word_embeddings)
        padding = (torch.zeros(1, 5).long(), torch.zeros(1, 3).long())
        return 1.0 * AttributionPrior(explainer, of_both, baselines=padding)

    def of(batch: dict[str, Any]) -> dict[str, Any]:
        return {"inputs": (batch["a"], batch["b"]), "target": batch["labels"]}

    rows = [{"a": torch.arange(5) + k, "b": torch.arange(3) + 2 * k, "labels": k} for k in (1, 2)]
    how = {"train_dataset": rows, "prior": prior, "prior_arguments": of}
    run = trainer(tmp_path, Pair(), how, max_steps=1)
    run.train()
    assert seen == [((2, 5, 8), (2, 3, 8))]
    assert run.state.log_history[0]["prior"] > 0


def test_a_missing_annotation_names_prior_arguments(tmp_path: Path) -> None:
    def prior(model: Any) -> Prior:
        return AttributionPrior(words(model), on_tags, baselines=PADDING)

    with pytest.raises(TypeError, match=r"PriorTrainer calls the prior with what `prior_arguments"):
        trainer(tmp_path, how={"prior": prior}).train()


def test_a_batch_of_another_kind_names_prior_arguments() -> None:
    with pytest.raises(ValueError, match=r"found input_values\. Pass the trainer prior_arguments="):
        classification_arguments({"input_values": torch.ones(2)})


# Mixed precision: reviews whose first token, a tag, tells the label in training.

TAGS, REVIEW, WORDS = (1, 2), 10, 24


def reviews(n: int, tag_is_right: float, seed: int) -> tuple[Tensor, Tensor]:
    """Three words of the kind that decides the label, among plain words and after the tag."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=draw)
    opinions = 3 + 4 * labels.unsqueeze(1) + torch.randint(4, (n, 3), generator=draw)
    plain = torch.randint(11, WORDS, (n, REVIEW - 4), generator=draw)
    words = torch.cat([opinions, plain], 1)
    words = words.gather(1, torch.rand(words.shape, generator=draw).argsort(1))
    right = torch.rand(n, generator=draw) < tag_is_right
    tag = torch.where(right, labels, 1 - labels).unsqueeze(1)
    return torch.cat([TAGS[0] + tag, words], 1), labels


def on_tags(attributions: Tensor, *, annotation: Tensor) -> Tensor:
    return outside(attributions.sum(-1), annotation=annotation)


def words_but_tags(inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"]
    allowed = (ids > TAGS[1]).float()
    return {**classification_arguments(inputs), "baselines": ids.roll(1, 0), "annotation": allowed}


@contextmanager
def single_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@single_precision()
def broken_shortcut(folder: Path, way: Any, weight: float, bf16: bool) -> float:
    """Accuracy where the tag is wrong, after 200 steps of two micro-batches on which it is right.

    Attention is fused and there is no dropout.
    """

    def no_tags(model: Any) -> Prior:
        explainer = words(model, differentiation=way)
        return weight * AttributionPrior(explainer, on_tags, n_samples=1)

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 2}
    more = {"vocab_size": WORDS, "intermediate_size": 64, "max_position_embeddings": REVIEW}
    model = bert(initializer_range=0.1, **sizes, **more)
    ids, labels = reviews(2000, 1.0, seed=0)
    rows = [{"input_ids": i, "labels": int(k)} for i, k in zip(ids, labels, strict=True)]
    run = trainer(
        folder,
        model,
        {"train_dataset": rows, "prior": no_tags, "prior_arguments": words_but_tags},
        max_steps=200,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=16,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        learning_rate=2e-3,
        max_grad_norm=1.0,
        logging_steps=100,
        bf16=bf16,
    )
    run.train()
    assert run.state.global_step == 200
    ids, labels = reviews(1000, 0.0, seed=1)
    with torch.no_grad():
        return (model.eval()(ids).logits.argmax(1) == labels).float().mean().item()


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What training in float32 reaches."""
    return broken_shortcut(tmp_path_factory.mktemp("float32"), "double_backprop", 1.0, bf16=False)


@pytest.mark.slow
def test_the_shortcut_is_taken_without_a_prior(in_float32: float, tmp_path: Path) -> None:
    assert broken_shortcut(tmp_path, "double_backprop", 0.0, bf16=True) < 0.1
    assert in_float32 > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("way", ["double_backprop", "finite_difference"])
def test_bfloat16_reaches_what_float32_does(way: str, in_float32: float, tmp_path: Path) -> None:
    """The trainer's bf16 with accumulation; ``prepare`` puts autocast into the model's forward."""
    assert broken_shortcut(tmp_path, way, 1.0, bf16=True) > in_float32 - 0.02
