"""Two long-lived processes, one a revision, that take turns: the gate's side, and below it theirs.

The processes import this with the path of the gate's own checkout. So nothing that is imported at the top may import
`rollout`, before `serve` has put the packages of the revision in front of that path.
"""

import gc
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from bench.gate.paired import Pairs, turns
from bench.gate.trees import Tree

SPAWN = multiprocessing.get_context("spawn")
TURN = 0.02  # seconds of timed calls in a turn, at least
MOST_CALLS = 50
BUDGET, FEWEST = 5.0, 12  # seconds of a measurement; past them it ends, with at least so many pairs
PATIENCE = 300.0  # seconds for an answer

Run = Callable[[], Tensor]


class WorkerError(RuntimeError):
    """A revision's process ended or does not answer; the message says which and how."""


class Duel(ExitStack):
    """The processes of base and head, started together; a context manager that ends them."""

    def __init__(self, found: dict[str, Tree], device: str, threads: int) -> None:
        super().__init__()
        self._file = found["base"].root.parent / "case.pt"
        self._processes, self._pipes = {}, {}
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as they inherit it: Ctrl-C is for the gate alone
        with mock.patch.dict(os.environ, PYTHONHASHSEED="0", OMP_NUM_THREADS=str(threads)):
            for side, tree in found.items():
                self._pipes[side], theirs = SPAWN.Pipe()
                given = theirs, tree.root, torch.device(device), threads
                self._processes[side] = SPAWN.Process(target=serve, args=given, name=side, daemon=True)
                self._processes[side].start()
                theirs.close()  # or the pipe would outlive the process
                self.callback(self._processes[side].join)
                self.callback(self._processes[side].kill)
        signal.signal(signal.SIGINT, previous)

    def _ask(self, request: Any, *sides: str) -> dict[str, Any]:
        """The answers of some sides; all are asked before the first is waited for.

        Raises:
            WorkerError: a process ended, or gave no answer in time.
        """
        answers = {}
        for side in sides:
            with suppress(ConnectionError):  # told below
                self._pipes[side].send(request)
        for side in sides:
            if not self._pipes[side].poll(PATIENCE):
                raise WorkerError(f"{side} gave no answer for {PATIENCE:.0f} s")
            try:
                answers[side] = self._pipes[side].recv()
            except (EOFError, ConnectionError):
                self._processes[side].join()
                raise WorkerError(f"{side}'s process ended with status {self._processes[side].exitcode}") from None
        return answers

    def prepare(self, make: Callable[[], Run]) -> dict[str, np.ndarray | str]:
        """Each side's result of a case, float64, or why there is none; both at once, not for timing."""
        torch.save(make, self._file)  # tensors sent to a process would lie in memory that both share
        return self._ask(self._file, "base", "head")

    def _seconds(self, side: str, calls: int, warm: int) -> float:
        return self._ask((calls, warm), side)[side]

    def measure(self, pairs: int, generator: random.Random) -> Pairs:
        """Times the case prepared last, turn by turn, in so many pairs, or fewer where calls are long.

        A call as long as a turn needs none before it to warm up.
        """
        slower = max(self._seconds(side, 3, 1) for side in ("base", "head"))
        calls = min(MOST_CALLS, math.ceil(TURN / slower))
        warm = int(slower < TURN)
        taken: list[tuple[float, float]] = []
        end = time.monotonic() + BUDGET
        for order in turns(pairs, generator):
            if len(taken) >= FEWEST and len(taken) % 2 == 0 and time.monotonic() > end:
                break
            seconds = {side: self._seconds(side, calls, warm) for side in order}
            taken.append((seconds["base"], seconds["head"]))
        return tuple(taken)


# --- what runs in a revision's process


def serve(pipe: Connection, root: Path, device: torch.device, threads: int) -> None:
    """Until the pipe is closed: compute the case in a file, or give the median seconds of calls of the case at hand."""
    os.dup2(2, 1)  # what a library prints is no part of the gate's table
    tempfile.tempdir = str(root.parent)  # nobody else removes what a killed process leaves
    sys.path[:0] = [str(root), str(root / "kernels")]
    torch.set_num_threads(threads)
    gc.disable()  # a collection inside one call of many would be noise
    import_module("rollout")
    check_imports(root)
    run = None
    with suppress(EOFError):
        while True:
            request = pipe.recv()
            if isinstance(request, Path):
                run = None
                gc.collect()
                run, answer = prepare(request, device)
                check_imports(root)
            else:
                answer = time_calls(run, *request, device)
            pipe.send(answer)


def check_imports(root: Path) -> None:
    """Raises ImportError where a module of the packages is not this revision's own, but another copy's."""
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] in ("rollout", "rollout_kernels") and getattr(module, "__file__", None):
            path = Path(str(module.__file__)).resolve()
            if not path.is_relative_to(root.resolve()):
                raise ImportError(f"{name} must come from {root}, got {path}")


def prepare(file: Path, device: torch.device) -> tuple[Run | None, np.ndarray | str]:
    """The call of a case and its result, float64; what the revision cannot do is said, not raised."""
    try:
        run = torch.load(file, weights_only=False, map_location=device)()
        return run, run().double().cpu().numpy()
    except Exception as error:  # a revision may lack the case in any way
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def time_calls(run: Run, calls: int, warm: int, device: torch.device) -> float:
    """Median seconds of so many calls. Those before them, uncounted, fill the caches and wake the threads."""
    on_gpu = device.type == "cuda"
    tick = record_event if on_gpu else time.perf_counter
    with torch.inference_mode():
        ticks = [tick()]
        for _ in range(warm + calls):
            run()
            ticks.append(tick())
    if on_gpu:
        torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in pairwise(ticks[warm:]))


def record_event() -> torch.cuda.Event:
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


def public(name: str, *inputs: Any, **options: Any) -> Run:
    """`rollout.<name>(*inputs, **options)`."""
    return partial(getattr(import_module("rollout"), name), *inputs, **options)


def captured(model: nn.Module, tokens: Tensor) -> Run:
    """A forward pass under `rollout.capture`, then the row of position 0."""
    capture = import_module("rollout").capture

    def run() -> Tensor:
        with torch.inference_mode(), capture(model) as tape:
            model(tokens)
        return next(iter(tape.rollout(query=0).values()))

    return run


def attributed(model: nn.Module, batches: list[Tensor]) -> Run:
    """The attributions of PyHealth's Transformer for batches of ids, in one vector."""
    interpreter = import_module("rollout.pyhealth").AttentionRollout(model)
    return lambda: torch.cat([interpreter.attribute(codes=ids)["codes"].flatten() for ids in batches])
