"""Python's global generator is read and put back exactly, whatever it has drawn."""

import random
from collections.abc import Callable, Iterator

import pytest

from captum_priors._engine import _python_state
from captum_priors._engine._python_state import PythonState


@pytest.fixture(autouse=True)
def _own_generator() -> Iterator[None]:
    before = random.getstate()
    yield
    random.setstate(before)


@pytest.fixture(params=["memory", "functions"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "functions":
        monkeypatch.setattr(_python_state, "_address", lambda: None)
    return str(request.param)


def draws() -> list[float]:
    return [random.gauss(), random.getrandbits(7), *(random.random() for _ in range(700))]


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: None,
        lambda: random.gauss(),  # its twin is waiting
        lambda: [random.random() for _ in range(312)],  # all words used
    ],
)
def test_reading_moves_nothing_and_restoring_repeats(
    prepare: Callable[[], object], way: str
) -> None:
    random.seed(1)
    prepare()
    unread = random.getstate()
    state = PythonState.now()
    assert random.getstate() == unread
    expected = draws()
    assert PythonState.now() != state
    state.restore()
    assert random.getstate() == unread
    assert draws() == expected


def test_the_memory_is_found_on_this_python() -> None:
    assert _python_state._address() is not None
