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
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from bench.gate.paired import SIDES, Pairs, turns
from bench.gate.trees import GateError

SPAWN = multiprocessing.get_context("spawn")
TURN = 0.02  # seconds of timed calls in a turn, at least
MOST_CALLS = 50
BUDGET, FEWEST = 5.0, 12  # seconds of a measurement; past them it ends, with at least so many pairs
PATIENCE, GRACE = 300.0, 5.0  # seconds for an answer, and to end

Run = Callable[[], Tensor]


class Duel(ExitStack):
    """The processes of base and head, started together; a context manager that ends them."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        super().__init__()
        self._file = folder / "case.pt"
        self._processes, self._pipes = {}, {}
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as they inherit it: Ctrl-C is for the gate alone
        # What a killed process leaves lies with the trees, and goes with them.
        inherited = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": str(threads), "TMPDIR": str(folder)}
        try:
            with mock.patch.dict(os.environ, inherited):
                for side in SIDES:
                    self._pipes[side], theirs = SPAWN.Pipe()
                    given = (theirs, folder / side, device, threads)
                    self._processes[side] = SPAWN.Process(target=serve, args=given, name=side, daemon=True)
                    self._processes[side].start()
                    theirs.close()  # or the pipe would outlive the process
                    self.callback(self._end, side)
        finally:
            signal.signal(signal.SIGINT, previous)

    def _end(self, side: str) -> None:
        self._pipes[side].close()  # it ends by that, unless a call takes longer
        self._processes[side].join(GRACE)
        self._processes[side].kill()
        self._processes[side].join()

    def _ask(self, sides: tuple[str, ...], *request: Any) -> dict[str, Any]:
        """What a method of `Revision`, given by name with its arguments, returns at each side; all run at once.

        Raises:
            GateError: a process ended, or gave no answer in time.
        """
        answers = {}
        try:
            for side in sides:
                self._pipes[side].send(request)
            for side in sides:
                if not self._pipes[side].poll(PATIENCE):
                    raise GateError(f"{side} gave no answer for {PATIENCE:.0f} s")
                answers[side] = self._pipes[side].recv()
        except (EOFError, ConnectionError):
            self._processes[side].join()
            raise GateError(f"{side}'s process ended with status {self._processes[side].exitcode}") from None
        return answers

    def prepare(self, run: Run) -> dict[str, np.ndarray | str]:
        """Each side's result of a call, float64, or why there is none; not for timing."""
        torch.save(run, self._file)  # tensors sent to a process would lie in memory that both share
        return self._ask(SIDES, "prepare", self._file)

    def measure(self, pairs: int, generator: random.Random) -> Pairs:
        """Times the case prepared last, turn by turn, in so many pairs, or fewer where calls are long.

        A call as long as a turn needs none before it to warm up.
        """
        slower = max(self._ask((side,), "time", 3, 1)[side] for side in SIDES)
        calls = min(MOST_CALLS, math.ceil(TURN / slower))
        warm = int(slower < TURN)
        taken: list[tuple[float, float]] = []
        end = time.monotonic() + BUDGET
        for order in turns(pairs, generator):
            if len(taken) >= FEWEST and len(taken) % 2 == 0 and time.monotonic() > end:
                break
            seconds = {side: self._ask((side,), "time", calls, warm)[side] for side in order}
            taken.append((seconds["base"], seconds["head"]))
        return tuple(taken)


# --- what runs in a revision's process


def serve(pipe: Connection, root: Path, device: str, threads: int) -> None:
    """Be that revision and do what is asked for, until the pipe is closed."""
    os.dup2(2, 1)  # what a library prints is no part of the gate's table
    sys.path[:0] = [str(root), str(root / "kernels")]
    torch.set_num_threads(threads)
    gc.disable()  # a collection inside one call of many would be noise; `prepare` collects
    import_module("rollout")
    revision = Revision(root.resolve(), torch.device(device))
    with suppress(EOFError, ConnectionError):
        while True:
            method, *arguments = pipe.recv()
            pipe.send(getattr(revision, method)(*arguments))


class Revision:
    """The packages that lie in a folder, and the call at hand."""

    def __init__(self, root: Path, device: torch.device) -> None:
        self.root, self.device, self.run = root, device, None

    def check_imports(self) -> None:
        """Raises ImportError where a module of the packages is not this revision's own, but another copy's."""
        for name, module in sorted(sys.modules.items()):
            if name.partition(".")[0] in ("rollout", "rollout_kernels") and getattr(module, "__file__", None):
                path = Path(str(module.__file__)).resolve()
                if not path.is_relative_to(self.root):
                    raise ImportError(f"{name} must come from {self.root}, got {path}")

    def prepare(self, file: Path) -> np.ndarray | str:
        """The result of the call that a file holds, float64; what the revision cannot do is said, not raised."""
        self.run = None
        gc.collect()
        try:
            self.run = torch.load(file, weights_only=False, map_location=self.device)
            return self.run().double().cpu().numpy()
        except Exception as error:  # a revision may lack the case in any way
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self.check_imports()

    def time(self, calls: int, warm: int) -> float:
        """Median seconds of so many calls. Those before them, uncounted, fill the caches and wake the threads."""
        on_gpu = self.device.type == "cuda"
        tick = record_event if on_gpu else time.perf_counter
        with torch.inference_mode():
            ticks = [tick()]
            for _ in range(warm + calls):
                self.run()
                ticks.append(tick())
        if on_gpu:
            torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in pairwise(ticks[warm:]))


def record_event() -> torch.cuda.Event:
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


def public(name: str, *inputs: Any, **options: Any) -> Tensor:
    """`rollout.<name>(*inputs, **options)`."""
    return getattr(import_module("rollout"), name)(*inputs, **options)


def captured(model: nn.Module, tokens: Tensor) -> Tensor:
    """A forward pass under `rollout.capture`, then the row of position 0."""
    with torch.inference_mode(), import_module("rollout").capture(model) as tape:
        model(tokens)
    return next(iter(tape.rollout(query=0).values()))


def attributed(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """The attributions of PyHealth's Transformer for batches of ids, in one vector."""
    interpreter = import_module("rollout.pyhealth").AttentionRollout(model)
    return torch.cat([interpreter.attribute(codes=ids)["codes"].flatten() for ids in batches])
