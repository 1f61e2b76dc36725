"""A sample that kills its process is set apart, and nothing else: the other rows are those of a run without it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import psutil
import pytest
import torch

from rollout.cohort import CohortError, poison, process
from rollout.cohort.attributing import Attribute
from rollout.cohort.child import _do
from rollout.cohort.forks import can_fork
from rollout.cohort.plan import Plan
from rollout.cohort.poison import Doer
from rollout.cohort.process import Died, Packed
from rollout.cohort.source import open_source
from rollout.cohort.work import Work, run_parts
from tests.support import toy_cohort
from tests.support.deadly import Deadly, collate, explain, wait_until, within
from tests.support.toy_cohort import VOCABULARIES, Attention, Records, assert_same, contents, rows

KILLED = "its process was killed (signal 9, SIGKILL), twice, with this sample alone"
CRASHED = "its process was killed (signal 11, SIGSEGV), twice, with this sample alone"
EXITED = "its process ended (exit code 5), twice, with this sample alone"
LIMIT = 240
"""Seconds after which a run hangs: far more than one takes."""


@pytest.fixture(autouse=True)
def one_thread():
    """Here, as the workers have one each: the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Numbered(Records):
    """Records that know their number."""

    def __getitem__(self, number):
        return super().__getitem__(number) | {"number": torch.tensor(number)}


def collate_numbered(samples):
    return toy_cohort.collate(samples) | {"numbers": {int(sample["number"]) for sample in samples}}


def make_work(count: int = 100, unreadable=(), **plan: int) -> Work:
    data = Numbered(count, dict.fromkeys(unreadable, "unreadable"))
    source = open_source(data, collate_numbered, VOCABULARIES)
    return Work(
        Attention(), source, Attribute(toy_cohort.explain), Plan(**{"batch_tokens": 120, "part_samples": count, **plan})
    )


class Death(BaseException):
    """No error that a batch could survive."""


class Mortal:
    """Stands for a process, in this one: what would kill it is raised, and counted.

    Args:
        work: What it does.
        kills: Of the numbers of a batch: whether it kills.
    """

    def __init__(self, work: Work, kills) -> None:
        self.packed = Packed(b"", work.plan, len(work.source))
        self.deaths = 0
        self._kills, self._work = kills, replace(work, task=Attribute(self._explain))

    def _explain(self, model, batch):
        if self._kills(batch["numbers"]):
            raise Death
        return toy_cohort.explain(model, batch)

    def ask(self, request, stopped):
        try:
            return _do(self._work, request)
        except Death:
            self.deaths += 1
            raise Died("was killed (signal 9, SIGKILL)") from None


def assert_same_files(part, other) -> None:
    """The same rows, bit for bit, of the same batches."""
    assert part.record["batches"] == other.record["batches"]
    for kind in ("attributions", "predictions"):
        assert part.files[kind] == other.files[kind]


@pytest.mark.parametrize(
    "deadly",
    [{0}, {79}, {41, 42, 43}, {1, 3, 5, 7, 64, 65}, set(range(8, 28)), set(range(80))],
    ids=["first", "last", "neighbours", "spread", "a quarter", "all"],
)
def test_the_others_have_the_rows_of_a_run_without_it(monkeypatch, deadly) -> None:
    monkeypatch.setattr(poison, "IN_A_ROW", 200)
    part = Doer(Mortal(make_work(80), deadly.intersection)).do(0)
    (without,) = run_parts(make_work(80, unreadable=deadly), [0])
    assert_same_files(part, without)
    assert (part.record["failed"], part.first_failure) == (len(deadly), KILLED)
    (note,) = part.record["notes"]
    assert note.startswith("part 0: each of these samples killed its process")
    assert note.endswith(": " + ", ".join(map(str, sorted(deadly))))


def test_the_only_sample() -> None:
    part = Doer(Mortal(make_work(1), {0}.intersection)).do(0)
    assert (part.record["attributed"], part.record["failed"], part.first_failure) == (0, 1, KILLED)


def test_few_processes_die_of_one_sample() -> None:
    mortal = Mortal(make_work(640), {321}.intersection)
    assert Doer(mortal).do(0).record["failed"] == 1
    assert mortal.deaths == 4  # of the part, of a piece of 10, of the sample, and of the sample again


@pytest.mark.parametrize("moments", [{0}, {0, 3}, {1, 4, 9}, {0, 40, 41}, {5, 6}])
def test_what_kills_from_outside_sets_no_sample_apart(moments) -> None:
    """Whichever batches are at work then, and two in a row: only twice the same sample alone would count."""
    batches = iter(range(10**6))
    part = Doer(Mortal(make_work(20), lambda numbers: next(batches) in moments)).do(0)
    (unbroken,) = run_parts(make_work(20), [0])
    assert_same_files(part, unbroken)
    assert part.record["failed"] == 0
    assert part.record["notes"] == []


def test_a_sample_that_killed_once_alone_is_kept() -> None:
    times = iter([True, True, False])  # with its part, alone, alone again
    part = Doer(Mortal(make_work(20), lambda numbers: 7 in numbers and next(times, False))).do(0)
    assert part.record["failed"] == 0
    assert part.record["notes"] == []


def test_batches_that_kill_are_made_smaller() -> None:
    """As where the system has no memory for them; no sample is to blame."""
    part = Doer(Mortal(make_work(40, batch_samples=16), lambda numbers: len(numbers) > 4)).do(0)
    (smaller,) = run_parts(make_work(40, batch_samples=4, batch_tokens=30), [0])
    assert_same_files(part, smaller)
    assert part.record["failed"] == 0
    (note,) = part.record["notes"]
    assert "though none of its samples does so alone" in note
    assert "at most 4 samples and 30 tokens" in note


def test_deaths_without_end_end(monkeypatch) -> None:
    mortal = Mortal(make_work(), lambda numbers: True)
    with pytest.raises(CohortError, match=r"keep dying: 60 in a row, 60 on part 0; the last one was killed \(signal 9"):
        Doer(mortal).do(0)
    assert mortal.deaths == poison.IN_A_ROW
    monkeypatch.setattr(poison, "DEATHS", 20)
    with pytest.raises(CohortError, match="20 on part 0"):
        Doer(Mortal(make_work(), lambda numbers: any(number % 4 == 0 for number in numbers))).do(0)
    with pytest.raises(CohortError, match="15 on part 0"):  # thrice as planned, then in ever smaller batches
        Doer(MortalByThePart(make_work(5, batch_tokens=4096, batch_samples=8), lambda numbers: False)).do(0)


class MortalByThePart(Mortal):
    """Survives every piece of a part, and never the whole."""

    def ask(self, request, stopped):
        if request.only is None:
            raise Died("was killed (signal 9, SIGKILL)")
        return super().ask(request, stopped)


# With processes


def attribute(out, deadly, count: int = 60, **settings):
    chosen = {"workers": 2, "dataset": Deadly(count, deadly), "collate": collate, "explain": explain, **settings}
    return within(LIMIT, partial(toy_cohort.attribute, out, **chosen))


def processes_of(parent: int) -> list[int]:
    return [child.pid for child in psutil.Process(parent).children(recursive=True)]


@pytest.fixture
def ours():
    """Processes of this one, but for those it had before."""
    before = set(processes_of(os.getpid()))
    return lambda: [pid for pid in processes_of(os.getpid()) if pid not in before]


def test_a_sample_that_kills_its_process_is_set_apart(tmp_path, ours) -> None:
    deadly = {30: ("explain", "killed"), 31: ("collate", "segfaults"), 59: ("read", "asks to exit")}
    run = attribute(tmp_path / "out", deadly, part_samples=30)
    assert (run.attributed, run.failed, run.parts) == (57, 3, 2)
    assert rows(tmp_path / "out", "failures").rows() == [(30, KILLED), (31, CRASHED), (59, EXITED)]
    unreadable = Deadly(60, {}, dict.fromkeys(deadly, "unreadable"))
    toy_cohort.attribute(tmp_path / "without", dataset=unreadable, collate=collate, explain=explain, part_samples=30)
    for kind in ("attributions", "predictions"):
        assert rows(tmp_path / "out", kind).equals(rows(tmp_path / "without", kind), null_equal=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "complete with failures"
    assert [note.split(":")[0] for note in manifest["notes"]] == ["part 1"]
    assert not ours()
    again = attribute(tmp_path / "out", deadly, part_samples=30)
    assert (again.kept, again.failed) == (2, 3)


def slow(model, batch):
    """Slow enough for a worker to be killed at work."""
    time.sleep(0.05)
    return toy_cohort.explain(model, batch)


def test_processes_killed_from_outside_lose_nothing(tmp_path, ours) -> None:
    """All that there are, at once."""
    out, killed = tmp_path / "out", []

    def kill() -> None:
        wait_until(lambda: list(out.glob("parts/*.json")), LIMIT)
        for pid in ours():
            with suppress(ProcessLookupError):  # forks end with what they were forked from
                os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run = within(LIMIT, lambda: toy_cohort.attribute(out, explain=slow, workers=2, part_samples=10))
    killer.join()
    assert len(killed) == 2 + can_fork(None)
    assert (run.attributed, run.failed, run.parts) == (90, 0, 9)
    toy_cohort.attribute(tmp_path / "whole", part_samples=10)
    assert_same(out, tmp_path / "whole")
    assert not ours()


class Unloadable(Attention):
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (7,)

    def __deepcopy__(self, memo):
        return self


def test_a_process_that_cannot_start_is_no_matter_of_samples(tmp_path, ours, monkeypatch) -> None:
    monkeypatch.setattr(process, "STARTS", 2)
    with pytest.raises(CohortError, match=r"could not be started, 2 times: it ended \(exit code 7\)"):
        within(LIMIT, lambda: toy_cohort.attribute(tmp_path / "out", count=20, model=Unloadable(), workers=2))
    assert not ours()


def test_what_cannot_be_pickled_is_said(tmp_path) -> None:
    lock = threading.Lock()
    with pytest.raises(CohortError, match="cannot be pickled: TypeError"):
        toy_cohort.attribute(tmp_path / "out", explain=lambda model, batch: lock, workers=2)


def broken(model, batch):
    raise ValueError("no such thing")


def test_an_error_leaves_no_process(tmp_path, ours) -> None:
    with pytest.raises(CohortError, match="none of the first 40 samples"):
        within(LIMIT, lambda: toy_cohort.attribute(tmp_path / "out", 40, explain=broken, workers=2, part_samples=40))
    assert not ours()


@pytest.mark.parametrize("how", ["hangs with the lock", pytest.param("hangs", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_workers_that_hang_end_with_the_run(tmp_path, how: str, ending: signal.Signals) -> None:
    """Also where native code holds Python's lock for ever, so that no thread there can look after anything."""
    command = [sys.executable, "-m", "tests.support.hanging_run", str(tmp_path), how]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        try:
            wait_until(lambda: list(tmp_path.glob("pid-*")) or run.poll() is not None, 120)
            assert run.poll() is None, run.stderr.read()
            workers = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
            started = processes_of(run.pid)
            assert set(workers) < set(started) if can_fork(None) else workers == started
            run.send_signal(ending)
            _, said = run.communicate(timeout=60)
            assert ("KeyboardInterrupt" in said) == (ending == signal.SIGINT)
            wait_until(lambda: not any(map(psutil.pid_exists, started)), 60)
        finally:
            run.kill()
    assert contents(tmp_path / "out") == {}
