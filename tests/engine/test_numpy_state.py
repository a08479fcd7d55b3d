"""NumPy's global generator is read and put back exactly, whatever it has drawn."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from captum_priors._engine._numpy_state import NumPyState


@pytest.fixture(autouse=True)
def _own_generator() -> Iterator[None]:
    before, generator = np.random.get_state(), np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(generator)
    np.random.set_state(before)


def draws() -> list[float]:
    return [*np.random.standard_normal(3), *np.random.random(700), np.random.standard_normal()]


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: None,
        lambda: np.random.standard_normal(),  # its twin is waiting
        lambda: np.random.standard_normal(2),
        lambda: np.random.random(623 * 2),
        lambda: np.random.set_bit_generator(np.random.PCG64(1)),
    ],
)
def test_reading_moves_nothing_and_restoring_repeats(prepare: Callable[[], object]) -> None:
    np.random.seed(1)
    prepare()
    unread = np.random.get_state(legacy=False)
    expected = draws()
    np.random.set_state(unread)
    state = NumPyState.now()
    assert draws() == expected  # moves on from an unmoved generator
    state.restore()
    assert draws() == expected
    state.restore()
    assert not state.moved(NumPyState.now())


def test_a_waiting_gaussian_that_is_used_counts_as_moved() -> None:
    np.random.standard_normal()
    state = NumPyState.now()
    np.random.standard_normal()
    assert state.moved(NumPyState.now())


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "inside",
    [
        lambda: None,
        lambda: np.random.standard_normal(),
        lambda: np.random.standard_normal(2),
        lambda: np.random.random(312),  # all words, so that the position is as before
        lambda: np.random.seed(3),
    ],
)
def test_seeded_for_a_while(waits: bool, inside: Callable[[], object]) -> None:
    np.random.seed(1)
    if waits:
        np.random.standard_normal()
    unread = np.random.get_state(legacy=False)
    expected = draws()
    np.random.seed(2)
    seeded = draws()
    np.random.set_state(unread)
    state = NumPyState.before_seeding(2)
    assert draws() == seeded
    np.random.set_state(unread)
    state = NumPyState.before_seeding(2)
    inside()
    state.restore()
    assert draws() == expected


def test_another_kind_of_generator_inside_is_taken_out() -> None:
    np.random.seed(1)
    expected, generator = draws(), np.random.get_bit_generator()
    np.random.seed(1)
    state = NumPyState.before_seeding(2)
    np.random.set_bit_generator(np.random.PCG64(1))
    state.restore()
    assert np.random.get_bit_generator() is generator
    assert draws() == expected
