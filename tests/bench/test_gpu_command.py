"""`python -m bench.gpu`: its dry run, which keeps every stage from rotting; what is run again and what is not."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import gpu
from bench.gpu import Stage
from bench.machine import host
from tests.support.triton_cases import bounds_are_arrays

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_dry_run_goes_through_every_stage() -> None:
    if bounds_are_arrays() and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(
            "the interpreter of this Triton cannot loop with this numpy; the lanes' tests mend it, in their process"
        )
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run"], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.endswith("bench.gpu: every stage passed\n")
    assert done.stdout.count(" passed") == 3  # two by pytest, and the last line
    assert "columns D16 torch.bfloat16" in done.stdout


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A repository of one source with a device of a name, whose stages write down that they ran."""
    for name, content in (("kernels/a.py", "1"), ("kernels/tuned/x.json", "{}"), ("bench/results/x/cuda.json", "0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "stage.py").write_text(
        "import sys, pathlib\n"
        "name = sys.argv[1]\n"
        "with open('log', 'a') as file: file.write(name + ' ')\n"
        "sys.exit(pathlib.Path(name + '-fails').exists())\n"
    )
    monkeypatch.setattr(host, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "PAGES", "stage pages")
    monkeypatch.setattr(gpu, "STAGES", (
        Stage("correctness", 1, "stage tests"), Stage("bench", 1, "stage bench"),
        Stage("tuning", 1, "stage tuning", reads_tables=False),
    ))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "device_name", lambda device: "Card 3000")
    return tmp_path


def ran(folder: Path, status: int = 0) -> str:
    """What one call runs."""
    (folder / "log").write_text("")
    assert gpu.main([]) == status
    return (folder / "log").read_text().strip()


def test_what_passed_is_run_again_only_when_something_changed(card: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(card) == "tests bench tuning pages"
    assert sorted(file.name for file in (card / ".gpu").iterdir()) == [
        "bench, Card 3000", "correctness, Card 3000", "tuning, Card 3000",
    ]  # fmt: skip
    (card / "bench/results/x/cuda.json").write_text("a record is no source")
    assert ran(card) == "pages"
    assert "bench.gpu: correctness: passed before, nothing changed since" in capsys.readouterr().out
    (card / "kernels/tuned/x.json").write_text("what the tuning writes is no reason to tune again")
    assert ran(card) == "tests bench pages"
    (card / "kernels/a.py").write_text("2")
    assert ran(card) == "tests bench tuning pages"


def test_another_card_has_marks_of_its_own(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(card)
    monkeypatch.setattr(gpu, "device_name", lambda device: "Card 4000")
    assert ran(card) == "tests bench tuning pages"
    monkeypatch.setattr(gpu, "device_name", lambda device: "Card 3000")
    assert ran(card) == "pages"


def test_a_stage_that_failed_is_run_again_and_nothing_is_timed_that_is_wrong(card: Path) -> None:
    (card / "tests-fails").touch()
    assert ran(card, 1) == "tests pages"
    (card / "tests-fails").unlink()
    (card / "tuning-fails").touch()
    assert ran(card, 1) == "tests bench tuning pages"
    (card / "tuning-fails").unlink()
    assert ran(card) == "tuning pages"


def test_a_stage_that_takes_too_long_is_ended_with_what_it_started(card: Path) -> None:
    (card / "slow.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    started = time.perf_counter()
    assert gpu.run("slow", 2 / 60) is False
    assert time.perf_counter() - started < 30
    child = Path(f"/proc/{(card / 'child').read_text()}/stat")
    while child.exists() and child.read_text().split()[2] != "Z":  # it is dead when the system has seen to it
        assert time.perf_counter() - started < 30
        time.sleep(0.01)


def test_without_a_card_nothing_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "no CUDA device is available; nothing was run (--dry-run needs none)" in capsys.readouterr().out


def test_it_takes_less_than_25_minutes() -> None:
    assert sum(stage.minutes for stage in gpu.STAGES) + 1 <= 25
