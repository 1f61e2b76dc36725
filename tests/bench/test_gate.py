"""The regression gate: its two trees, and whole runs on a small repository."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gate import cases, processes
from bench.gate import compare as gate
from bench.gate.cases import Case
from bench.gate.paired import REPEATS, Interval, Pairs, sign_interval
from bench.gate.processes import Duel
from bench.gate.trees import GateError, compile_native, trees
from rollout.bench import end_to_end
from rollout.bench.measure import relative_error

ROOT = Path(__file__).resolve().parents[2]

# --- a small repository: two commits of a package `rollout` that computes the row by the formula

PACKAGE = """
import torch
print("no line of the table", flush=True)
def attention_rollout(maps, query):
    times, error = TIMES, ERROR if maps[0].shape[-1] == 128 else 0.0
    for _ in range(times):
        row = None
        for a in reversed(maps):
            m = a.mean(1).double() + torch.eye(a.shape[-1])
            m = m / m.sum(-1, keepdim=True)
            row = m[:, :1] if row is None else row @ m
    return row[:, 0] * (1 + error)
"""
LATER = """
def attention_rollout_qk(queries, keys, query):
    return attention_rollout([torch.softmax(q @ k.mT / 8, -1) for q, k in zip(queries, keys)], query)
"""


def package(times: int = 1, error: float = 0.0, more: str = "") -> str:
    return PACKAGE.replace("TIMES", str(times)).replace("ERROR", str(error)) + more


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "-c", "core.hooksPath="]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tags: `none` without a package, `right`, `bad` (eight times the work; wrong at S=128; Q and K as well)."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q", "-b", "main")
    (folder / ".gitignore").write_text("*.ignored\n")
    (folder / "pyproject.toml").touch()
    (folder / "kernels").mkdir()
    (folder / "kernels" / "readme").write_text("x")
    (folder / "kernels" / "tracked.ignored").write_text("x")
    git(folder, "add", "-A")
    git(folder, "add", "-f", "kernels")
    git(folder, "commit", "-q", "-m", "no package")
    git(folder, "tag", "none")
    (folder / "rollout").mkdir()
    for tag, text in (("right", package()), ("bad", package(8, 1e-3, LATER))):
        (folder / "rollout" / "__init__.py").write_text(text)
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", f"commit {tag}")
        git(folder, "tag", tag)
    return folder


@pytest.fixture
def repository(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The gate's own."""
    monkeypatch.setattr(gate, "ROOT", made)
    return made


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def left_behind(repository: Path, temporary: Path) -> list[str]:
    worktrees = git(repository, "worktree", "list").splitlines()[1:]
    return [*worktrees, *(path.name for path in temporary.iterdir())]


def test_both_revisions_lie_side_by_side_and_are_gone_afterwards(repository: Path, temporary: Path) -> None:
    with trees(repository, "right", "bad") as (folder, labels):
        assert folder.parent == temporary
        assert (folder / "base" / "rollout" / "__init__.py").read_text() == package()
        assert (folder / "head" / "rollout" / "__init__.py").read_text() == package(8, 1e-3, LATER)
        assert labels["base"].endswith("(commit right)")
    assert left_behind(repository, temporary) == []


def test_the_head_is_the_checkout_as_it_is(repository: Path, temporary: Path) -> None:
    index = (repository / ".git" / "index").read_bytes()
    objects = sorted((repository / ".git" / "objects").rglob("*"))
    (repository / "rollout" / "__init__.py").write_text("changed = True\n")
    (repository / "rollout" / "new.py").write_text("new = True\n")
    (repository / "rollout" / "x.ignored").write_text("")
    (repository / "kernels" / "readme").unlink()
    (repository / "pyproject.toml").write_text("# changed\n")
    try:
        with trees(repository, "right", str(repository)) as (folder, labels):
            head = folder / "head"
            files = {str(path.relative_to(head)): path.read_text() for path in head.rglob("*") if path.is_file()}
            assert files.pop("pyproject.toml") == "# changed\n"
            assert files.pop("kernels/tracked.ignored") == "x"
            assert files.keys() == {".gitignore", "rollout/__init__.py", "rollout/new.py"}
            assert files["rollout/__init__.py"] == "changed = True\n"
            assert labels["head"].endswith("with changes")
            assert (repository / ".git" / "index").read_bytes() == index
            assert sorted((repository / ".git" / "objects").rglob("*")) == objects
            assert (folder / "base" / "rollout" / "__init__.py").read_text() == package()
    finally:
        git(repository, "checkout", "-q", "--", ".")
        git(repository, "clean", "-qfx")
    assert left_behind(repository, temporary) == []


NATIVE = """
[build-system]
requires = ["setuptools"]
[project]
name = "something"
version = "0"
[tool.setuptools.packages.find]
where = ["kernels"]
[[tool.setuptools.ext-modules]]
name = "compute._native._one"
sources = ["kernels/compute/_native/one.c"]
optional = true
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize(("text", "number"), [("int one(void) { return 1; }", 1), ("no C", 0)])
def test_what_a_revision_compiles_is_compiled_in_its_tree(tmp_path: Path, text: str, number: int) -> None:
    """Else a revision with a compiled kernel would be timed without it; one that cannot be compiled is."""
    native = tmp_path / "kernels" / "compute" / "_native"
    native.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(NATIVE)
    for folder in (native, native.parent):
        (folder / "__init__.py").touch()
    (native / "one.c").write_text(text)
    compile_native(tmp_path)
    assert len(list(native.glob("_one*.so"))) == number


def test_nothing_is_left_behind_by_a_failure(repository: Path, temporary: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), trees(repository, "right", "bad"):
        raise RuntimeError("in the middle")
    assert left_behind(repository, temporary) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_behind_by_a_signal(repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys; from pathlib import Path; from bench.gate.trees import trees\n"
        f"with trees(Path({str(repository)!r}), 'right', 'bad'):\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert len(left_behind(repository, tmp_path)) == 1
    process.send_signal(number)
    assert process.wait(30) != 0
    process.communicate()
    assert left_behind(repository, tmp_path) == []


@pytest.mark.parametrize("revision", ["no-such", "right~9", "--all", "", "rollout"])
def test_a_bad_revision_is_one_line_and_status_2(
    repository: Path, temporary: Path, capsys: pytest.CaptureFixture, revision: str
) -> None:
    assert gate.main([f"--base={revision}", "--head", "right"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"bench.gate: {revision!r} is no revision of {repository}" in printed.err
    assert left_behind(repository, temporary) == []


def test_an_interruption_is_told_and_leaves_nothing(
    repository: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(folder: Path, options: object) -> None:
        assert (folder / "head" / "rollout").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(gate, "compare", interrupt)
    assert gate.main(["--base=right", "--head=bad"]) == 130
    assert "bench.gate: interrupted; nothing is left behind" in capsys.readouterr().err
    assert left_behind(repository, temporary) == []


def test_a_record_that_cannot_be_written_is_status_2(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """1 would say that the head is slower."""
    same = gate.Result("one", "same", Interval(1.0, 1.0, 1.0), ((1.0, 1.0),) * 6)
    monkeypatch.setattr(gate, "compare", lambda folder, options: [same])
    assert gate.main(["--base=right", "--head=bad"]) == 0
    assert gate.main(["--base=right", "--head=bad", "--json", str(tmp_path)]) == 2
    assert "bench.gate: [Errno 21] Is a directory" in capsys.readouterr().err


def test_a_revision_without_the_package_is_refused(repository: Path, temporary: Path) -> None:
    with pytest.raises(GateError, match=r"\(no package\) has no package rollout"), trees(repository, "none", "bad"):
        pass
    assert left_behind(repository, temporary) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--rounds=5", "--rounds must be at least 6"),
        ("--threshold=0", "--threshold must be a share"),
        ("--threads=0", "--threads must be at least 1"),
        ("--device=abacus", "invalid choice: 'abacus'"),
        ("--only=nothing like it", "is in no case's name: rows from maps S=64, "),
        ("--json=/no/such/folder/x.json", "there is no folder /no/such/folder"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture, option: str, message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        gate.main(["--base=HEAD", option])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --- what is timed at all

EXACT = torch.tensor([1.0, 2.0], dtype=torch.float64)
RIGHT, OFF, BROKEN = EXACT.numpy(), EXACT.numpy() * (1 + 2e-6), EXACT.numpy() * float("nan")


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        (RIGHT, RIGHT, ("", "")),
        ("A: b", RIGHT, ("skipped", "the base does not run it: A: b")),
        ("A: b", "A: c", ("skipped", "neither revision runs it: A: c")),
        (RIGHT, "A: b", ("wrong", "the head does not run it: A: b")),
        (OFF, "A: b", ("wrong", "the head does not run it: A: b")),
        ("A: b", OFF, ("wrong", "the head is 2.0e-06 off float64, allowed 1e-06")),
        (RIGHT, OFF, ("wrong", "the head is 2.0e-06 off float64, allowed 1e-06")),
        (OFF, RIGHT, ("skipped", "the base is 2.0e-06 off float64, allowed 1e-06")),
        (RIGHT, BROKEN, ("wrong", "the head is inf off float64, allowed 1e-06")),
        (RIGHT, RIGHT[:1], ("wrong", "the head is inf off float64, allowed 1e-06")),
    ],
)
def test_what_is_not_timed(base: Any, head: Any, expected: tuple[str, str]) -> None:
    assert gate.check(Case(torch.Tensor, EXACT, 1e-6), base, head) == expected


# --- whole runs


def test_an_unchanged_revision_passes(
    repository: Path, temporary: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    file = tmp_path / "record.json"
    given = ["--head", "right", "--only", "maps S=64", "--rounds", "12", "--threads=1", "--json", str(file)]
    assert gate.main(["--base=right", *given]) == 0
    printed, errors = capfd.readouterr()
    assert "passed: no case is slower by more than 10%" in printed
    assert "no line of the table" not in printed
    assert "no line of the table" in errors
    (result,) = json.loads(file.read_text())["results"]
    assert result["case"] == "rows from maps S=64"
    assert len(result["pairs"]) in (12, 12 * REPEATS)
    assert result["ratio"]["estimate"] == sign_interval([head / base for base, head in result["pairs"]]).estimate
    assert f"{result['ratio']['estimate']:.3f}" in printed
    assert left_behind(repository, temporary) == []
    assert multiprocessing.active_children() == []


def test_slower_wrong_and_missing_cases_are_told_apart(
    repository: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ("rows from maps S=64", "rows from maps S=128", "rows from Q,K S=256")
    monkeypatch.setattr(gate, "REPEATS", 1)  # each starts two processes
    monkeypatch.setattr(gate, "CASES", {name: cases.CASES[name] for name in names})
    file = tmp_path / "record.json"
    assert gate.main(["--base=right", "--head=bad", "--rounds=10", "--threads=1", "--json", str(file)]) == 1
    wrong, missing, slow = json.loads(file.read_text())["results"]
    assert (slow["case"], slow["verdict"], len(slow["pairs"])) == (names[0], "slower", 10)
    assert 2 < slow["ratio"]["estimate"] < 16  # eight times the work, on a machine that may be busy
    assert (wrong["case"], wrong["verdict"], wrong["pairs"]) == (names[1], "wrong", [])
    assert wrong["reason"] == "the head is 1.0e-03 off float64, allowed 1e-06"
    assert (missing["case"], missing["verdict"]) == (names[2], "skipped")
    assert missing["reason"].startswith("the base does not run it: AttributeError")
    assert "FAILED: 1 slower by more than 10%, 1 wrong" in capsys.readouterr().out


def measured(monkeypatch: pytest.MonkeyPatch, *found: float | str) -> list[gate.Result]:
    """What is made of one case whose measurements give these ratios in turn, or a reason why there is none."""
    measurements = iter(found)

    class Measured(contextlib.ExitStack):
        def prepare(self, run: object) -> dict[str, Any]:
            self.found = next(measurements)
            return dict.fromkeys(("base", "head"), self.found if isinstance(self.found, str) else RIGHT)

        def measure(self, pairs: int, generator: object) -> Pairs:
            return ((1.0, self.found),) * pairs

    monkeypatch.setattr(gate, "Duel", lambda *given: Measured())
    monkeypatch.setattr(gate, "CASES", {"one": lambda: Case(torch.Tensor, EXACT, 1e-6)})
    return list(gate.compare(Path(), gate._options(["--base=HEAD"])))


def test_a_suspected_case_is_judged_by_new_processes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, verdict in (((1.09,), "same"), ((1.3, 1.02, 1.02, 1.02), "same"), ((1.3, 1.2, 1.2, 1.2), "slower")):
        (result,) = measured(monkeypatch, *found)
        assert (result.verdict, len(result.pairs)) == (verdict, 32 * max(1, len(found) - 1))
        assert result.ratio.estimate == found[-1]


def test_a_case_that_can_no_longer_be_timed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GateError, match=r"^one could be timed, and in new processes cannot: neither .* A: b$"):
        measured(monkeypatch, 1.3, "A: b")


@pytest.mark.parametrize(
    ("verdicts", "status", "line"),
    [
        (["same", "unclear", "skipped"], 0, "passed: no case is slower by more than 10%\nunclear: slower by"),
        (["skipped"], 2, "nothing was compared"),
        (["same", "wrong"], 1, "FAILED: 0 slower by more than 10%, 1 wrong"),
        (["slower"], 1, "FAILED: 1 slower by more than 10%, 0 wrong"),
    ],
)
def test_exit_status(verdicts: list[str], status: int, line: str) -> None:
    results = [gate.Result("", each, reason="why" if each in ("skipped", "wrong") else "") for each in verdicts]
    found, said = gate.summarise(results, 0.10)
    assert found == status
    assert said.startswith(line)


def test_a_process_that_ends_is_told_with_its_last_words(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Here of a revision that cannot be imported, and of one in whose stead the gate's own would be."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "rollout.py").write_text("raise RuntimeError('no such luck')\n")
    with Duel(tmp_path, "cpu", 1) as duel:
        for side in ("base", "head"):
            with pytest.raises(GateError, match=f"{side}'s process ended with status 1"):
                duel._ask((side,), "prepare", tmp_path)
    errors = capfd.readouterr().err
    assert "RuntimeError: no such luck" in errors
    assert f"ImportError: rollout must come from {tmp_path / 'head'}, got {ROOT}" in errors
    assert multiprocessing.active_children() == []


def test_what_hangs_is_told_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    monkeypatch.setattr(processes, "GRACE", 0.1)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "rollout.py").write_text("while True: pass\n")
    with Duel(tmp_path, "cpu", 1) as duel, pytest.raises(GateError, match="base gave no answer for 0 s"):
        duel._ask(("base", "head"), "prepare", tmp_path)
    assert multiprocessing.active_children() == []


def test_the_case_of_pyhealths_transformer_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")
    monkeypatch.setattr(end_to_end, "LONGEST", 30)
    monkeypatch.setattr(cases, "BATCH", 4)
    case = cases._attributed(16, 2, 2, real=False)
    torch.save(case.run, tmp_path / "case")  # as it comes to the processes
    found = torch.load(tmp_path / "case", weights_only=False)()
    assert relative_error(found, case.exact) <= case.allowed < 1e-4
