"""A toy cohort of which some samples kill the process that does them, and a run with a time limit."""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout.cohort.explain import Explained
from tests.support import toy_cohort
from tests.support.toy_cohort import Attention, Records


def die(how: str) -> None:
    """End or hang this process."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "segfaults":
        ctypes.string_at(0)
    elif how == "asks to exit":
        sys.exit(5)
    elif how == "hangs":
        time.sleep(1000)
    elif how == "hangs with the lock":
        ctypes.PyDLL(None).sleep(1000)  # no thread of Python runs meanwhile
    raise AssertionError(f"still there, though it {how}")


class Deadly(Records):
    """`deadly`: sample → (where, how): where is `read`, `collate` or `explain`, how as `die` has it.

    The process that made the dataset reads its samples unharmed.
    """

    def __init__(self, count: int, deadly: Mapping[int, tuple[str, str]], spoiled: Any = None) -> None:
        super().__init__(count, spoiled)
        self.deadly, self.home = dict(deadly), os.getpid()

    def __getitem__(self, number: int) -> dict[str, Any]:
        where, how = self.deadly.get(number, ("", ""))
        if where == "read" and os.getpid() != self.home:
            die(how)
        return super().__getitem__(number) | {"deadly": (where, how)}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As the toy cohort's; dies of what is to die here."""
    deadly = [sample["deadly"] for sample in samples]
    for where, how in deadly:
        if where == "collate":
            die(how)
    return toy_cohort.collate(samples) | {"deadly": deadly}


def explain(model: Attention, batch: Mapping[str, Any]) -> Explained:
    """As the toy cohort's; dies of what is to die here."""
    for where, how in batch["deadly"]:
        if where == "explain":
            die(how)
    return toy_cohort.explain(model, batch)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns or raises, in a thread, so that one that hangs is a failure and not a suite that stands.

    Raises:
        AssertionError: If it takes longer; where all threads are is written to stderr.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome[:] = [True, call()]
        except BaseException as error:
            outcome[:] = [False, error]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        faulthandler.dump_traceback(all_threads=True)
        raise AssertionError(f"no end within {seconds} s")
    good, value = outcome
    if not good:
        raise value
    return value


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Until something holds.

    Raises:
        AssertionError: If it does not in time.
    """
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
