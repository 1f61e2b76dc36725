"""Two long-lived processes, one a revision, that take turns."""

import contextlib
import json
import math
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gate.cases import CASES
from bench.gate.paired import Pairs, turns
from bench.gate.trees import Tree
from rollout.bench.measure import relative_error

SCRIPT = Path(__file__).with_name("worker.py")
TURN = 0.02  # seconds of timed calls in a turn, at least
MOST_CALLS = 50
BUDGET, FEWEST = 5.0, 12  # seconds of a measurement; past them it ends, with at least so many pairs
PATIENCE = 300.0  # seconds for an answer


class WorkerError(RuntimeError):
    """A revision's process ended or does not answer; the message says which and how."""


class Worker:
    """A process that runs one revision: `bench/gate/worker.py` with that revision's packages."""

    def __init__(self, name: str, tree: Tree, device: str, threads: int) -> None:
        self.name = name
        self._scratch = tempfile.TemporaryDirectory(prefix=f"rollout-compare-{name}-")
        self._errors = Path(self._scratch.name) / "stderr"
        # -P: the script's own folder, with this checkout's files, stays off the path.
        command = [sys.executable, "-P", str(SCRIPT), f"--root={tree.root}", f"--device={device}"]
        command += [f"--threads={threads}", f"--scratch={self._scratch.name}"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(tree.root), str(tree.root / "kernels"))),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        with self._errors.open("wb") as errors:
            # A session of its own: Ctrl-C ends it through `close`, quietly.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
                cwd=self._scratch.name, start_new_session=True,
            )  # fmt: skip

    def ask(self, **request: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> dict[str, Any]:
        """The answer to what was asked, or on start that it is ready.

        Raises:
            WorkerError: the process ended, or gave no answer in time.
        """
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise WorkerError(f"{self.name} gave no answer for {PATIENCE:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> WorkerError:
        status = self._process.wait(timeout=PATIENCE)
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return WorkerError(f"{self.name}'s process ended with status {status}: {lines[-1] if lines else 'no message'}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._scratch.cleanup()


class Duel(contextlib.ExitStack):
    """The processes of base and head, started together; a context manager that ends them."""

    def __init__(self, found: dict[str, Tree], device: str, threads: int) -> None:
        super().__init__()
        self.workers: dict[str, Worker] = {}
        self._inputs = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="rollout-compare-inputs-")))
        try:
            for name in ("base", "head"):
                self.workers[name] = Worker(name, found[name], device, threads)
                self.callback(self.workers[name].close)
            for worker in self.workers.values():
                worker.answer()
        except BaseException:
            self.close()
            raise

    def prepare(self, name: str) -> dict[str, dict[str, Any]]:
        """What came of the case at each: its `error`, infinite for a wrong shape or no number, or why it `cannot`."""
        case, file = CASES[name](), self._inputs / "case.pt"
        torch.save({"call": case.call, "inputs": case.inputs, "options": case.options}, file)
        for worker in self.workers.values():  # both at once; not for timing
            worker.ask(do="prepare", path=str(file))
        answers = {side: worker.answer() for side, worker in self.workers.items()}
        for answer in answers.values():
            if "result" in answer:
                answer |= {"error": relative_error(torch.from_numpy(np.load(answer["result"])), case.exact),
                           "allowed": case.allowed}  # fmt: skip
        return answers

    def _seconds(self, name: str, calls: int, warm: int) -> float:
        self.workers[name].ask(do="time", calls=calls, warm=warm)
        return float(self.workers[name].answer()["seconds"])

    def measure(self, pairs: int, generator: random.Random) -> Pairs:
        """Times the case prepared last, turn by turn, in so many pairs, or fewer where calls are long.

        A call as long as a turn needs none before it to warm up.
        """
        slower = max(self._seconds(name, 3, 1) for name in ("base", "head"))
        calls = min(MOST_CALLS, math.ceil(TURN / slower))
        warm = int(slower < TURN)
        seconds: dict[str, list[float]] = {"base": [], "head": []}
        end = time.monotonic() + BUDGET
        for done, pair in enumerate(turns(pairs, generator)):
            if done >= FEWEST and done % 2 == 0 and time.monotonic() > end:
                break
            for name in pair:
                seconds[name].append(self._seconds(name, calls, warm))
        return Pairs(tuple(seconds["base"]), tuple(seconds["head"]))
