"""Frameworks on two processes train as one process does with the whole batches."""

from typing import Any

import pytest

from tests.integrations.launch import results_of

# The same sums in another order, in float64.
ROUNDING = 1e-12

CASES = [
    "huggingface",
    "huggingface static_graph",
    "accelerate",
    "lightning",
    "lightning static_graph",
]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Any]:
    """Results of all frameworks, computed once for all test processes."""
    found: dict[str, Any] = results_of("frameworks_in_two_processes", tmp_path_factory, worker_id)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_one_process(name: str, found: dict[str, Any]) -> None:
    case = found[name]
    assert case["steps"] == 3
    assert case["moved"] > 0.1
    assert case["apart"] == 0
    assert case["error"] <= ROUNDING


@pytest.mark.slow
def test_processes_that_draw_for_themselves_stay_together(found: dict[str, Any]) -> None:
    """BERT with fused attention and ``ddp_static_graph``."""
    assert found["huggingface fused"]["moved"] > 0.1
    assert found["huggingface fused"]["apart"] == 0


@pytest.mark.slow
def test_means_of_all_processes_are_logged(found: dict[str, Any]) -> None:
    assert found["accelerate"]["same_logs"]
