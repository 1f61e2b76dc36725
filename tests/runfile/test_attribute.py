"""`rollout attribute` and `rollout report`: what they refuse, what they print, and the exit status."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

import rollout.runfile.start as start
from rollout.cli import main
from rollout.errors import CohortError

ENTRY = '''
from tests.support.pyhealth_models import dataset, transformer


class Samples:
    """The samples of a data set, one of which cannot be read."""

    def __init__(self, bad=()):
        self.data, self.bad = dataset("flat"), bad
        self.input_processors, self.output_processors = self.data.input_processors, self.data.output_processors

    def __len__(self):
        return len(self.data)

    def __getitem__(self, number):
        if number in self.bad:
            raise OSError("no such page")
        return self.data[number]


def good():
    return transformer("flat"), dataset("flat")


def partly():
    return transformer("flat"), Samples(bad=(2,))


def nothing():
    return None


def raises():
    raise KeyError("weights")


number = 3
'''


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # status, stdout and stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "entries", raising=False)
    (tmp_path / "entries.py").write_text(ENTRY)

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rollout", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


def attribute(run: Any, *arguments: object) -> tuple[int, str, str]:
    return run("attribute", "--output", "out", *arguments)


def test_an_entry_point_is_attributed_then_found_complete(run: Any, tmp_path: Path) -> None:
    status, out, _ = attribute(run, "--entry", "entries:good", "--batch-tokens", 40)
    assert status == 0
    assert out.startswith("6 of 6 samples attributed: ")
    rows = pl.read_parquet(tmp_path / "out" / "attributions" / "*.parquet")
    assert f": {len(rows):,} rows," in out
    assert rows["sample"].unique().sort().to_list() == list(range(6))
    status, out, _ = attribute(run, "--entry", "entries:good", "--batch-tokens", 40)
    assert (status, out.splitlines()[0]) == (0, f"6 samples, all done before: 6 attributed, {len(rows):,} rows")
    status, _, err = attribute(run, "--entry", "entries:good", "--batch-tokens", 50)
    assert status == 2
    assert "plan.batch_tokens: 40 there, 50 now" in err
    status, _, err = attribute(run, "--entry", "entries:good", "--batch-tokens", 40, "--no-resume")
    assert status == 2
    assert err.startswith("rollout: attribute_cohort: out holds a run already")


def test_failed_samples_end_with_status_1(run: Any, tmp_path: Path) -> None:
    status, out, _ = attribute(run, "--entry", "entries:partly")
    assert status == 1
    assert "5 of 6 samples attributed" in out
    assert "1 FAILED" in out
    failures = pl.read_parquet(tmp_path / "out" / "failures" / "*.parquet")
    assert failures["sample"].to_list() == [2]
    assert "no such page" in failures["error"][0]
    assert attribute(run, "--entry", "entries:partly", "--retry-failures")[0] == 1


def test_a_class_specific_method_takes_a_class(run: Any, tmp_path: Path) -> None:
    status, _, _ = attribute(run, "--entry", "entries:good", "--method", "chefer", "--target-class", 0)
    assert status == 0
    assert pl.read_parquet(tmp_path / "out" / "predictions" / "*.parquet")["target_class"].to_list() == [0] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "attribute needs a run file or --entry, one of them"),
        (("run.toml", "--entry", "entries:good"), "attribute needs a run file or --entry, one of them"),
        (("nowhere.toml",), "a run file must be a TOML or JSON file, got nowhere.toml: No such file or directory"),
        (("--entry", "entries"), "--entry must be package.module:function, got 'entries'"),
        (("--entry", "entries:good()"), "--entry must be package.module:function, got 'entries:good()'"),
        (("--entry", "nowhere.at_all:f"), "there is no module nowhere to import from"),
        (("--entry", "entries:missing"), "entries has no function missing"),
        (("--entry", "entries:number"), "entries has no function number"),
        (("--entry", "entries:nothing"), "--entry entries:nothing must return (model, dataset), got NoneType"),
        (
            ("--entry", "entries:good", "--batch-tokens", 0),
            "--batch-tokens must be a whole number from 1 to 16,777,216, got 0",
        ),
        (
            ("--entry", "entries:good", "--local-workers", 0),
            "--local-workers must be a whole number from 1 to 512, got 0",
        ),
        (("--entry", "entries:good", "--method", "chefr"), "--method must be one of rollout,"),
        (("--entry", "entries:good", "--device", "abacus"), "--device must be a torch device"),
        (("--entry", "entries:good", "--target-class", 1), "--target-class is for class-specific methods"),
        (("--entry", "entries:good", "--scheduler", "a", "--local-workers", 2), "give --local-workers (processes of"),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_2(
    run: Any, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    status, out, err = attribute(run, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("rollout: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_scheduler_that_does_not_answer_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(address: str, timeout: str) -> None:
        raise OSError(f"Timed out trying to connect to {address} after 10 s")

    monkeypatch.setitem(sys.modules, "dask.distributed", ModuleType("dask.distributed"))
    monkeypatch.setattr(sys.modules["dask.distributed"], "Client", unreachable, raising=False)
    status, _, err = attribute(run, "--entry", "entries:good", "--scheduler", "tcp://nowhere:1")
    assert status == 2
    assert "--scheduler must be the address of a running Dask scheduler" in err
    assert "Timed out trying to connect to tcp://nowhere:1" in err


def test_entry_needs_an_output_and_keeps_what_is_there(run: Any, tmp_path: Path) -> None:
    assert (
        run("attribute", "--entry", "entries:good")[2] == "rollout: --entry needs --output, a folder for the results\n"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    status, _, err = attribute(run, "--entry", "entries:raises")
    assert status == 2
    assert "out must be a new or empty folder" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_an_entry_point_that_raises_shows_where(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rollout", "attribute", "--entry", "entries:raises", "--output", "out"])
    with pytest.raises(RuntimeError, match="--entry entries:raises raised KeyError: 'weights'") as caught:
        main()
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "rollout: interrupted; the same command goes on where it stopped\n"),
        (CohortError("attribute_cohort: the disk is full"), 2, "rollout: attribute_cohort: the disk is full\n"),
    ],
)
def test_what_stops_a_run_is_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(start, "attribute_cohort", stopped)
    ended, out, err = attribute(run, "--entry", "entries:good")
    assert (ended, out, err) == (status, "", line)


def test_report_passes_its_arguments_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("rollout.report")
    module.write_report = lambda path, output, patient, names: f"{path} {output} {patient} {names}"
    monkeypatch.setitem(sys.modules, "rollout.report", module)
    assert run("report", "out", "--patient", "p1")[:2] == (0, "out None p1 None\n")
    assert run("report", "out", "--output", "a.html", "--names", "n.json")[:2] == (0, "out a.html None n.json\n")
