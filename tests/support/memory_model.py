"""What the programs of one launch may see of one another's memory: races and stale reads in a log of accesses.

Happens-before by vector clocks, after the memory model of PTX, with the threads of a program in mind. An atomic is made
by one thread. So a release publishes what its program did before its last barrier, not what the other threads may
still be doing; what an acquire takes over holds for the program after its next barrier; and two accesses of one
program are in order when a barrier stands between them. An atomic that is not a release hands on what earlier ones
published (a release sequence).

Two accesses of a byte race when one of them writes, one of them is no atomic, and neither happens before the other.
A read through the first-level cache of what another program wrote in the same launch is stale even then: that cache
is not kept coherent, and only what the compiler makes of the acquire stands between. This project asks for `.cg`.

Whether a race is found does not hang on the turns that programs took, only on which accesses there were.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


class Fault(AssertionError):
    """What a schedule brought to light."""


class Race(Fault):
    """Two programs touch the same memory, one of them writes, and nothing orders them."""


class StaleRead(Fault):
    """A read that may be served from the first-level cache of memory that another program wrote."""


@dataclass(frozen=True, slots=True)
class Event:
    """One access of one program, or a barrier of its threads.

    Attributes:
        addresses: int64 [n], where each element begins.
        size: bytes of an element.
        cached: a load that may be served from the first-level cache.
        where: the line of the kernel.
    """

    program: int
    kind: Literal["load", "store", "atomic", "barrier"]
    addresses: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    size: int = 1
    cached: bool = False
    acquire: bool = False
    release: bool = False
    where: str = ""

    @property
    def span(self) -> np.ndarray:
        """int64 [n·size], every byte."""
        return (self.addresses[:, None] + np.arange(self.size)).ravel()


class Clocks:
    """What each program knows of the others: the epoch of each, counted in barriers from 1, up to which its accesses
    happen before the program's next one."""

    def __init__(self, programs: int) -> None:
        self.known = np.zeros((programs, programs), np.int64)
        np.fill_diagonal(self.known, 1)  # on the diagonal, the epoch that a program is in
        self.acquired = np.zeros_like(self.known)  # to be known after the next barrier
        self.publishable = np.zeros_like(self.known)  # what was known, and done, at the last barrier
        self.published: dict[int, np.ndarray] = {}  # by the address of an atomic

    def epoch(self, program: int) -> int:
        return int(self.known[program, program])

    def before(self, program: int) -> np.ndarray:
        """int64 [programs]: the last epoch of each that happens before this program's next access."""
        seen = self.known[program].copy()
        seen[program] = self.publishable[program, program]  # other threads of its own: up to the barrier
        return seen

    def barrier(self, program: int) -> None:
        known = np.maximum(self.known[program], self.acquired[program])
        self.publishable[program] = known
        known[program] += 1
        self.known[program] = known

    def atomic(self, event: Event) -> None:
        for address in event.addresses.tolist():
            handed_on = self.published.get(address, np.zeros(len(self.known), np.int64))
            if event.acquire:
                np.maximum(self.acquired[event.program], handed_on, out=self.acquired[event.program])
            if event.release:
                self.published[address] = np.maximum(handed_on, self.publishable[event.program])


class Bytes:
    """For each byte that the launch writes, the epoch in which each program last loaded, stored or atomically changed
    it; 0: never."""

    def __init__(self, written: np.ndarray, programs: int) -> None:
        self.addresses = written
        self.last = {kind: np.zeros((len(written), programs), np.int32) for kind in ("load", "store", "atomic")}

    def of(self, event: Event) -> np.ndarray:
        """Indices of those bytes that an event touches."""
        span = event.span
        places = np.searchsorted(self.addresses, span)
        places[places == len(self.addresses)] = 0
        return places[self.addresses[places] == span]


CONFLICTS = {"load": ("store", "atomic"), "store": ("store", "atomic", "load"), "atomic": ("store", "load")}


def check(events: list[Event], programs: int, describe: Callable[[int], str] = hex) -> None:
    """Goes through a launch's log, in the order in which it happened.

    Args:
        events: of every program of the launch.
        programs: how many there are.
        describe: names an address, for the message.

    Raises:
        Race, StaleRead: the first one.
    """
    writes = [event.span for event in events if event.kind in ("store", "atomic")]
    if not writes:
        return
    memory, clocks = Bytes(np.unique(np.concatenate(writes)), programs), Clocks(programs)
    for number, event in enumerate(events):
        if event.kind == "barrier":
            clocks.barrier(event.program)
            continue
        places = memory.of(event)
        before = clocks.before(event.program)
        for kind in CONFLICTS[event.kind]:
            place, other = np.nonzero(memory.last[kind][places] > before)
            if len(place):
                found = _pair(events[:number], event, kind, int(memory.addresses[places[place[0]]]), int(other[0]))
                raise Race(f"{found(describe)}, and nothing orders the two")
        if event.kind == "load" and event.cached:
            for kind in ("store", "atomic"):
                others = memory.last[kind][places] > 0
                others[:, event.program] = False
                place, other = np.nonzero(others)
                if len(place):
                    found = _pair(events[:number], event, kind, int(memory.addresses[places[place[0]]]), int(other[0]))
                    raise StaleRead(f"{found(describe)}, through the first-level cache, which may hold older values")
        memory.last[event.kind][places, event.program] = clocks.epoch(event.program)
        if event.kind == "atomic":
            clocks.atomic(event)


def _pair(earlier: list[Event], event: Event, kind: str, byte: int, other: int) -> Callable[..., str]:
    """The sentence about an event and the one that it meets."""
    met = next(e for e in reversed(earlier) if (e.program, e.kind) == (other, kind) and byte in e.span)
    verbs = {"load": ("loads", "loaded"), "store": ("stores", "stored"), "atomic": ("changes", "changed")}

    def sentence(describe: Callable[[int], str]) -> str:
        again = "itself" if other == event.program else f"program {other}"
        return (
            f"program {event.program} {verbs[event.kind][0]} {describe(byte)} ({event.where}), which {again} "
            f"{verbs[kind][1]} ({met.where})"
        )

    return sentence
