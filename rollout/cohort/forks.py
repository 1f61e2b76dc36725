"""A process that has imported once what work needs, and forks processes that do it: they start at once, also after a
death.

It imports, and does nothing else: OpenMP's threads, which begin with the first tensor that is worked on, would not be
there in a fork. `multiprocessing` has such a server too, but one for the whole program, whose processes run the
program's main module again, and which stays when a run has ended.
"""

import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from importlib import import_module

import numpy as np
import torch

from rollout.cohort.child import end_with_parent, serve

IMPORTS = ("rollout.cohort.child", "pyhealth.datasets", "pyhealth.models", "rollout.pyhealth")
"""What the server imports, as far as this process has."""

_NUMBER = struct.Struct("q")  # on a fork's pipe: its process id, then its exit code
_LOOK = 0.05


def can_fork(device: torch.device | None) -> bool:
    """Whether work on a device can be done in forks: elsewhere they are not safe, and CUDA has threads of its own."""
    return sys.platform == "linux" and (device is None or device.type == "cpu")


def start_python(call: str, descriptor: int, threads: int) -> "subprocess.Popen[bytes]":
    """Start a Python that calls a function of this package, `module:name`, with a descriptor it inherits.

    Args:
        call: The function.
        descriptor: Of a connection or a socket.
        threads: For OpenMP and the like.
    """
    module, _, name = call.partition(":")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"sys.path[:] = {[str(path) for path in sys.path]}; from {module} import {name}; {name}({descriptor})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], env=_environment(threads), pass_fds=[descriptor], stdin=subprocess.DEVNULL
    )


def _environment(threads: int) -> dict[str, str]:
    """This process's, with a share of the threads.

    Dask lets its workers give the memory of every intermediate result back to the system, to be fetched again page by
    page, which makes a model's forward several times slower: undone.
    """
    environment = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}}
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)
    return environment


class Forked:
    """A forked process, as far as a `subprocess.Popen` is one.

    Args:
        pipe: Told its process id, then its exit code.
        server: What forks it.

    Attributes:
        returncode: None while it lives; −9 also when the server has died, for its forks die with it.
    """

    def __init__(self, pipe: int, server: "subprocess.Popen[bytes]") -> None:
        self.returncode: int | None = None
        self._pipe, self._server, self._pid, self._lock = pipe, server, 0, threading.Lock()

    def poll(self) -> int | None:
        """`returncode`, looked for."""
        self._look(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """`returncode`, waited for.

        Raises:
            subprocess.TimeoutExpired: It still lives.
        """
        rest = timeout
        while self.returncode is None:
            if rest is not None and rest <= 0:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            self._look(_LOOK)
            rest = None if rest is None else rest - _LOOK
        return self.returncode

    def kill(self) -> None:
        """Kill it. One that is not forked yet finds its connection closed when it is."""
        if self.poll() is not None:
            return
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        else:
            with self._lock:
                self._end(-signal.SIGKILL)

    def _look(self, seconds: float) -> None:
        with self._lock:
            while self.returncode is None and select.select([self._pipe], [], [], seconds)[0]:
                told = os.read(self._pipe, _NUMBER.size)
                if not told:
                    self._server.kill()  # it is dead or dying; when it is gone the next fork has another one
                    self._server.wait()
                    self._end(-signal.SIGKILL)
                elif not self._pid:
                    (self._pid,) = _NUMBER.unpack(told)
                else:
                    self._end(*_NUMBER.unpack(told))

    def _end(self, code: int) -> None:
        self.returncode = code
        os.close(self._pipe)


class ForkServer:
    """The server, seen from the process that wants forks. It starts when it is made, and again if it has died.

    Args:
        threads: Of each fork.
    """

    def __init__(self, threads: int) -> None:
        self._threads, self._lock = threads, threading.Lock()
        self._start()

    def fork(self, descriptor: int) -> Forked:
        """Have a process forked that serves a connection, which the caller closes; it is there some time later."""
        with self._lock:
            if self._running.poll() is not None:
                self._requests.close()
                self._start()
            read, write = os.pipe()
            try:
                socket.send_fds(self._requests, [b"f"], [descriptor, write])
            except OSError:  # it has just died: what is returned says so
                pass
            finally:
                os.close(write)
            return Forked(read, self._running)

    def end(self) -> None:
        """End the server, and with it every fork."""
        with self._lock:
            self._requests.close()
            self._running.kill()
            self._running.wait()

    def _start(self) -> None:
        self._requests, other = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self._requests.send(" ".join(name for name in IMPORTS if name in sys.modules).encode())
        with other:
            self._running = start_python("rollout.cohort.forks:serve_forks", other.fileno(), self._threads)


def serve_forks(descriptor: int) -> None:
    """Import, then fork whenever asked to, until the other end is closed.

    Args:
        descriptor: Of a socket of messages. First come the names of modules, then for each fork two descriptors: of the
            connection it serves, and of a pipe that is told its process id and its exit code.
    """
    end_with_parent()
    requests = socket.socket(fileno=descriptor)
    for name in requests.recv(1 << 16).decode().split():
        with suppress(Exception):  # where it is needed, its absence is said
            import_module(name)
    gc.freeze()  # else a collection in a fork would copy the pages of all there is
    deaths, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    own, pipes = [requests.fileno(), deaths, wake], dict[int, int]()
    while True:
        ready, _, _ = select.select(own[:2], [], [])
        if deaths in ready:
            os.read(deaths, 1 << 12)
            _tell_deaths(pipes)
        if requests.fileno() in ready:
            message, given, _, _ = socket.recv_fds(requests, 1, 2)
            if not message:
                return
            _fork(given[0], given[1], pipes, own)


def _tell_deaths(pipes: dict[int, int]) -> None:
    for pid, pipe in list(pipes.items()):
        dead, status = os.waitpid(pid, os.WNOHANG)
        if dead:
            with suppress(BrokenPipeError):
                os.write(pipe, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
            os.close(pipes.pop(pid))


def _fork(connection: int, pipe: int, pipes: dict[int, int], own: list[int]) -> None:
    server = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: those of the allocators and of OpenBLAS survive it
        pid = os.fork()
    if pid:
        pipes[pid] = pipe
        os.close(connection)
        with suppress(BrokenPipeError):
            os.write(pipe, _NUMBER.pack(pid))
        return
    try:
        end_with_parent()
        if os.getppid() == server:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in (*own, pipe, *pipes.values()):
                os.close(each)
            np.random.seed()  # noqa: NPY002 - else all forks would draw the same; Python's own generator sees to that
            serve(connection)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
