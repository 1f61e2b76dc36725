"""Lanes that need a process of their own: Triton's interpreter, which must be asked for before Triton is imported, and
the compile lane over releases of Triton beside the one in use."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What pip is asked for, one release each; TRITON_RELEASES, words as pip takes them (a wheel's path too), is tried
# instead, and with every launch configuration. The last is a release newer than any known here, where there is one.
ASKED_FOR = os.environ.get("TRITON_RELEASES", "").split()
RELEASES = ASKED_FOR or [
    "triton==3.6.*", "triton==3.7.*", "triton==3.8.*", "triton==3.9.*", "triton>=3.10",
]  # fmt: skip

INTERPRETED = {  # modules of tests that run in a process of the interpreter
    "results": ("test_triton_interpret", "test_triton_interpret_qk", "test_triton_values", "test_triton_gradients"),
    "schedules": ("test_triton_schedules", "test_scheduled_interpreter"),
}


def test_importing_rollout_kernels_does_not_import_triton_kernels() -> None:
    code = "import sys, rollout_kernels; print([m for m in sys.modules if m.startswith('rollout_kernels._triton')])"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("lane", INTERPRETED)
def test_lane_of_the_interpreter(lane: str, request: pytest.FixtureRequest) -> None:
    wanted = "interpret and not slow" if "not slow" in request.config.getoption("-m") else "interpret"
    command = [sys.executable, "-m", "pytest", "-q", "-m", wanted, "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(f"tests/kernels/{name}.py" for name in INTERPRETED[lane])],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("release", RELEASES)
def test_compile_lane_of_another_triton(release: str) -> None:
    """Promises of test_triton_compile.py and test_triton_resources.py hold, and known numbers are met, on a Triton put
    before the one in use."""
    with tempfile.TemporaryDirectory() as folder:  # of a gigabyte: it does not stay, as `tmp_path` does
        version = unpack_triton(release, folder)
        if version == importlib.metadata.version("triton"):
            pytest.skip(f"Triton {version} is the one in use: test_triton_compile.py is its lane")
        run = run_compile_lane(folder)
    print(run.stdout)
    assert f"\nTriton {version}\n" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def run_compile_lane(folder: str) -> subprocess.CompletedProcess[str]:
    """The compile lane as `make test` has it, for a release asked for the exhaustive forms too, with the Triton of a
    folder: those are three thousand compilations."""
    files = [f"tests/kernels/test_triton_{name}.py" for name in ("compile", "resources", "known")]
    chosen = [] if ASKED_FOR else ["-m", "not slow"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *chosen, *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=False,
    )


def unpack_triton(release: str, folder: str) -> str:
    """Installs a release of Triton alone, as a wheel, into a folder; its version. Skips where none can be had."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--target", folder, release], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no wheel of {release}: {done.stderr.strip().splitlines()[-1:]}")
    (found,) = importlib.metadata.distributions(name="triton", path=[folder])
    return found.version
