"""Runs the interpreter lane in a process of its own: TRITON_INTERPRET must be set before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_importing_rollout_kernels_does_not_import_triton_kernels() -> None:
    code = "import sys, rollout_kernels; print([m for m in sys.modules if m.startswith('rollout_kernels._triton')])"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreter_lane(request: pytest.FixtureRequest) -> None:
    wanted = "interpret and not slow" if "not slow" in request.config.getoption("-m") else "interpret"
    command = [sys.executable, "-m", "pytest", "-q", "-m", wanted, "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "tests/kernels/test_triton_interpret.py", "tests/kernels/test_triton_interpret_qk.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
