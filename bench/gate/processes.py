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
from types import TracebackType
from typing import Any, Self

import numpy as np

from bench.gate.paired import Pairs, turns
from bench.gate.trees import Tree

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
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(tree.root, threads),
                cwd=self._scratch.name,
                start_new_session=True,  # Ctrl-C ends it through `close`, quietly
            )

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


def _environment(root: Path, threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels"))),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(threads),
    }


class Duel:
    """The processes of base and head, started together; a context manager that ends them."""

    def __init__(self, found: dict[str, Tree], device: str, threads: int) -> None:
        self.workers: dict[str, Worker] = {}
        try:
            for name in ("base", "head"):
                self.workers[name] = Worker(name, found[name], device, threads)
            for worker in self.workers.values():
                worker.answer()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _both(self, **request: Any) -> dict[str, dict[str, Any]]:
        """Both asked at once; not for timing."""
        for worker in self.workers.values():
            worker.ask(**request)
        return {name: worker.answer() for name, worker in self.workers.items()}

    def prepare(self, case: str) -> dict[str, dict[str, Any]]:
        """What each says of the case; `difference` in head's when both are results: max|Δ| / max|base|."""
        answers = self._both(do="prepare", case=case)
        if all(answer.get("error") is not None for answer in answers.values()):
            base, head = (np.load(answers[name]["result"]) for name in ("base", "head"))
            answers["head"]["difference"] = float(np.abs(head - base).max() / np.abs(base).max())
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
