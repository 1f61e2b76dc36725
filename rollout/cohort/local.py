"""The parts of a cohort in several processes of this machine."""

import queue
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

import torch

from rollout.cohort.child import Setting
from rollout.cohort.forks import ForkServer, can_fork
from rollout.cohort.poison import Doer
from rollout.cohort.process import Process, pack
from rollout.cohort.work import Part, Work


def run_on_workers(count: int, work: Work, numbers: Sequence[int], device: torch.device | None) -> Generator[Part]:
    """Do parts in `count` processes of this machine, each with its share of the threads; they come in any order.

    Whatever ends this generator, no process is left.

    Args:
        count: Processes.
        work: Of which cohort.
        numbers: Parts to do.
        device: Where to run; with `cuda`, worker k takes GPU k modulo their number.

    Raises:
        CohortError: If processes cannot be started, or keep dying.
    """
    threads = max(1, torch.get_num_threads() // count)
    server = ForkServer(threads) if can_fork(device) else None  # it imports while the work is packed
    try:
        packed = pack(work)
        settings = [Setting(threads, device, gpu) for gpu in range(min(count, len(numbers)))]
        yield from _run([Doer(Process(packed, setting, server)) for setting in settings], numbers)
    finally:
        if server is not None:
            server.end()


def _run(doers: Sequence[Doer], numbers: Sequence[int]) -> Generator[Part]:
    free: queue.SimpleQueue[Doer] = queue.SimpleQueue()
    for doer in doers:
        free.put(doer)

    def do(number: int) -> Part:
        doer = free.get()
        try:
            return doer.do(number)
        finally:
            free.put(doer)

    waiting = iter(numbers)
    running: set[Future[Part]] = set()
    pool = ThreadPoolExecutor(len(doers), thread_name_prefix="rollout-worker")
    try:
        while True:
            # Two tasks ahead, no more: what is done and not yet written is held in memory.
            running |= {pool.submit(do, number) for number in islice(waiting, 2 * len(doers) - len(running))}
            if not running:
                return
            # A wait without an end is not left for an interrupt that another thread got.
            done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for doer in doers:
            doer.process.end()
        pool.shutdown(cancel_futures=True)
