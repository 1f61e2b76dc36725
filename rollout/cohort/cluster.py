"""The parts of a cohort as tasks of a Dask cluster: one on this machine, or one there is already.

A worker is sent model and dataset once, and a part's number per task; it sends back the part's files, which are written
here. So the workers need not see the output folder, and one that dies loses nothing: Dask gives its tasks to another.
"""

import copy
import logging
import threading
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rollout.cohort.memory import peak_memory
from rollout.cohort.work import Part, Work, run_parts
from rollout.errors import CohortError, require

WAIT = 120
"""Seconds to wait for a worker when there is none."""

_one_at_a_time = threading.Lock()


def run_on_workers(
    count: int, work: Work, numbers: Sequence[int], device: torch.device | None, scratch: Path
) -> Generator[Part]:
    """Do parts in ``count`` processes of this machine, each with its share of the threads.

    Args:
        count: Processes.
        work: Of which cohort.
        numbers: Parts to do.
        device: Where to run; with ``cuda``, worker k takes GPU k modulo their number.
        scratch: Folder the workers may write to; made and emptied by them.
    """
    distributed = require("distributed", "dask")
    threads = max(1, torch.get_num_threads() // count)
    with ExitStack() as stack:
        stack.enter_context(require("dask", "dask").config.set(_worker_environment(threads)))
        try:
            cluster = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=min(count, len(numbers)),
                    threads_per_worker=1,
                    processes=True,
                    memory_limit=0,
                    dashboard_address=None,
                    local_directory=str(scratch),
                    silence_logs=logging.ERROR,
                )
            )
        except RuntimeError as error:
            raise CohortError(
                f"attribute_cohort: the worker processes could not be started: {error}. In a script, the call must "
                'stand under `if __name__ == "__main__":`, because each worker imports the script'
            ) from error
        client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
        yield from _run(client, work, numbers, device, threads=threads, gpu_by_name=True)


def _worker_environment(threads: int) -> dict[str, Any]:
    """Dask's settings for the memory of a worker process, which make a model's forward several times slower, undone.

    A low trim threshold gives the memory of every intermediate result back to the system, to be fetched again page by
    page; and so does an arena of its own for the thread that works.
    """
    before = "distributed.nanny.pre-spawn-environ"
    return {
        f"{before}.MALLOC_TRIM_THRESHOLD_": None,
        f"{before}.MALLOC_ARENA_MAX": 1,
        **{f"{before}.{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")},
    }


def run_on_client(client: Any, work: Work, numbers: Sequence[int], device: torch.device | None) -> Generator[Part]:
    """Do parts on the workers of a cluster, as many as it has while it runs; completed parts come in any order."""
    yield from _run(client, work, numbers, device, threads=None, gpu_by_name=False)


def _run(client: Any, work: Work, numbers: Sequence[int], device: torch.device | None, **how: Any) -> Generator[Part]:
    """Keep every worker two tasks ahead, no more: what is done and not yet written is held in memory."""
    distributed = require("distributed", "dask")
    _await_worker(client)
    sent = _with_own_model(work)
    sent.model.cpu()
    shared = _share(client, sent)
    waiting = iter(numbers)
    done = distributed.as_completed(loop=client.loop)
    try:
        while True:
            ahead = 2 * max(1, len(client.nthreads()))
            for number in islice(waiting, max(0, ahead - done.count())):
                done.add(client.submit(do_part, shared, number, device, **how, pure=False))
            if not done.count():
                return
            _wait(client, done)
            yield next(done).result()
    except distributed.KilledWorker as error:
        raise CohortError(f"attribute_cohort: workers keep dying on the same part: {error}") from error
    except distributed.client.FutureCancelledError as error:
        raise CohortError(f"attribute_cohort: the Dask scheduler is gone or dropped the run: {error}") from error
    finally:
        with suppress(Exception):  # the scheduler may be gone
            client.cancel([*done.futures, shared], force=True)


def _wait(client: Any, done: Any) -> None:
    """Until a task is done.

    Raises:
        CohortError: If there has been no worker for too long.
    """
    last = time.monotonic()
    while done.is_empty():
        time.sleep(0.02)
        if client.status != "running":
            raise CohortError("attribute_cohort: the connection to the Dask scheduler is lost; the same call goes on")
        if time.monotonic() - last > 1.0:
            if not client.nthreads():
                _await_worker(client)
            last = time.monotonic()


def _await_worker(client: Any) -> None:
    try:
        client.wait_for_workers(1, timeout=WAIT)
    except TimeoutError as error:
        raise CohortError(f"attribute_cohort: no Dask worker came within {WAIT} s") from error


def _share(client: Any, work: Work) -> Any:
    """A future of the work. It is the result of a task, not scattered data, so that Dask can make it again when every
    worker that had it has died."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sending large graph")
        return client.submit(_same, work, pure=False)


def _same(work: Work) -> Work:
    return work


def do_part(work: Work, number: int, device: torch.device | None, *, threads: int | None, gpu_by_name: bool) -> Part:
    """Do one part, in a worker.

    Args:
        work: As sent; it is left as it is.
        number: Of the part.
        device: Where to run; None: on the CPU.
        threads: For torch; None: as the worker has it.
        gpu_by_name: Whether workers are named 0, 1, … and each takes a GPU by its name.
    """
    with _one_at_a_time:  # a worker with several threads has one model
        if threads is not None:
            torch.set_num_threads(threads)
        own = _own_copy(work)
        if device is not None:
            own.model.to(_own_gpu(device) if gpu_by_name else device)
        own.model.eval()
        (part,) = run_parts(own, [number])
        part.record["peak_bytes"] = peak_memory()
        return part


_copies: list[tuple[Work, Work]] = []
"""The work as sent, which Dask may be sending on to another worker at any moment, and the copy that is run here."""


def _own_copy(work: Work) -> Work:
    """Made once: a model at work has hooks and other forwards on it, which must not travel."""
    if not _copies or _copies[0][0] is not work:
        _copies[:] = [(work, _with_own_model(work))]
    return _copies[0][1]


def _with_own_model(work: Work) -> Work:
    """A copy with a model of its own; the dataset, which a PyHealth model holds too, stays one, to be sent once."""
    dataset = work.source.dataset
    return replace(work, model=copy.deepcopy(work.model, {id(dataset): dataset}))


def _own_gpu(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    name = require("distributed", "dask").get_worker().name
    return torch.device("cuda", int(name) % torch.cuda.device_count())
