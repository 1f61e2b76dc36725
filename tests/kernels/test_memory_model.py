"""The memory model on logs written by hand: what orders two accesses, and what does not."""

import numpy as np
import pytest

from tests.support.memory_model import Event, Race, StaleRead, check
from tests.support.schedules import Deadlock, Scheduler

DATA, FLAG, OTHER = 0x1000, 0x2000, 0x3000


def access(program: int, kind: str, address: int, size: int = 4, **known: bool) -> Event:
    return Event(program, kind, np.array([address]), size, where=f"{kind} {program}", **known)


def load(program: int, address: int = DATA, size: int = 4, cached: bool = False) -> Event:
    return access(program, "load", address, size, cached=cached)


def store(program: int, address: int = DATA, size: int = 4) -> Event:
    return access(program, "store", address, size)


def barrier(program: int) -> Event:
    return Event(program, "barrier")


def release(program: int, address: int = FLAG) -> Event:
    return access(program, "atomic", address, release=True)


def acquire(program: int, address: int = FLAG) -> Event:
    return access(program, "atomic", address, acquire=True)


def relaxed(program: int, address: int = FLAG) -> Event:
    return access(program, "atomic", address)


HANDED_OVER = [store(0), barrier(0), release(0), acquire(1), barrier(1)]
ORDERED = {
    "a hand-over": [*HANDED_OVER, load(1)],
    "a hand-over, then a write": [*HANDED_OVER, store(1)],
    "reads need no order": [load(0), load(1), store(0, OTHER)],
    "atomics do not race": [relaxed(0), relaxed(1)],
    "a relaxed change hands it on": [store(0), barrier(0), release(0), relaxed(2), acquire(1), barrier(1), load(1)],
    "through a third program": [*HANDED_OVER, release(1, OTHER), acquire(2, OTHER), barrier(2), load(2)],
    "two of one program with a barrier": [store(0), barrier(0), load(0)],
    "a write after the reads are over": [load(0), barrier(0), release(0), acquire(1), barrier(1), store(1)],
    "neighbours": [store(0, DATA, 2), store(1, DATA + 2, 2)],
}  # fmt: skip
RACES = {
    "no order at all": [store(0), load(1)],
    "two writes": [store(0), store(1)],
    "a write over a read": [load(0), store(1)],
    "a release before the barrier": [store(0), release(0), acquire(1), barrier(1), load(1)],
    "a read before the barrier": [store(0), barrier(0), release(0), acquire(1), load(1)],
    "a relaxed arrival": [store(0), barrier(0), relaxed(0), acquire(1), barrier(1), load(1)],
    "a relaxed wait": [store(0), barrier(0), release(0), relaxed(1), barrier(1), load(1)],
    "a wait for another flag": [store(0), barrier(0), release(0), acquire(1, OTHER), barrier(1), load(1)],
    "a wait that came too early": [acquire(1), barrier(1), store(0), barrier(0), release(0), load(1)],
    "what came after the release": [barrier(0), release(0), store(0), acquire(1), barrier(1), load(1)],
    "two of one program without a barrier": [store(0), load(0)],
    "an atomic and a plain write": [relaxed(0, DATA), store(1)],
    "bytes that overlap": [store(0, DATA, 4), load(1, DATA + 3, 8)],
}


@pytest.mark.parametrize("name", ORDERED)
def test_ordered(name: str) -> None:
    check(ORDERED[name], 3)


@pytest.mark.parametrize("name", RACES)
def test_races(name: str) -> None:
    with pytest.raises(Race):
        check(RACES[name], 3)


def test_a_cached_read_of_what_another_wrote_is_stale() -> None:
    with pytest.raises(StaleRead, match="program 1 loads DATA \\(load 1\\), which program 0 stored \\(store 0\\)"):
        check([*HANDED_OVER, load(1, cached=True)], 2, {DATA: "DATA"}.__getitem__)
    check([store(0), barrier(0), load(0, cached=True)], 2)  # its own
    check([load(1, OTHER, cached=True), *HANDED_OVER], 2)  # never written


def test_a_program_that_waits_is_passed_over_until_memory_changes() -> None:
    """Programs wait for a number that only program 0 counts up: each gets there, and nobody asks for ever."""
    counter, asked = [0], [0]

    def program() -> None:
        if scheduler.current == 0:
            for _ in range(5):
                scheduler.switch()
                counter[0] += 1
                scheduler.wrote()
        while counter[0] < 5:
            scheduler.switch()
            asked[0] += 1
            scheduler.asked("the counter")

    for seed in range(20):
        counter[0] = 0
        scheduler = Scheduler(6, None, seed, lambda number: None)
        scheduler.run(program)
        assert counter[0] == 5
    assert asked[0] <= 20 * 5 * 6 * 3  # patience, at every value, of every program


@pytest.mark.parametrize("resident", [1, 2])
def test_programs_that_wait_for_one_that_cannot_start_are_a_deadlock(resident: int) -> None:
    scheduler = Scheduler(4, resident, 0, lambda number: None)
    first = scheduler.to_start[:-resident]

    def program() -> None:
        while scheduler.current not in first:
            scheduler.switch()
            scheduler.asked("one of the first")

    with pytest.raises(Deadlock, match=f"{4 - resident} have not started"):
        scheduler.run(program)


def test_an_error_in_one_program_ends_all() -> None:

    def program() -> None:
        scheduler.switch()
        if scheduler.current == 2:
            raise KeyError("mine")
        while True:
            scheduler.switch()

    scheduler = Scheduler(4, None, 1, lambda number: None)
    with pytest.raises(KeyError, match="mine"):
        scheduler.run(program)
    assert not scheduler.live
