"""The parts of a cohort as tasks of a Dask cluster.

A worker is sent model and dataset once, and a part's number per task; it does the part in a process of its own and
sends back the part's files, which are written here. So the workers need not see the output folder, one that dies loses
nothing (Dask gives its tasks to another), and a sample that kills its process kills no worker.
"""

import asyncio
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from typing import Any

import torch

from rollout.cohort.child import Setting
from rollout.cohort.poison import Doer
from rollout.cohort.process import Packed, Process, Stopped, pack
from rollout.cohort.work import Part, Work
from rollout.errors import CohortError, require

WAIT = 120
"""Seconds to wait for a worker when there is none, and for an answer of the scheduler."""

LOST = 3
"""Times a part is given up by Dask, which has then seen several workers die that had it, before the run ends."""

_GOES_ON = "What is written so far is good; the same call goes on"


def run_on_client(client: Any, work: Work, numbers: Sequence[int], device: torch.device | None) -> Generator[Part]:
    """Do parts on the workers of a cluster, as many as it has while it runs; they come in any order.

    Args:
        client: A `dask.distributed.Client`.
        work: Of which cohort.
        numbers: Parts to do.
        device: Where the workers run.

    Raises:
        CohortError: If the scheduler is gone, there is no worker for `WAIT` seconds, or workers keep dying.
    """
    killed = require("distributed", "dask").KilledWorker
    watch = _Watch(client)
    watch.wait_for_workers()
    packed = pack(work)
    with _scheduler_trouble():
        shared = _share(client, packed)
    waiting = iter(numbers)
    running: dict[Any, int] = {}
    lost: dict[int, int] = {}
    try:
        while True:
            # Every worker two tasks ahead, no more: what is done and not yet written is held in memory.
            ahead = max(0, 2 * max(1, watch.workers) - len(running))
            for number in islice(waiting, ahead):
                running[_submit(client, shared, number, device)] = number
            if not running:
                return
            future = watch.wait_for_any(running)
            number = running.pop(future)
            try:
                part = watch.gather(future)
            except killed as error:
                lost[number] = lost.get(number, 0) + 1
                if lost[number] == LOST:
                    raise CohortError(f"attribute_cohort: workers keep dying on part {number}: {error}") from error
                running[_submit(client, shared, number, device)] = number
                continue
            yield part
    finally:
        with suppress(Exception):  # the scheduler may be gone
            client.cancel([*running, shared], force=True)


def _share(client: Any, packed: Packed) -> Any:
    """A future of the work. It is the result of a task, not scattered data, so that Dask can make it again when every
    worker that had it has died."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sending large graph")
        return client.submit(share, packed, pure=False)


def _submit(client: Any, shared: Any, number: int, device: torch.device | None) -> Any:
    with _scheduler_trouble():
        return client.submit(do_part, shared, number, device, pure=False)


@contextmanager
def _scheduler_trouble() -> Iterator[None]:
    """Say what it means that Dask does not answer, or not as it should: its errors are of many kinds."""
    try:
        yield
    except CohortError:
        raise
    except Exception as error:
        raise CohortError(
            f"attribute_cohort: the Dask scheduler cannot be reached, or dropped the run: {type(error).__name__}: "
            f"{error}. {_GOES_ON}"
        ) from error


class _Watch:
    """Waits on a cluster, each of which ends when the scheduler is gone, or the workers are for too long."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.workers = 0
        self._seen = time.monotonic()
        self._next_look = 0.0

    def look(self) -> None:
        """Once a second, see whether the scheduler answers and there are workers.

        Raises:
            CohortError: If not.
        """
        if self.client.status != "running":
            raise CohortError(f"attribute_cohort: the connection to the Dask scheduler is lost. {_GOES_ON}")
        now = time.monotonic()
        if now < self._next_look:
            return
        with _scheduler_trouble():
            self.workers = len(self.client.nthreads(callback_timeout=WAIT))
        now = time.monotonic()
        self._next_look = now + (1.0 if self.workers else 0.1)
        if self.workers:
            self._seen = now
        elif now - self._seen > WAIT:
            raise CohortError(f"attribute_cohort: no Dask worker for {WAIT} s. {_GOES_ON}")

    def wait_for_workers(self) -> None:
        """Until there is one."""
        self._until(lambda: self.workers > 0)

    def wait_for_any(self, futures: Iterable[Any]) -> Any:
        """The first future that is done or has failed."""
        return self._until(lambda: next((future for future in futures if future.done()), None))

    def gather(self, future: Any) -> Part:
        """The result of a future that was done; its worker may die all the same, and it is made again.

        Raises:
            Exception: What the task raised.
        """
        gathering = asyncio.run_coroutine_threadsafe(
            self.client.gather([future], asynchronous=True), self.client.loop.asyncio_loop
        )
        try:
            self._until(gathering.done)
        finally:
            gathering.cancel()
        with nullcontext() if future.status == "error" else _scheduler_trouble():
            (part,) = gathering.result()
        return part

    def _until(self, look: Callable[[], Any]) -> Any:
        while not (found := look()):
            self.look()
            time.sleep(0.02)
        return found


class Shared:
    """The work on a worker, and the process that does it there.

    Args:
        packed: The work.
        key: Dask's name for it.
    """

    def __init__(self, packed: Packed, key: str) -> None:
        self.packed, self.key = packed, key
        self.one_at_a_time = threading.Lock()  # a worker with several threads has one model
        self._doer: Doer | None = None
        self._watcher: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (self.packed, self.key)

    def doer(self, device: torch.device | None, worker: Any) -> Doer:
        """What does parts here, until the worker lets go of the work."""
        if self._doer is None:
            self._doer = Doer(Process(self.packed, Setting(torch.get_num_threads(), device)))
        if self._watcher is None or not self._watcher.is_alive():
            watch = self._doer.process, worker, self.key
            self._watcher = threading.Thread(target=_kill_when_released, args=watch, daemon=True)
            self._watcher.start()
        return self._doer


def share(packed: Packed) -> Shared:
    """The work, as the result of a task."""
    return Shared(packed, _worker().get_current_task())


def do_part(shared: Shared, number: int, device: torch.device | None) -> Part:
    """Do one part, as a task.

    Args:
        shared: The work.
        number: Of the part.
        device: Where to run; None: on the CPU.
    """
    worker = _worker()
    key = worker.get_current_task()

    def cancelled() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled" or not _at_work(worker)

    with shared.one_at_a_time:
        doer = shared.doer(device, worker)
        try:
            return doer.do(number, cancelled)
        except Stopped:
            raise CohortError(f"attribute_cohort: part {number} is no longer wanted") from None


def _worker() -> Any:
    return require("distributed", "dask").get_worker()


def _at_work(worker: Any) -> bool:
    return worker.status.name in ("running", "paused")


def _kill_when_released(process: Process, worker: Any, key: str) -> None:
    """Garbage collection does not do it: Dask may hold what it has let go of for long."""
    while _at_work(worker) and key in worker.data:
        time.sleep(0.5)
    process.kill()
