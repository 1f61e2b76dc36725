"""`make gpu`: its dry run, which keeps every stage from rotting; what is run again and what is not."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.triton_cases import bounds_are_arrays

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "bench" / "gpu.mk"
STAGES = ("correctness", "kernels", "end-to-end", "chains", "tuning", "pages")

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("make", "timeout", "sha256sum"))), reason="GNU make or coreutils are not installed"
)


def make(folder: Path, *words: str, wanted: str = "gpu", **environment: str) -> "subprocess.Popen[str]":
    """Start the rules in a folder, as a terminal does: a process group of their own, and no make around them."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.Popen(
        ["make", "-f", RULES, wanted, f"PYTHON={sys.executable}", *words], cwd=folder, env=outside | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_dry_run_goes_through_every_stage() -> None:
    if bounds_are_arrays() and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(
            "the interpreter of this Triton cannot loop with this numpy; the lanes' tests mend it, in their process"
        )
    dry = make(ROOT, wanted="gpu-dry-run")
    said = dry.communicate()[0]
    assert dry.returncode == 0, said[-8000:]
    assert len(re.findall(r"\d+ passed", said)) == 2
    assert "columns D16 torch.bfloat16" in said


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """A repository of one source on a card of a name, whose stages write down that they ran."""
    for folder in ("kernels/tuned", "rollout", "bench/results/x", "tests/kernels", "tests/support"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(RULES, tmp_path / "bench")
    (tmp_path / "kernels/a.py").write_text("1")
    (tmp_path / "kernels/tuned/x.json").write_text("{}")
    put_in(tmp_path, "Card 3000")
    (tmp_path / "stage.py").write_text(
        "import sys, pathlib\n"
        "name = sys.argv[1]\n"
        "with open('log', 'a') as file: file.write(name + ' ')\n"
        "sys.exit(pathlib.Path(name + '-fails').exists())\n"
    )
    return tmp_path


def put_in(folder: Path, name: str, torch: str = "2.11", triton: str = "3.6") -> None:
    """Put a card into the machine, with a torch and a Triton that tell no more than their names."""
    text = f"class cuda:\n    def is_available(): return True\n    def get_device_name(): return {name!r}\n"
    (folder / "torch.py").write_text(f"__version__ = {torch!r}\n{text}")
    (folder / "triton.py").write_text(f"__version__ = {triton!r}\n")


def ran(folder: Path, status: int = 0) -> str:
    """What one call runs: one stage after the other, whatever make is told."""
    (folder / "log").write_text("")
    running = make(folder, "-j4", *(f"{stage}=1m {sys.executable} stage.py {stage}" for stage in STAGES))
    said = running.communicate()[0]
    assert running.returncode == status, said
    assert ("gpu: every stage passed" in said) == (status == 0)
    return (folder / "log").read_text().strip()


def test_what_passed_is_run_again_only_when_something_changed(card: Path) -> None:
    assert ran(card) == " ".join(STAGES)
    (card / "bench/results/x/cuda.json").write_text("a record is no source")
    assert ran(card) == "pages"
    (card / "kernels/tuned/x.json").write_text("what the tuning writes is no reason to tune again")
    assert ran(card) == "correctness kernels end-to-end chains pages"
    (card / "kernels/a.py").write_text("2")
    assert ran(card) == " ".join(STAGES)
    (card / "tests/support/b.py").touch()
    assert ran(card) == " ".join(STAGES)
    (card / "kernels/tuned/x.json").unlink()
    assert ran(card) == "correctness kernels end-to-end chains pages"


def test_another_card_torch_or_triton_has_marks_of_its_own(card: Path) -> None:
    ran(card)
    put_in(card, "Card 4000")
    assert ran(card) == " ".join(STAGES)
    put_in(card, "Card 3000")
    assert ran(card) == "pages"
    for other in ({"torch": "2.12"}, {"triton": "3.7"}):
        put_in(card, "Card 3000", **other)
        assert ran(card) == " ".join(STAGES)
    put_in(card, "Card 3000")
    assert ran(card) == " ".join(STAGES)  # the record holds the figures of the other Triton


def test_a_stage_that_failed_is_run_again_and_nothing_is_timed_that_is_wrong(card: Path) -> None:
    (card / "correctness-fails").touch()
    assert ran(card, 2) == "correctness pages"
    (card / "correctness-fails").unlink()
    (card / "kernels-fails").touch()
    assert ran(card, 2) == " ".join(STAGES)
    (card / "kernels-fails").unlink()
    assert ran(card) == "kernels pages"


@pytest.mark.parametrize(("minutes", "interrupt"), [("0.02", False), ("1", True)], ids=["late", "interrupted"])
def test_a_stage_that_is_late_or_interrupted_is_ended_with_what_it_started(
    card: Path, minutes: str, interrupt: bool
) -> None:
    (card / "slow.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, file=open('child', 'w'))\n"
        "child.wait()\n"
    )
    started = time.perf_counter()
    running = make(
        card, f"correctness={minutes}m {sys.executable} slow.py", f"pages=1m {sys.executable} stage.py pages"
    )
    while not (card / "child").exists() or not (card / "child").read_text():
        assert time.perf_counter() - started < 30
        time.sleep(0.01)
    if interrupt:
        os.killpg(running.pid, signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode != 0
    assert not list(card.glob(".gpu/*/*/*"))
    assert (card / "log").exists() != interrupt  # the pages come after what was late
    child = Path(f"/proc/{(card / 'child').read_text().strip()}/stat")
    while child.exists() and child.read_text().split()[2] != "Z":  # it is dead when the system has seen to it
        assert time.perf_counter() - started < 30
        time.sleep(0.01)


def test_without_a_card_nothing_is_run() -> None:
    none = make(ROOT, CUDA_VISIBLE_DEVICES="")
    said = none.communicate()[0]
    assert none.returncode == 2
    assert said.endswith("no CUDA device is available; nothing was run (make gpu-dry-run needs none).  Stop.\n")


def test_it_takes_less_than_25_minutes() -> None:
    minutes = re.findall(r"^(\S+) := (\d+)m ", RULES.read_text(), re.MULTILINE)
    assert tuple(stage for stage, _ in minutes) == STAGES
    assert sum(int(most) for _, most in minutes) <= 25
