"""A process of its own for parts, seen from the one that starts it: whatever is done there, only that process dies."""

import copy
import pickle
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from rollout.cohort.child import Request, Setting
from rollout.cohort.forks import Forked, ForkServer, start_python
from rollout.cohort.plan import Plan
from rollout.cohort.work import Part, Work
from rollout.errors import CohortError, require

STARTS = 3
"""Times in a row that a process may die before it has begun to work."""

_LOOK = 0.1
"""Seconds between two looks at whether the process lives and is wanted."""


class Died(Exception):
    """The process died while it had a request; the text says how: "was killed (signal 9, SIGKILL)"."""


class Stopped(Exception):
    """What was asked for is no longer wanted."""


@dataclass(frozen=True)
class Packed:
    """Work as it travels: pickled once, and unpickled only in the processes that do it.

    Attributes:
        content: The pickled `Work`.
        plan: Its plan.
        samples: Number of its samples.
    """

    content: bytes
    plan: Plan
    samples: int


def pack(work: Work) -> Packed:
    """Pickle the work, its model on the CPU; functions of `__main__` travel by value.

    Raises:
        CohortError: If something of it cannot be pickled.
    """
    dataset = work.source.dataset  # a PyHealth model holds it too: it stays one
    sent = replace(work, model=copy.deepcopy(work.model, {id(dataset): dataset}).cpu())
    try:
        content = require("cloudpickle", "dask").dumps(sent, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise CohortError(
            "attribute_cohort: model, dataset, collate and explain go to other processes, and one of them cannot be "
            f"pickled: {type(error).__name__}: {error}"
        ) from error
    return Packed(content, work.plan, len(work.source))


class Process:
    """A process that does parts of a work, started when it is needed, and again after it has died.

    Args:
        packed: The work.
        setting: Threads and device.
        server: What it is forked from; None: it is a Python of its own, which imports first.
    """

    def __init__(self, packed: Packed, setting: Setting, server: ForkServer | None = None) -> None:
        self.packed, self._setting, self._server = packed, setting, server
        self._running: subprocess.Popen[bytes] | Forked | None = None
        self._connection: Connection | None = None
        self._ended = False
        self._lock = threading.Lock()

    def ask(self, request: Request, stopped: Callable[[], bool] = lambda: False) -> Part:
        """Have something done.

        Args:
            request: What.
            stopped: Looked at all the while; once true, the process is killed.

        Raises:
            Died: If the process died of it; the next request has a new one.
            Stopped: If it is no longer wanted, or `end` was called.
            CohortError: If no process can be started.
            Exception: What the work itself raised.
        """
        if self._running is None or self._running.poll() is not None:
            self._start(stopped)
        return self._exchange([pickle.dumps(request)], stopped)

    def kill(self) -> None:
        """Kill the process, from any thread; the next request has a new one."""
        with self._lock:
            self._kill()

    def end(self) -> None:
        """Kill the process, from any thread; nothing can be asked for afterwards."""
        with self._lock:
            self._ended = True
            self._kill()

    def _start(self, stopped: Callable[[], bool]) -> None:
        for _ in range(STARTS):
            self._spawn()
            try:
                self._exchange([pickle.dumps(self._setting), self.packed.content], stopped)
                return
            except Died as death:
                how = str(death)
            except Stopped:
                raise
            except Exception as error:
                raise CohortError(
                    "attribute_cohort: a worker process could not take over model, dataset, collate and explain: "
                    f"{type(error).__name__}: {error}"
                ) from error
        raise CohortError(f"attribute_cohort: a worker process could not be started, {STARTS} times: it {how}")

    def _spawn(self) -> None:
        with self._lock:
            self._close()
            if self._ended:
                raise Stopped
            self._connection, other = Pipe()
            with other:
                if self._server is not None:
                    self._running = self._server.fork(other.fileno())
                else:
                    self._running = start_python("rollout.cohort.child:serve", other.fileno(), self._setting.threads)

    def _exchange(self, messages: list[bytes], stopped: Callable[[], bool]) -> Any:
        """Send messages and return the one answer to them."""
        assert self._connection is not None
        assert self._running is not None
        try:
            for message in messages:
                self._connection.send_bytes(message)
            while not self._connection.poll(_LOOK):
                if stopped():
                    self.kill()
                    raise Stopped
                # Not only when the connection closes: a process that the dead one started may hold it open.
                if self._running.poll() is not None and not self._connection.poll(0):
                    raise EOFError
            kind, value = self._connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            how = self._bury()
            raise (Stopped() if self._ended else Died(how)) from error
        if kind == "error":
            raise value
        return value

    def _kill(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.wait()

    def _bury(self) -> str:
        """How a process has died that no longer answers."""
        assert self._running is not None
        with suppress(subprocess.TimeoutExpired):
            self._running.wait(10)  # it may be writing its memory to a file
        self.kill()
        code = self._running.returncode
        assert code is not None
        if code >= 0:
            return f"ended (exit code {code})"
        try:
            return f"was killed (signal {-code}, {signal.Signals(-code).name})"
        except ValueError:
            return f"was killed (signal {-code})"

    def _close(self) -> None:
        self._kill()
        if self._connection is not None:
            self._connection.close()
        self._running = self._connection = None
