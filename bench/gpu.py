"""All that needs a GPU, in one command of less than 25 minutes: `python -m bench.gpu` (`make gpu`).

The tests of the kernels, the suites of a GPU with their peers, the tuning of the launch table, and the pages. A stage
that passed is left out until the code, the launch tables (but for the tuning, which writes one), the device, torch or
Triton change: run it again after an interruption, and after tuning, to time what was tuned. `--dry-run` needs no GPU:
the stages as far as they go, tiny, in Triton's interpreter. Not yet run on a GPU.
"""

import argparse
import hashlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench.machine import host, record
from rollout.bench.measure import device_name
from rollout.bench.table import versions

SOURCES = ("kernels", "rollout", "bench", "tests/kernels", "tests/support")


class Stage(NamedTuple):
    """A Python module with its arguments: on a card, for so many minutes at most; and in a dry run, if any."""

    name: str
    minutes: float
    command: str
    dry: str = ""
    reads_tables: bool = True


TESTS = "pytest -q -p no:cacheprovider -m gpu tests/kernels/test_triton_gpu.py"
TINY = "pytest -q -p no:cacheprovider bench/test_gpu.py --quick --benchmark-disable -k 'not compile'"
TUNE, BENCH, PAGES = "rollout_kernels._triton.tune", "bench.run --device cuda --suite ", "bench.pages"
STAGES = (
    Stage("correctness", 9, TESTS, TESTS),
    Stage("kernels", 5, BENCH + "'kernels on a GPU'", TINY),
    # On any machine these are run by `bench.run --quick`, and the pages by their tests.
    Stage("end to end", 3, BENCH + "'PyHealth end to end'"),
    Stage("chains", 2, BENCH + "'rows from maps' --suite 'rows from Q,K' --suite 'full matrix'"),
    Stage("tuning", 5, TUNE + " --minutes 4", TUNE + " --dry-run", reads_tables=False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="every stage as far as it goes without a GPU")
    failed: list[str] = []
    if parser.parse_args(arguments).dry_run:
        tiny = {"TRITON_INTERPRET": "1", "BENCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        failed += [stage.name for stage in STAGES if stage.dry and not run(stage.dry, stage.minutes, **tiny)]
    elif torch.cuda.is_available():
        for stage in STAGES:
            if "correctness" not in failed and not passed(stage):  # no time is taken of kernels that are wrong
                failed.append(stage.name)
        run(PAGES, 1)
    else:
        print("bench.gpu: no CUDA device is available; nothing was run (--dry-run needs none)")
        return 1
    print(f"bench.gpu: {', '.join(failed) + ' FAILED' if failed else 'every stage passed'}")
    return int(bool(failed))


def passed(stage: Stage) -> bool:
    """Runs a stage, unless it passed when all it depends on was as it is now; whether it passed."""
    device = device_name(torch.device("cuda"))
    mark = host.ROOT / ".gpu" / f"{stage.name}, {device}".replace("/", " ")
    key = hashlib.sha256(repr((stage, versions(record.PACKAGES))).encode())
    for file in sorted(file for folder in SOURCES for file in (host.ROOT / folder).rglob("*.*")):
        if file.suffix == ".py" or (file.parent.name == "tuned" and stage.reads_tables):
            key.update(f"{file.relative_to(host.ROOT)} ".encode() + file.read_bytes())
    if mark.exists() and mark.read_text() == key.hexdigest():
        print(f"bench.gpu: {stage.name}: passed before, nothing changed since")
        return True
    if found := run(stage.command, stage.minutes):
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(key.hexdigest())
    return found


def run(command: str, minutes: float, **environment: str) -> bool:
    """Whether a Python module ended well; one that takes longer is ended, with all that it started."""
    print(f"bench.gpu: {command}", flush=True)
    whole = [sys.executable, "-m", *shlex.split(command)]
    process = subprocess.Popen(whole, cwd=host.ROOT, env=os.environ | environment, start_new_session=True)
    try:
        return process.wait(60 * minutes) == 0
    except subprocess.TimeoutExpired:
        print(f"bench.gpu: not done after {minutes:g} minutes")
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
