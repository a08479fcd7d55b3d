"""Two processes train as one does, or are told why they would not."""

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.launch import results_of
from tests.integrations.two_processes import CASES

# The same sums in another order, in float64, with attributions by finite differences among them.
ROUNDING = 1e-12

_DDP = "expected DistributedDataParallel to average the gradients in the same pass"
_WRAPPER = "expected the model itself, found DistributedDataParallel"
# What is refused, by the start of its name, with a part of the reason.
REFUSED = {
    "step_with wrapper": _WRAPPER,
    "step_with": _DDP,
    "bare_explainer_static_graph": _WRAPPER,
    "undecided": r"Write captum_priors.integrations.AcrossProcesses(prior)",
    "out_of_step": "the same prior at the same step on every process",
    "joined": "found a join context",
    "another_group": "found [0, 1]. Pass the group that its wrapper was given",
    "fsdp1": "Shard it with torch.distributed.fsdp.fully_shard",
    "tensor_parallel undecided": "Pass process_group=mesh['data'].get_group()",
    "tensor_parallel double_backprop": "Use differentiation='finite_difference'",
    "tensor_parallel recompute": "Use differentiation='finite_difference'",
    "fsdp_prior_first recompute": "Evaluate the prior after the model's forward pass",
    "fsdp_prior_first finite_difference": "Evaluate the prior after the model's forward pass",
}


def refusal(name: str) -> str | None:
    if name == "joined_without":
        return None
    return next((reason for start, reason in REFUSED.items() if name.startswith(start)), None)


TRAIN = [name for name in CASES if "trains" in name and refusal(name) is None] + [
    "accumulation",
    "prior_first_under_no_sync",
    "inside_forward",
    "fsdp_shared_statistic",
    "fsdp_accumulation",
    "fsdp_two_backwards",
    "fsdp_two_terms",
    "tensor_parallel finite_difference",
    "fsdp_prior_first double_backprop",
]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[dict[str, Any]]:
    """Results of all cases on both processes, computed once for all test processes."""
    found: list[dict[str, Any]] = results_of("two_processes", tmp_path_factory, worker_id)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAIN)
def test_parameters_are_those_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each[name].get("message") is None
        assert each[name]["error"] <= ROUNDING
        assert each[name]["apart"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if refusal(name)])
def test_refused_with_the_pattern_that_works(name: str, found: list[dict[str, Any]]) -> None:
    for each in found:  # on both: neither is left waiting
        assert each[name].get("raised") in {"NotDifferentiableError", "ValueError"}
        assert refusal(name) in each[name]["message"]


@pytest.mark.slow
def test_a_statistic_of_parts_is_another(found: list[dict[str, Any]]) -> None:
    assert found[0]["gini_of_parts_differs"]["error"] > 0.01


@pytest.mark.slow
def test_running_statistics_stay_those_of_all(found: list[dict[str, Any]]) -> None:
    case = found[0]["normalisation"]
    assert case["apart"] == 0
    assert case["moved"] == 3  # one batch at each step: the attribution passes are not counted


@pytest.mark.slow
def test_uneven_numbers_of_batches(found: list[dict[str, Any]]) -> None:
    case = found[0]["joined_without"]
    assert case["apart"] == 0
    assert case["moved"] > 0.02


@pytest.mark.slow
def test_processes_draw_for_themselves(found: list[dict[str, Any]]) -> None:
    case = found[0]["draws_differ"]
    assert case["no wrapper"] == case["evaluation"] == 0  # one seed
    assert case["wrapper"] > 0
    assert case["AcrossProcesses"] > 0
    assert found[0]["fsdp_draws_differ"]["apart"] > 0


@pytest.mark.slow
def test_counters_and_streams_stay_together(found: list[dict[str, Any]]) -> None:
    assert found[0]["streams_start_together"] == {"apart": 0, "tensors": 5}
    assert found[0]["lazy_in_step"] == {"apart": 0, "due": 3}


@pytest.mark.slow
def test_nobody_waits_where_no_gradient_is_recorded(found: list[dict[str, Any]]) -> None:
    assert all(each["evaluation_on_one_process"] == {"same": True} for each in found)


@pytest.mark.slow
def test_gradients_of_a_prior_are_no_training(found: list[dict[str, Any]]) -> None:
    assert all(each["gradients_of_a_prior"] == {"found": 5} for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["double_backprop", "finite_difference"])
def test_mixed_precision_shards(way: str, found: list[dict[str, Any]]) -> None:
    # Parameters rounded to eight bits, against float64.
    assert found[0]["fsdp_mixed_precision " + way]["cosine"] > 0.995


@pytest.mark.slow
def test_what_one_process_skips_both_skip(found: list[dict[str, Any]]) -> None:
    for each in found:
        prior, step = (each[f"bad_batch_on_one_process {n}"] for n in ("Guarded", "StepGuard"))
        assert prior["skipped"] == step["skipped"] == 1
        assert prior["finite"]
        assert prior["moved"] > 0 == step["moved"]
        assert prior["apart"] == step["apart"] == 0
        assert each["fsdp_bad_batch"] == {"skipped": 1, "moved": 0}


def test_every_case_is_looked_at() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    seen = {name for name in CASES if name in TRAIN or refusal(name)}
    assert [n for n in CASES if n not in seen and f'"{n.split()[0]}' not in text] == []
