"""The command line: what it refuses, in one line and before any work, and the synthetic command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rollout.cli import app, main
from rollout.data.synthetic import write_synthetic_cohort
from tests.support.written_run import Record, Run, write_run


def run(arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run the console entry point; return its status and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["rollout", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):  # the demo must stop before it reads a table or imports PyHealth's data sets
    import rollout.demo.run

    def worked(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(rollout.demo.run, "prepare_samples", worked)
    monkeypatch.setattr(rollout.demo.run, "write_synthetic_cohort", worked)
    return lambda *arguments: run(["demo", *map(str, arguments)], capsys, monkeypatch)


def test_synthetic_writes_a_cohort(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["synthetic", str(tmp_path / "c"), "--patients", "30", "--seed", "4"])
    assert result.exit_code == 0, result.output
    truth = json.loads((tmp_path / "c" / "truth.json").read_text())
    assert (truth["patients"], truth["seed"]) == (30, 4)
    assert f"30 patients, {truth['admissions']} admissions, 11 planted codes" in result.output
    write_synthetic_cohort(tmp_path / "d", 30, 4)
    for path in (tmp_path / "c").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "d" / path.relative_to(tmp_path / "c")).read_bytes()


def test_synthetic_refuses_a_folder_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").touch()
    status, err = run(["synthetic", str(tmp_path)], capsys, monkeypatch)
    assert status == 2
    assert err.startswith("rollout: write_synthetic_cohort: root must be a new or empty folder")
    assert err.count("\n") == 1


def test_demo_refuses_an_output_in_use(refused, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for more in ((), ("--overwrite",)):
        status, err = refused("--output", tmp_path, *more)
        assert status == 2
        assert "output must be a new or empty folder" in err
        assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_demo_refuses_an_output_that_is_a_file_or_cannot_be_made(refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, err = refused("--output", tmp_path / "file")
    assert status == 2
    assert "output must be a folder, got the file" in err
    status, err = refused("--output", tmp_path / "file" / "below")
    assert status == 2
    assert "output must be a folder that can be written" in err


def test_demo_refuses_what_is_no_mimic_folder_and_leaves_the_output_unmade(refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, err = refused("--output", tmp_path / "out", "--ehr-root", tmp_path / "empty")
    assert status == 2
    assert "missing hosp/patients.csv[.gz]" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--patients", 0, "patients must be at least 1, got 0"),
        ("--batch-size", 0, "batch_size must be at least 1, got 0"),
        ("--epochs", 0, "epochs must be at least 1, got 0"),
        ("--seed", -1, "seed must not be negative, got -1"),
        ("--device", "abacus", "device must be a torch device"),
    ],
)
def test_demo_refuses_numbers_out_of_range(refused, tmp_path: Path, option: str, value: object, message: str) -> None:
    status, err = refused("--output", tmp_path / "out", option, value)
    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def write_demo(folder: Path, *absent: str) -> None:
    from rollout.demo.run import WRITTEN, _write_mark

    for name in ("attributed/attributions/part-00000.parquet", ".pyhealth-cache/prepared.json", "cohort/hosp/x.csv.gz"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    for name in ("run.toml", "weights.pt", "record.png", "report.html", "notes.txt"):
        (folder / name).touch()
    _write_mark(folder, {"status": "complete"}, [name for name in WRITTEN if name not in absent])


def test_overwrite_removes_an_earlier_demo_and_nothing_else(tmp_path: Path) -> None:
    from rollout.demo.run import _remove_earlier

    write_demo(tmp_path)
    _remove_earlier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwrite_leaves_what_the_demo_did_not_write(tmp_path: Path) -> None:
    from rollout.demo.run import _remove_earlier

    write_demo(tmp_path / "tables", "cohort")  # a demo of EHR_ROOT, beside which somebody keeps a folder of that name
    _remove_earlier(tmp_path / "tables")
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"cohort", "notes.txt"}
    write_demo(tmp_path / "linked")
    shutil.rmtree(tmp_path / "linked" / "attributed")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").touch()
    (tmp_path / "linked" / "attributed").symlink_to(tmp_path / "elsewhere")
    _remove_earlier(tmp_path / "linked")
    assert (tmp_path / "elsewhere" / "thesis.tex").exists()
    assert (tmp_path / "linked" / "attributed").is_symlink()


@pytest.mark.parametrize("mark", [None, "", "[]", '{"written_by": "rollout demo"}', "shipped", "changed"])
def test_overwrite_leaves_a_folder_that_is_no_demo_of_this_user(mark: str | None, tmp_path: Path) -> None:
    from rollout.demo.run import _remove_earlier

    write_demo(tmp_path)
    if mark in ("shipped", "changed"):
        record = json.loads((tmp_path / "demo.json").read_text())
        changed = {"seal": "0" * 64} if mark == "shipped" else {"wrote": [*record["wrote"], "notes.txt"]}
        (tmp_path / "demo.json").write_text(json.dumps({**record, **changed}))
    else:
        (tmp_path / "demo.json").unlink()
        if mark is not None:
            (tmp_path / "demo.json").write_text(mark)
    before = sorted(tmp_path.rglob("*"))
    _remove_earlier(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyhealth", None)
    status, err = run(["demo", "--output", "never"], capsys, monkeypatch)
    assert status == 2
    assert "pip install 'attention-rollout[pyhealth]'" in err


def test_the_command_line_starts_without_pyhealth() -> None:
    code = "import sys, rollout.cli; print([m for m in ('pyhealth', 'pyarrow', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [("-m", "rollout"), ("-c", "from rollout.__main__ import main; main()")])
def test_without_the_extra_one_line_says_which(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, *command, "doctor"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "rollout: typer is not installed; it comes with an extra: pip install 'attention-rollout[cohort]'\n"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines"), "rollout: two lines"),
        (OSError(36, "File name too long", "a\x1b[31m\u202e"), "rollout: OSError: [Errno 36] File name too long: "
         "'a\\x1b[31m\\u202e' (ROLLOUT_DEBUG=1 shows where)"),
        (TypeError("wants \x07 a \udce4"), "rollout: TypeError: wants \\x07 a \\udce4 (ROLLOUT_DEBUG=1 shows where)"),
        (RuntimeError(), "rollout: RuntimeError: RuntimeError (ROLLOUT_DEBUG=1 shows where)"),
        (ValueError("x" * 9000), "rollout: " + "x" * 1999 + "…"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_or_with_its_traceback_if_asked_for(
    error: Exception, line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("rollout.doctor.lines", fail)
    assert run(["doctor"], capsys, monkeypatch) == (2, line + "\n")
    monkeypatch.setenv("ROLLOUT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["rollout", "doctor"])
    with pytest.raises(type(error)):
        main()


@pytest.mark.parametrize("path", ["~nouser-of-that-name/x", "a" * 300, "a/" * 3000])
@pytest.mark.parametrize("command", [("attribute", "{}"), ("report", "{}"), ("synthetic", "{}"),
                                     ("attribute", "--entry", "a:b", "--output", "{}"), ("demo", "--output", "{}"),
                                     ("demo", "--overwrite", "--output", "{}"), ("compare", "{}", "{}"),
                                     ("groups", "{}", "--feature", "a", "--by", "ccs")])  # fmt: skip
def test_paths_that_cannot_be_are_refused_in_one_line(
    command: tuple[str, ...], path: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("def b():\n    raise AssertionError('work began')\n")
    status, err = run([part.format(path) for part in command], capsys, monkeypatch)
    assert status == 2
    assert err.startswith("rollout: ")
    assert err.count("\n") == 1
    assert "work began" not in err
    assert "must be a path, got" in err


def write_pair(folder: Path, **options: object) -> tuple[str, str]:
    codes = ["I10", "4280", "=1+1", "E8889"]
    for name, scores in (("a", (0.5, 0.25, 0.25)), ("b", (0.25, 0.25, 0.5))):
        (folder / name).mkdir()
        entries = list(zip(codes, (*scores, 0.5), strict=True))
        records = [Record(f"p{place}", {"conditions": entries}) for place in range(8)]
        write_run(folder / name, records, Run(model="m.Other", **options))  # type: ignore[arg-type]
    return str(folder / "a"), str(folder / "b")


def test_compare_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    a, b = write_pair(tmp_path)
    result = CliRunner().invoke(app, ["compare", a, b, "--csv", str(tmp_path / "t.csv"), "--show", "1"])
    assert result.exit_code == 0, result.output
    assert "paired: the same 8 samples of 8 patients" in result.stdout
    assert "3 more codes" in result.stdout
    written = (tmp_path / "t.csv").read_text().splitlines()
    assert written[0].startswith("measure,feature,code,name,a,b,estimate,low,high,p,p_holm")
    assert len(written) == 1 + 4 + 3
    assert written[1].startswith("lift,conditions,4280,,")
    assert next(line for line in written if "=1+1" in line).startswith("lift,conditions,'=1+1,")


def test_groups_prints_chapters_and_writes_them(tmp_path: Path) -> None:
    a, _ = write_pair(tmp_path)
    arguments = ["groups", a, "--feature", "conditions", "--by", "icd-chapter", "--csv", str(tmp_path / "t.csv")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "ICD-9 390–459: Diseases of the circulatory system" in result.stdout
    assert "(no group)" in result.stdout
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + 4


@pytest.mark.parametrize(
    "command", [("compare", "{a}", "{b}"), ("groups", "{a}", "--feature", "conditions", "--by", "icd-chapter")]
)
def test_an_unfinished_run_is_told_in_one_line_and_a_file_is_never_replaced(
    command: tuple[str, ...], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a, b = write_pair(tmp_path, status="running")
    filled = [part.format(a=a, b=b) for part in command]
    status, err = run(filled, capsys, monkeypatch)
    assert (status, err.count("is not complete: 8 of 8")) == (0, filled.count(a) + filled.count(b))
    assert all(line.startswith("rollout: the run in") for line in err.splitlines())
    (tmp_path / "mine.csv").write_text("mine")
    status, err = run([*filled, "--csv", str(tmp_path / "mine.csv")], capsys, monkeypatch)
    assert (status, err.count("\n")) == (2, 1)
    assert "csv must be a new file" in err
    assert (tmp_path / "mine.csv").read_text() == "mine"


def test_groups_never_downloads_unasked(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a, _ = write_pair(tmp_path)
    monkeypatch.setattr("pyhealth.medcode.utils.MODULE_CACHE_PATH", str(tmp_path / "cache"))
    status, err = run(["groups", a, "--feature", "conditions", "--by", "ccs"], capsys, monkeypatch)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("rollout: by='ccs' needs PyHealth's table ICD10CM → CCSCM, which is not in its cache")
    assert "--download" in err
