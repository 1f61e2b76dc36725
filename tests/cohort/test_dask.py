"""Dask clusters: the same rows as without, whoever is killed on the way; and every wait for one that is gone ends."""

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from rollout.cohort import CohortError, cluster
from rollout.cohort.store import Store
from tests.support import deadly, evaluated, toy_cohort
from tests.support.deadly import Deadly, wait_until, within
from tests.support.toy_cohort import Attention, contents, explain, rows

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

LIMIT = 240
"""Seconds after which a run hangs: far more than one takes."""


def attribute(out: Path, count: int = 90, **settings):
    return within(LIMIT, partial(toy_cohort.attribute, out, count, **settings))


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory):
    """Where Dask's processes write."""
    folder = str(tmp_path_factory.mktemp("dask"))
    with pytest.MonkeyPatch.context() as patch, dask.config.set(temporary_directory=folder):
        patch.setenv("DASK_TEMPORARY_DIRECTORY", folder)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("cohort") / "whole"
    attribute(out)
    return out


@pytest.fixture(scope="module")
def nannies():
    """Two worker processes that are started again when they die."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0", memory_limit=0,
        silence_logs=50,
    ) as running, distributed.Client(running) as client:  # fmt: skip
        yield client


@pytest.fixture
def threaded():
    """A cluster in this process, with one worker."""
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", silence_logs=50
    ) as running, distributed.Client(running) as client:  # fmt: skip
        yield client


def assert_equal_rows(out: Path, whole: Path) -> None:
    """The same entries; values to rounding, as a worker may have another number of threads."""
    one, other = contents(out), contents(whole)
    assert one.keys() == other.keys()
    left, right = one["attributions"], other["attributions"]
    assert left.drop("attribution").equals(right.drop("attribution"), null_equal=True)
    np.testing.assert_allclose(left["attribution"], right["attribution"], atol=1e-6)
    assert one["predictions"].drop("y_prob").equals(other["predictions"].drop("y_prob"), null_equal=True)


def slow(model, batch):
    """Slow enough for a worker to be killed at work."""
    time.sleep(0.05)
    return explain(model, batch)


def parts_done(out: Path) -> int:
    return len(list(out.glob("parts/*.json")))


def processes() -> list[psutil.Process]:
    """Those that do parts, of this process and of its workers."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just died
            if "rollout.cohort.child" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_an_evaluation_on_a_cluster(nannies, tmp_path) -> None:
    """The same rows, to rounding, and a sample that a method fails on set apart."""
    for out, client in (("here", None), ("there", nannies)):
        chosen = partial(
            evaluated.evaluate_toy, tmp_path / out, dataset=toy_cohort.Records(90, {4: "nan"}), client=client
        )
        run = within(LIMIT, chosen)
        assert (run.attributed, run.failed, run.parts) == (89, 1, 5)
    here, there = (evaluated.table(tmp_path / out) for out in ("here", "there"))
    assert here.drop("probability", "drop").equals(there.drop("probability", "drop"))
    np.testing.assert_allclose(here["drop"], there["drop"], atol=2e-6)
    failures = [evaluated.table(tmp_path / out, "failures") for out in ("here", "there")]
    assert failures[0].equals(failures[1])


def test_workers_of_this_machine(whole, tmp_path) -> None:
    out = tmp_path / "out"
    run = attribute(out, workers=2)
    assert (run.attributed, run.failed, run.parts) == (90, 0, 5)
    assert run.seconds["forward"] > 0
    assert run.peak_bytes > 50 * 2**20
    assert_equal_rows(out, whole)
    assert sorted(path.name for path in out.iterdir()) == [
        ".rollout.lock", "attributions", "manifest.json", "parts", "predictions",
    ]  # fmt: skip
    assert json.loads((out / "manifest.json").read_text())["sessions"][0]["workers"] == 2
    assert attribute(out).kept == 5


def test_a_cluster_there_is_already(whole, tmp_path, nannies) -> None:
    run = attribute(tmp_path / "out", client=nannies)
    assert (run.attributed, run.parts) == (90, 5)
    assert run.peak_bytes > 50 * 2**20
    assert_equal_rows(tmp_path / "out", whole)


def test_failures_and_poison_come_back_from_workers(tmp_path, nannies) -> None:
    """A sample that kills its process kills no worker."""
    before = nannies.run(os.getpid)
    data = Deadly(90, {24: ("explain", "killed")}, {5: "nan", 21: "unreadable", 46: "unknown code"})
    run = attribute(tmp_path / "out", client=nannies, dataset=data, collate=deadly.collate, explain=deadly.explain)
    assert run.failed == 4
    failures = rows(tmp_path / "out", "failures")
    assert failures["sample"].to_list() == [5, 21, 24, 46]
    assert failures["error"][2] == "its process was killed (signal 9, SIGKILL), twice, with this sample alone"
    assert nannies.run(os.getpid) == before
    wait_until(lambda: not processes())
    (note,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"]
    assert note.endswith("without them: 24")


@pytest.mark.parametrize("victims", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_workers_lose_nothing(whole, tmp_path, nannies, victims: int) -> None:
    """One worker killed at work; and all of them, with the only copies of the model."""
    out = tmp_path / "out"
    killed = []

    def kill() -> None:
        wait_until(lambda: parts_done(out) >= 2, LIMIT)
        for pid in list(nannies.run(os.getpid).values())[:victims]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run = attribute(out, client=nannies, explain=slow, part_samples=10)
    killer.join()
    assert len(killed) == victims
    assert (run.attributed, run.failed, run.parts) == (90, 0, 9)
    assert_equal_rows(out, whole)
    wait_until(lambda: not processes())


def broken(model, batch):
    raise ValueError("no such thing")


@pytest.mark.parametrize("good", [True, False], ids=["done", "error"])
def test_the_process_of_a_worker_ends_with_the_run(tmp_path, threaded, good: bool) -> None:
    seen = []
    watcher = threading.Thread(target=lambda: wait_until(lambda: seen.extend(processes()) or seen), daemon=True)
    watcher.start()
    if good:
        attribute(tmp_path / "out", client=threaded)
    else:
        with pytest.raises(CohortError, match="none of the first 40"):
            attribute(tmp_path / "out", client=threaded, explain=broken, part_samples=40)
    watcher.join()
    assert seen
    wait_until(lambda: not processes())


def hanging(folder: Path, model, batch) -> None:
    (folder / f"pid-{os.getpid()}").touch()
    deadly.die("hangs")


def test_an_interrupt_ends_a_part_that_hangs(tmp_path, threaded) -> None:
    """The worker is free again."""
    found = []

    def interrupt() -> None:
        wait_until(lambda: list(tmp_path.glob("pid-*")), LIMIT)
        found.extend(int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*"))
        _thread.interrupt_main()

    killer = threading.Thread(target=interrupt, daemon=True)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        toy_cohort.attribute(tmp_path / "out", client=threaded, explain=partial(hanging, tmp_path))
    killer.join()
    wait_until(lambda: not psutil.pid_exists(found[0]))
    assert threaded.submit(sum, [1, 2]).result(timeout=30) == 3


# Workers that do not come back


@contextmanager
def lone_workers(count: int):
    """A cluster in this process of workers without a nanny, each a process; gives the client and them."""
    with distributed.LocalCluster(
        n_workers=0, processes=False, dashboard_address=":0", protocol="tcp", silence_logs=50
    ) as running, distributed.Client(running) as client:  # fmt: skip
        command = [sys.executable, "-m", "distributed.cli.dask_worker", running.scheduler_address, "--no-nanny"]
        command += ["--nthreads", "1", "--no-dashboard"]
        workers = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(count)]
        try:
            wait_until(lambda: len(client.nthreads()) == count, 120)
            yield client, workers
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def test_the_run_goes_on_with_the_workers_that_are_left(whole, tmp_path, monkeypatch) -> None:
    """And ends when none is: within the limit, and what is written counts."""
    monkeypatch.setattr(cluster, "WAIT", 2)
    out, moments = tmp_path / "out", iter([1, 5])
    with lone_workers(2) as (client, workers):

        def kill() -> None:
            for worker in workers:
                moment = next(moments)
                wait_until(lambda moment=moment: parts_done(out) >= moment, LIMIT)
                worker.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with pytest.raises(CohortError, match="no Dask worker for 2 s"):
            attribute(out, client=client, explain=slow, part_samples=10)
        killer.join()
    assert 5 <= parts_done(out) < 9
    attribute(out, explain=slow, part_samples=10)
    assert_equal_rows(out, whole)


def test_a_worker_that_dies_with_the_result(tmp_path, monkeypatch) -> None:
    """Done, but not fetched: it would have to be done again, and there is nobody."""
    monkeypatch.setattr(cluster, "WAIT", 2)
    gather = cluster._Watch.gather
    with lone_workers(1) as (client, workers):

        def kill_first(watch, future):
            workers[0].kill()
            workers[0].wait()
            return gather(watch, future)

        monkeypatch.setattr(cluster._Watch, "gather", kill_first)
        with pytest.raises(CohortError, match="no Dask worker for 2 s"):
            attribute(tmp_path / "out", client=client)


def test_no_worker_at_all(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "WAIT", 1)
    with lone_workers(0) as (client, _), pytest.raises(CohortError, match="no Dask worker for 1 s"):
        attribute(tmp_path / "out", client=client)


# A scheduler that is killed


@pytest.fixture
def scheduler():
    """A process of a scheduler and its worker, and a client of it."""
    command = [sys.executable, "-m", "tests.support.dask_process"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            with distributed.Client(process.stdout.readline().strip(), timeout=60) as client:
                yield process, client
        finally:
            process.kill()


class Telling(Attention):
    """Calls back when it is copied, which is when it is sent."""

    def __deepcopy__(self, memo):
        self.tell()
        return Attention()


@pytest.mark.parametrize("moment", ["before", "sending", "at work", "fetching", "writing", "closed"])
def test_a_killed_scheduler_is_said(tmp_path, scheduler, monkeypatch, moment: str) -> None:
    process, client = scheduler
    out, settings = tmp_path / "out", {}

    def kill(*_) -> None:
        process.kill()
        process.wait()

    def kill_first(function):
        return lambda *given: (kill(), function(*given))[1]

    if moment == "before":
        kill()
    elif moment == "sending":
        settings["model"] = Telling()
        settings["model"].tell = kill
    elif moment == "at work":
        settings["explain"] = partial(hanging, tmp_path)
        threading.Thread(target=lambda: (wait_until(lambda: list(tmp_path.glob("pid-*")), LIMIT), kill())).start()
    elif moment == "fetching":
        monkeypatch.setattr(cluster._Watch, "gather", kill_first(cluster._Watch.gather))
    elif moment == "writing":
        monkeypatch.setattr(Store, "commit", kill_first(Store.commit))
    else:
        client.close()
    begun = time.monotonic()
    with pytest.raises(CohortError, match="the Dask scheduler"):
        attribute(out, client=client, **settings)
    assert time.monotonic() - begun < 100
    assert parts_done(out) == (moment == "writing")
    for path in tmp_path.glob("pid-*"):  # the process of the worker that was killed with the scheduler
        wait_until(lambda path=path: not psutil.pid_exists(int(path.name.removeprefix("pid-"))))
    assert json.loads((out / "manifest.json").read_text())["status"] == "running"
