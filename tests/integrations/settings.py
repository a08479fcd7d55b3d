"""The settings that people train in: what holds in each, how to write it, and the test of it."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["works", "works with", "refused"]


@dataclass(frozen=True)
class Setting:
    """One row of the site's table."""

    name: str
    verdict: Verdict
    how: str
    tests: tuple[str, ...]  # in which * stands for anything

    @property
    def said(self) -> str:
        """What the table says."""
        if self.verdict == "works":
            return f"works; {self.how}" if self.how else "works"
        joint = " because " if self.verdict == "refused" else " "
        return f"{self.verdict}{joint}{self.how}"


_TWO = "tests/integrations/test_two_processes.py::"
_HERE = "tests/integrations/test_training_settings.py::"
_LIGHTNING = "tests/integrations/test_lightning.py::"
_HUGGINGFACE = "tests/integrations/test_huggingface.py::"
_ACCELERATE = "tests/integrations/test_accelerate.py::"
_GUARD = "tests/integrations/test_step_guard.py::"
_KERNELS = "tests/laws/test_kernels.py::"
_HALF = "tests/priors/test_mixed_precision.py::"
_CHECKPOINTING = "tests/priors/test_checkpointing.py::"


def _each(test: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{test}[{name}]" for name in names)


def _works(*names: str) -> tuple[str, ...]:
    """Cases on two processes that go as one process would."""
    return _each(f"{_TWO}test_as_one_process", *names)


def _refused(*names: str) -> tuple[str, ...]:
    """Cases on two processes that are refused on both."""
    return _each(f"{_TWO}test_refused_with_the_pattern_that_works", *names)


def _gradients(*names: str) -> tuple[str, ...]:
    """Gradients in a setting, in every differentiation."""
    return _each(f"{_HERE}test_gradients", *(f"{name}-*" for name in names))


SETTINGS = [
    # Several processes
    Setting(
        "`DistributedDataParallel`, also with `static_graph`, `find_unused_parameters`, "
        "`gradient_as_bucket_view`",
        "works with",
        "`ddp.module` explained and `ddp` trained, in one backward pass: "
        "`(F.cross_entropy(ddp(x), y) + prior(x, target=y)).backward()`, or all of it inside the "
        "wrapped `forward`",
        # Lightning's training step runs inside the wrapped forward.
        _works("ddp_trains *", "lightning static_graph"),
    ),
    Setting(
        "— an explainer of `ddp` itself",
        "refused",
        "each pass through it prepares its averaging anew, which with `static_graph` would stop in "
        "silence",
        _refused("wrapped static", "hidden_wrapper"),
    ),
    Setting(
        "— a second backward pass, or none through `ddp`",
        "refused",
        "processes drift apart, which `check_synchronised(model)`, called every few hundred steps, "
        "tells; the prior's own pass goes first, under `ddp.no_sync()`",
        (*_refused("drifts *"), *_works("prior_first_trains under no_sync")),
    ),
    Setting(
        "— batches of uneven size",
        "works with",
        "`prior = AcrossProcesses(prior, ddp)` and `prior.share(x) * F.cross_entropy(ddp(x), y)`",
        _works("shared_trains each uneven"),
    ),
    Setting(
        "— statistics of the batch (Gini, graph, yours)",
        "works with",
        "`AcrossProcesses(prior, ddp)`, which gathers them; without a word from you an error",
        (*_works("shared_trains g*"), *_refused("undecided_statistic")),
    ),
    Setting(
        "— `no_sync` and micro-batches",
        "works",
        "with `static_graph`, torch's first backward pass under `no_sync` fails, prior or not",
        _works("accumulation_trains"),
    ),
    Setting(
        "— `join`",
        "works",
        "but not with `AcrossProcesses`, for which those that are through would be waited",
        _works("uneven_numbers_of_batches"),
    ),
    Setting(
        "FSDP2 (`fully_shard`), any `reshard_after_forward`, also hybrid",
        "works with",
        "the prior after the model's forward pass and `with integrations.fsdp.unsharded(model): "
        "loss.backward()`, which gathers the parameters once more and keeps them to its end; "
        "without it an error",
        (
            *_works("fsdp_trains *", "fsdp_*_trains"),
            *_refused("fsdp_without_the_block *"),
        ),
    ),
    Setting(
        "— `recompute`, `finite_difference` evaluated before the forward pass",
        "refused",
        "gradients would come after they are collected",
        _refused("fsdp_prior_first_trains *"),
    ),
    Setting(
        "FSDP1 (`FullyShardedDataParallel`)",
        "refused",
        "it cannot be differentiated twice; use `fully_shard`",
        _refused("fsdp1"),
    ),
    Setting(
        "Tensor parallelism (`parallelize_module`)",
        "works with",
        "`finite_difference` and `AcrossProcesses(prior, mesh['data'])`; others are refused, "
        "because torch does not differentiate the exchange twice",
        (
            *_works("tensor_parallel_trains finite_difference"),
            *_refused("tensor_parallel_trains double_backprop", "undecided_parallelism whole"),
        ),
    ),
    # Precision
    Setting(
        "`torch.autocast` in bfloat16 or float16",
        "works",
        "input gradients below 6e-8 are lost in float16: evaluate the prior under "
        "`torch.autocast(device, enabled=False)`",
        (f"{_HALF}test_autocast*", f"{_HERE}test_small_gradients_in_float16"),
    ),
    Setting(
        "`GradScaler`",
        "works",
        "scale the sum; the prior does not see the scale",
        (f"{_HALF}test_gradients_are_proportional_to_the_scale", f"{_HALF}test_a_step_that*"),
    ),
    # Models
    Setting(
        "`torch.compile(model)`, `model.compile()`, compiled submodules",
        "works",
        "exactly: explanations run eagerly, training compiled",
        (
            f"{_KERNELS}test_compiled_models",
            f"{_KERNELS}test_ahead_of_time",
            f"{_KERNELS}test_inductor",
            f"{_KERNELS}test_training_stays_compiled",
        ),
    ),
    Setting(
        "Fused attention: `nn.TransformerEncoder`, `F.scaled_dot_product_attention`, `sdpa`",
        "works",
        "exactly: explanations run it as plain matrix products, training fused",
        (
            f"{_KERNELS}test_fused_attention",
            f"{_KERNELS}test_every_prior",
            f"{_KERNELS}test_training_stays_fused",
        ),
    ),
    Setting(
        "Activation checkpointing, `use_reentrant=False`",
        "works with",
        "`recompute` or `finite_difference`; not under `smooth`",
        (
            f"{_CHECKPOINTING}test_replaying_differentiations_hold_the_model*",
            f"{_CHECKPOINTING}test_*refuse*",
        ),
    ),
    Setting(
        "— `use_reentrant=True`",
        "refused",
        "torch gives it no gradient by inputs",
        (
            "tests/engine/test_input_gradients.py::"
            "test_reentrant_checkpointing_is_refused_and_the_other_works",
        ),
    ),
    Setting(
        "`nn.RNN`, `nn.LSTM`, `nn.GRU`",
        "works",
        "on a GPU (not yet run there) explained without cuDNN",
        (*_gradients("RNN", "LSTM", "GRU"), "tests/gpu/test_cuda.py::test_cudnn_recurrent_modules"),
    ),
    Setting(
        "BatchNorm and dropout in train mode",
        "works",
        "statistics and masks of training are untouched; the explained batch's own statistics "
        "normalise",
        (
            "tests/laws/test_batch_norm.py::test_priors_explain_the_function_that_is_trained",
            "tests/priors/test_no_trace.py::test_training_with_weight_zero_is_training_without",
            "tests/priors/test_no_trace.py::test_call_and_backward",
        ),
    ),
    # Optimisation
    Setting("Gradient clipping", "works", "", (f"{_HERE}test_gradient_clipping",)),
    Setting(
        "Gradient accumulation",
        "works",
        "a statistic of the batch is one of each micro-batch",
        (
            *_gradients("micro_batches"),
            f"{_HERE}test_accumulation_of_a_statement_about_the_batch",
        ),
    ),
    Setting(
        "EMA (`swa_utils.AveragedModel`)",
        "works",
        "explain the trained model",
        (f"{_HERE}test_exponential_moving_average",),
    ),
    # Parameters
    Setting(
        "`torch.func.functional_call`",
        "works",
        "parameters with a graph of their own with `double_backprop` only",
        (*_gradients("functional_call"), f"{_HERE}test_parameters_that_training_made"),
    ),
    Setting("Frozen backbones", "works", "", _gradients("frozen_backbone")),
    Setting("LoRA-style adapters", "works", "", _gradients("low_rank_adapters")),
    # Frameworks
    Setting(
        "Lightning, also manual optimization, accumulation, two processes",
        "works with",
        "`class Regularized(PriorMixin, Classifier)` and `self.prior = ...`",
        (
            f"{_LIGHTNING}test_fit_is_the_loop_written_by_hand",
            f"{_LIGHTNING}test_logger_gets_every_term",
            *_works("lightning", "lightning static_graph"),
        ),
    ),
    Setting(
        "— `trainer.validate()` under `inference_mode`",
        "works",
        "logged as `val_prior`",
        (f"{_LIGHTNING}test_evaluation_alone_under_inference_mode",),
    ),
    Setting(
        "— a step that goes without the prior",
        "refused",
        "the step of the class that lists `PriorMixin` comes before the mixin's: call "
        "`self.prior_loss(batch)` there",
        (f"{_LIGHTNING}test_step_that_goes_without_the_prior_is_refused",),
    ),
    Setting(
        "Hugging Face `Trainer`, also accumulation, bf16, fused attention, `ddp_static_graph`",
        "works with",
        "`class PriorTrainer(PriorTrainerMixin, Trainer)` and `prior=lambda model: ...`",
        (
            f"{_HUGGINGFACE}test_training_is_the_loop_written_by_hand",
            f"{_HUGGINGFACE}test_evaluation_reports_the_prior_and_leaves_the_loss",
            f"{_HUGGINGFACE}test_bfloat16_reaches_what_float32_does",
            *_works("huggingface", "huggingface static_graph"),
        ),
    ),
    Setting(
        "— a prior on another model, or one from before `model_init`",
        "refused",
        "it would train nothing: pass a function that makes it",
        (f"{_HUGGINGFACE}test_prior_on_another_model_is_refused",),
    ),
    Setting(
        "Accelerate, also accumulation, bf16, two processes",
        "works with",
        "`AcceleratedPrior(prior, accelerator)`",
        (
            f"{_ACCELERATE}test_loop_is_the_one_written_by_hand",
            f"{_ACCELERATE}test_mixed_precision_reaches_the_prior",
            *_works("accelerate"),
        ),
    ),
    # Faults
    Setting(
        "Resuming after a kill",
        "works with",
        "`prior.state_dict()` in the checkpoint, which the frameworks' pieces put there",
        (
            "tests/integrations/test_resume.py::test_killed_run_continues_bit_identically",
            f"{_LIGHTNING}test_checkpoint_continues_draws_and_counters",
            f"{_HUGGINGFACE}test_checkpoint_continues_draws_and_counters",
            f"{_ACCELERATE}test_checkpoint_continues_draws_and_counters",
        ),
    ),
    Setting(
        "NaN or Inf in a batch or a gradient",
        "works with",
        "`StepGuard(optimizer, 'skip', model=model)`, or `'raise'`",
        (
            f"{_GUARD}test_skipped_step_is_as_if_the_batch_had_not_been",
            f"{_GUARD}test_step_raises_before_anything_changes",
            f"{_GUARD}test_lightning_whose_closure_computes_the_gradients",
            f"{_GUARD}test_hugging_face_by_a_callback",
            *_works("bad_batch_on_one_process StepGuard", "fsdp_bad_batch"),
        ),
    ),
    Setting(
        "A penalty that is not finite, or explodes",
        "works with",
        "`Guarded(prior, 'skip', max_value=1e3)`, or `'raise'`",
        (
            "tests/priors/test_guarded.py::test_skipped_value_leaves_the_rest_of_the_step",
            "tests/priors/test_guarded.py::test_value_beyond_the_limit",
            *_works("bad_batch_on_one_process Guarded"),
        ),
    ),
    Setting(
        "Thousands of steps",
        "works",
        "",
        ("tests/priors/test_endurance.py::test_two_thousand_steps_leave_nothing_behind",),
    ),
    Setting(
        "Threads",
        "works",
        "as long as others do not draw from torch's global generators while a prior runs, which "
        "belong to the process",
        (
            "tests/priors/test_threads.py::test_each_trains_as_if_alone",
            "tests/priors/test_threads.py::test_priors_on_one_model_share_it",
        ),
    ),
]


def settings_table() -> str:
    """One row for each setting."""
    lines = ["| setting | | tests |", "|---|---|---|"]
    for row in SETTINGS:
        files = list(dict.fromkeys(test.partition("::")[0] for test in row.tests))
        shown = ", ".join(f"[{i}]({file})" for i, file in enumerate(files, 1))
        lines.append(f"| {row.name} | {row.said} | {shown} |")
    return "\n".join(lines) + "\n"
