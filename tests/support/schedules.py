"""Programs of one launch as threads that take turns: one runs at a time, and who is next is drawn from a seed."""

import random
import threading
from collections.abc import Callable

from tests.support.memory_model import Event, Fault

SWITCHES = (0.05, 0.3, 1.0)  # how often a program gives its turn away at an access; one of them to a schedule
PATIENCE = 3  # unchanged answers to the same question before a program counts as waiting


class Deadlock(Fault):
    """Every resident program waits, and nothing they wait for can happen any more."""


class Abandoned(BaseException):
    """Unwinds a program of a launch in which another found a fault. No `Exception`: the interpreter wraps those."""


class Scheduler:
    """Runs the programs of one launch, `resident` of them at a time, started in an order that is shuffled.

    Programs differ in speed, as drawn, so that some lag far behind. A program whose questions (`asked`) keep getting
    the same answer while memory stays as it is waits; it is not drawn again before something is written, unless it
    is to be found that every program waits.

    Attributes:
        events: what the programs did, in order.
        fault: the first that was found, or whatever else a program raised.
    """

    def __init__(self, programs: int, resident: int | None, seed: int, on_turn: Callable[[int], None]) -> None:
        self.programs, self.on_turn = programs, on_turn
        self.draw = random.Random(seed)
        self.switches = self.draw.choice(SWITCHES)
        self.speeds = [0.02 + self.draw.random() ** 2 for _ in range(programs)]
        self.to_start = self.draw.sample(range(programs), programs)
        self.resident = resident or programs
        self.live: list[int] = []
        self.current = -1
        self.turns = [threading.Event() for _ in range(programs)]
        self.ended = threading.Event()
        self.events: list[Event] = []
        self.writes = 0
        self.questions: list[tuple[object, int]] = [(None, 0)] * programs  # the last one, and how often in a row
        self.fault: BaseException | None = None

    def run(self, program: Callable[[], object]) -> None:
        """Every program, each a call of `program` in its own thread. Raises what they raised first, or a fault."""
        if self.programs:
            self._start(program)
            self._hand_over()
            self.ended.wait()
        if self.fault is not None:
            raise self.fault

    def switch(self) -> None:
        """In the thread of the program whose turn it is, before an access: maybe others come first."""
        if self.draw.random() < self.switches or self._waits(self.current):
            me = self.current
            self._hand_over()
            self.turns[me].wait()
            self.turns[me].clear()
        if self.fault is not None:
            raise Abandoned
        self.on_turn(self.current)

    def wrote(self) -> None:
        """Memory has changed: those that wait may look again."""
        self.writes += 1

    def asked(self, question: object) -> None:
        """The program whose turn it is read something that others are expected to write, as one that polls does."""
        last, times = self.questions[self.current]
        question = (question, self.writes)
        self.questions[self.current] = (question, times + 1 if question == last else 1)

    def _waits(self, program: int) -> bool:
        last, times = self.questions[program]
        return times >= PATIENCE and isinstance(last, tuple) and last[1] == self.writes

    def _start(self, program: Callable[[], object]) -> None:
        while self.to_start and len(self.live) < self.resident and self.fault is None:
            number = self.to_start.pop()
            self.live.append(number)
            threading.Thread(target=self._body, args=(number, program), daemon=True).start()

    def _hand_over(self) -> None:
        ready = [number for number in self.live if not self._waits(number)]
        if not ready and self.fault is None:
            waiting = ", ".join(str(number) for number in sorted(self.live))
            self.fault = Deadlock(f"programs {waiting} wait, {len(self.to_start)} have not started")
        ready = ready or self.live
        (self.current,) = self.draw.choices(ready, [self.speeds[number] for number in ready])
        self.turns[self.current].set()

    def _body(self, number: int, program: Callable[[], object]) -> None:
        self.turns[number].wait()
        self.turns[number].clear()
        try:
            if self.fault is None:
                self.on_turn(number)
                program()
        except Abandoned:
            pass
        except BaseException as error:
            self.fault = self.fault or error
        self.live.remove(number)
        self._start(program)
        if self.live:
            self._hand_over()
        else:
            self.ended.set()
