"""The process that does parts: what runs in it. It is started, asked and outlived by `rollout.cohort.process`.

It ends with the process that started it, whatever way that one ends, and at whatever it is itself.
"""

import ctypes
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from rollout.cohort.memory import peak_memory
from rollout.cohort.plan import Plan
from rollout.cohort.work import Part, Work, run_parts
from rollout.errors import CohortError

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setting:
    """Where and how a process works.

    Attributes:
        threads: For torch.
        device: Where the model goes; None: the CPU.
        gpu: With device `cuda`, which of the GPUs, modulo their number; None: as torch has it.
    """

    threads: int
    device: torch.device | None = None
    gpu: int | None = None


@dataclass(frozen=True)
class Request:
    """What is to be done of a part.

    Attributes:
        number: Of the part.
        plan: How its samples are cut into batches.
        without: Sample → reason, of those that are failures already and are not touched.
        only: The samples wanted; None: all.
    """

    number: int
    plan: Plan
    without: Mapping[int, str] = field(default_factory=dict)
    only: Sequence[int] | None = None


def serve(descriptor: int) -> None:
    """Do what is asked for over a connection, until its other end is closed.

    Two messages come first, a `Setting` and a `Work`; `("ready", None)` answers them. Then each `Request` is answered
    by `("part", Part)` or, where the work raised, by `("error", exception)`.

    Args:
        descriptor: File descriptor of the connection, which this process owns.
    """
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    end_with_parent()
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, messages), name="rollout-listen", daemon=True).start()
    try:
        work = _settle(pickle.loads(messages.get()), pickle.loads(messages.get()))
        connection.send(("ready", None))
        while True:
            connection.send(_answer(work, pickle.loads(messages.get())))
    except SystemExit as error:  # of the work: no thread of its may hold this process
        os._exit(error.code if isinstance(error.code, int) else error.code is not None)
    except Exception as error:
        connection.send(("error", _portable(error)))
        os._exit(1)


def end_with_parent() -> None:
    """Be killed when the process that started this one ends, also where native code lets no thread of Python run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _listen(connection: Connection, messages: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            messages.put(connection.recv_bytes())
        except (EOFError, OSError):  # nobody is left to work for
            os._exit(1)


def _settle(setting: Setting, work: Work) -> Work:
    torch.set_num_threads(setting.threads)
    device = setting.device
    if device is not None:
        if device.type == "cuda" and device.index is None and setting.gpu is not None:
            device = torch.device("cuda", setting.gpu % torch.cuda.device_count())
        work.model.to(device)
    work.model.eval()
    return work


def _answer(work: Work, request: Request) -> tuple[str, Any]:
    try:
        return "part", _do(work, request)
    except Exception as error:
        return "error", _portable(error)


def _do(work: Work, request: Request) -> Part:
    without = dict(request.without)
    if request.only is not None:
        numbers = request.plan.parts(len(work.source))[request.number]
        without |= dict.fromkeys(set(numbers).difference(request.only), "not asked for")
    (part,) = run_parts(replace(work, plan=request.plan, without=without), [request.number])
    part.record["peak_bytes"] = peak_memory()
    return part


def _portable(error: Exception) -> Exception:
    """The error, or its text where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return CohortError(f"attribute_cohort: {type(error).__name__}: {error}")
    return error
