"""Parts done in a process that may die of them: a sample that kills it is found, and set apart as a failure.

A part whose process died is done again in pieces, and a piece that kills its process in smaller ones, down to single
samples. Only a sample that killed its process twice, alone, is set apart; the part is then done as if that sample could
not be read. So the other rows are those of a run without it, bit for bit, and what kills a process once, from outside,
costs time but no sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from rollout.cohort.child import Request
from rollout.cohort.plan import Plan
from rollout.cohort.process import Died, Process
from rollout.cohort.work import Part
from rollout.errors import CohortError

PIECES = 64
"""Pieces a part is cut into, and a piece again: more of them take longer to do, but fewer processes die."""

WHOLE = 3
"""Times a part may kill its process, though none of its samples alone does, before its batches are made smaller."""

IN_A_ROW = 60
"""Deaths after one another, no part and no piece of one done in between, that end a run."""

DEATHS = 1000
"""Deaths in one part that end a run."""


class Doer:
    """Does parts in a process.

    Args:
        process: Started, and started again, by what it is asked.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self._in_a_row = self._deaths = 0
        self._how = ""

    def do(self, number: int, stopped: Callable[[], bool] = lambda: False) -> Part:
        """Do a part, whatever its samples do to the process.

        `record["notes"]` says what had to be done about it.

        Args:
            number: Of the part.
            stopped: As `Process.ask` has it.

        Raises:
            CohortError: If no end of the deaths is in sight, or no process can be started.
            Stopped: As `Process.ask` has it.
        """
        plan = self.process.packed.plan
        numbers = plan.parts(self.process.packed.samples)[number]
        poison: dict[int, str] = {}
        unexplained = self._deaths = 0
        while (part := self._try(Request(number, plan, poison), stopped)) is None:
            found = self._hunt(number, [sample for sample in numbers if sample not in poison], stopped)
            poison |= found
            unexplained += not found
            if unexplained >= WHOLE:
                plan = self._smaller(number, plan)
                unexplained = WHOLE - 1
        part.record["notes"] = self._notes(number, poison, None if plan == self.process.packed.plan else plan)
        return part

    def _try(self, request: Request, stopped: Callable[[], bool]) -> Part | None:
        """The part, or None if the process died."""
        try:
            part = self.process.ask(request, stopped)
        except Died as death:
            self._how = str(death)
            self._deaths += 1
            self._in_a_row += 1
            if self._in_a_row >= IN_A_ROW or self._deaths >= DEATHS:
                raise self._hopeless(request.number) from None
            return None
        self._in_a_row = 0
        return part

    def _hunt(self, number: int, samples: Sequence[int], stopped: Callable[[], bool]) -> dict[int, str]:
        """Sample → reason, of those that kill their process twice, alone."""
        plan = self.process.packed.plan
        found: dict[int, str] = {}
        for piece in _pieces(samples):
            request = Request(number, plan, only=piece)
            if self._try(request, stopped) is not None:
                continue
            if len(piece) > 1:
                found |= self._hunt(number, piece, stopped)
            elif self._try(request, stopped) is None:
                found[piece[0]] = f"its process {self._how}, twice, with this sample alone"
        return found

    def _smaller(self, number: int, plan: Plan) -> Plan:
        """Half the batches: those the system has no memory for kill their process, too."""
        if plan.batch_tokens == plan.batch_samples == 1:
            raise self._hopeless(number)
        return replace(plan, batch_tokens=max(1, plan.batch_tokens // 2), batch_samples=max(1, plan.batch_samples // 2))

    def _hopeless(self, number: int) -> CohortError:
        return CohortError(
            f"attribute_cohort: worker processes keep dying: {self._in_a_row} in a row, {self._deaths} on part "
            f"{number}; the last one {self._how}. That is more than single samples. What is written so far is good; "
            "the same call goes on"
        )

    def _notes(self, number: int, poison: dict[int, str], smaller: Plan | None) -> list[str]:
        notes = []
        if poison:
            named = ", ".join(map(str, sorted(poison)))
            notes.append(
                f"part {number}: each of these samples killed its process, and the others were cut into batches "
                f"without them: {named}"
            )
        if smaller is not None:
            notes.append(
                f"part {number}: its process {self._how}, though none of its samples does so alone; it was done in "
                f"batches of at most {smaller.batch_samples} samples and {smaller.batch_tokens} tokens"
            )
        return notes


def _pieces(samples: Sequence[int]) -> list[Sequence[int]]:
    """The samples in at most `PIECES` runs of nearly equal length."""
    count = min(PIECES, len(samples))
    ends = [len(samples) * place // count for place in range(count + 1)] if count else []
    return [samples[start:stop] for start, stop in pairwise(ends)]
