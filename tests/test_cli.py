"""The command line: what it refuses, in one line and before any work, and the synthetic command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rollout.cli import app, main
from rollout.data.synthetic import write_synthetic_cohort


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


def test_overwrite_removes_an_earlier_demo_and_nothing_else(tmp_path: Path) -> None:
    from rollout.demo.run import _remove_earlier

    for name in ("attributed/attributions/part-00000.parquet", ".pyhealth-cache/prepared.json", "cohort/hosp/x.csv.gz"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for name in ("demo.json", "run.toml", "weights.pt", "record.png", "report.html", "notes.txt"):
        (tmp_path / name).touch()
    _remove_earlier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwrite_leaves_a_folder_that_is_no_demo(tmp_path: Path) -> None:
    from rollout.demo.run import _remove_earlier

    (tmp_path / "cohort").mkdir()
    (tmp_path / "weights.pt").write_text("mine")
    _remove_earlier(tmp_path)
    assert (tmp_path / "cohort").is_dir()
    assert (tmp_path / "weights.pt").read_text() == "mine"


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyhealth", None)
    status, err = run(["demo", "--output", "never"], capsys, monkeypatch)
    assert status == 2
    assert "pip install 'attention-rollout[pyhealth]'" in err


def test_the_command_line_starts_without_pyhealth() -> None:
    code = "import sys, rollout.cli; print([m for m in ('pyhealth', 'pyarrow', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
