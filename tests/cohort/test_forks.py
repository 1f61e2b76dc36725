"""Workers forked from a process that has imported once: how they end, what they compute, and where there is none."""

import os
import signal
import subprocess
import sys
from multiprocessing import Pipe

import psutil
import pytest
import torch

from rollout.cohort import forks, local, process
from rollout.cohort.forks import ForkServer, can_fork
from tests.support.deadly import Deadly, collate, explain, wait_until, within
from tests.support.toy_cohort import assert_same, attribute

LIMIT = 240
NEEDS_FORKS = pytest.mark.skipif(not can_fork(None), reason="processes are forked on Linux only")


@pytest.fixture
def starts(monkeypatch):
    """The Pythons started: what they call."""
    calls, start = [], forks.start_python

    def counted(call, descriptor, threads):
        calls.append(call)
        return start(call, descriptor, threads)

    monkeypatch.setattr(forks, "start_python", counted)
    monkeypatch.setattr(process, "start_python", counted)
    return calls


@pytest.fixture
def server(monkeypatch):
    """One that imports nothing but itself, whatever other tests have."""
    monkeypatch.setattr(forks, "IMPORTS", ())
    server = ForkServer(1)
    yield server
    server.end()


def test_where_there_are_forks():
    assert can_fork(torch.device("cpu")) == can_fork(None) == (sys.platform == "linux")
    assert not can_fork(torch.device("cuda"))
    assert not can_fork(torch.device("cuda", 1))


@NEEDS_FORKS
def test_all_workers_and_those_after_a_death_come_from_one_python(tmp_path, starts):
    data = Deadly(40, {7: ("explain", "killed"), 21: ("read", "asks to exit")})
    settings = {"dataset": data, "collate": collate, "explain": explain, "part_samples": 20}
    run = within(LIMIT, lambda: attribute(tmp_path / "out", workers=2, **settings))
    assert (run.attributed, run.failed) == (38, 2)
    assert starts == ["rollout.cohort.forks:serve_forks"]


def test_without_forks_each_worker_is_a_python_of_its_own(tmp_path, starts, monkeypatch):
    monkeypatch.setattr(local, "can_fork", lambda device: False)
    within(LIMIT, lambda: attribute(tmp_path / "out", 60, workers=2, part_samples=30))
    assert starts == ["rollout.cohort.child:serve"] * 2
    attribute(tmp_path / "whole", 60, part_samples=30)
    assert_same(tmp_path / "out", tmp_path / "whole")


@NEEDS_FORKS
def test_forks_work_with_several_threads_each(tmp_path):
    """OpenMP's threads are those of the fork: were they begun before it, this would have no end."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        within(LIMIT, lambda: attribute(tmp_path / "out", 60, workers=2, part_samples=30, explain=explain_in_parallel))
        torch.set_num_threads(2)
        attribute(tmp_path / "whole", 60, part_samples=30, explain=explain_in_parallel)
    finally:
        torch.set_num_threads(before)
    assert_same(tmp_path / "out", tmp_path / "whole")


def explain_in_parallel(model, batch):
    """As the toy cohort's, after work that more than one thread does."""
    from tests.support import toy_cohort

    assert torch.get_num_threads() == 2
    assert torch.ones(1 << 20).sqrt().sum() == 1 << 20
    return toy_cohort.explain(model, batch)


def forked(server):
    """A fork that waits for its settings, and the connection it waits on."""
    connection, other = Pipe()
    with other:
        child = server.fork(other.fileno())
    wait_until(lambda: child.poll() is not None or child._pid, LIMIT)
    return child, connection


@NEEDS_FORKS
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_fork_tells_how_it_died(server, number):
    child, _ = forked(server)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.1)
    os.kill(child._pid, number)
    assert child.wait(LIMIT) == child.poll() == -number
    child.kill()  # no process has that number any more, or another one has
    assert child.returncode == -number


@NEEDS_FORKS
def test_a_fork_ends_with_its_connection(server):
    child, connection = forked(server)
    connection.close()
    assert child.wait(LIMIT) == 1


@NEEDS_FORKS
def test_forks_end_with_their_server_and_another_server_is_started(server, starts):
    child, _ = forked(server)
    os.kill(server._running.pid, signal.SIGKILL)
    assert child.wait(LIMIT) == -signal.SIGKILL
    wait_until(lambda: not psutil.pid_exists(child._pid) or psutil.Process(child._pid).status() == "zombie")
    server._running.wait()
    other, _ = forked(server)
    assert other.poll() is None
    assert starts == ["rollout.cohort.forks:serve_forks"]
    server.end()
    assert other.wait(LIMIT) == -signal.SIGKILL


@NEEDS_FORKS
def test_a_fork_that_is_not_there_yet_can_be_killed(server):
    connection, other = Pipe()
    with other:
        child = server.fork(other.fileno())  # the server is still importing
    child.kill()
    assert child.wait(LIMIT) == -signal.SIGKILL
    connection.close()
    later, _ = forked(server)
    assert later.poll() is None
