"""Two processes train as one does, or are told why they would not."""

from typing import Any

import pytest

from tests.integrations.launch import results_of
from tests.integrations.two_processes import CASES

# The same sums in another order, in float64, with attributions by finite differences among them.
ROUNDING = 1e-12


@pytest.fixture(scope="session")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Any:
    """Results on both processes of the cases asked for, computed once for all test processes."""
    asked = (getattr(item, "callspec", None) for item in request.session.items)
    names = {call.params["name"] for call in asked if call and call.params.get("name") in CASES}
    return results_of("two_processes", tmp_path_factory, worker_id, sorted(names))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in CASES.items() if not row.refused])
def test_as_one_process(name: str, found: list[dict[str, Any]]) -> None:
    """After training, the parameters are those of one process; else each fact holds."""
    for each in found:
        result = each[name]
        if "error" in result:
            assert result["error"] <= ROUNDING
            assert result["apart"] == 0
        else:
            assert result == dict.fromkeys(result, True)
            assert result


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in CASES.items() if row.refused])
def test_refused_with_the_pattern_that_works(name: str, found: list[dict[str, Any]]) -> None:
    for each in found:  # on both: neither is left waiting
        assert "message" in (each[name] or {}), "it went on"
        assert str(CASES[name].refused) in each[name]["message"]
