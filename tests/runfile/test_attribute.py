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
from tests.support import toy_cohort

ENTRY = '''
from tests.support import toy_cohort
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


def reads():
    return open("nowhere.pt")


def two_lines():
    raise RuntimeError("one\\ntwo")


def wrong_model():
    return {}, dataset("flat")


def wrong_dataset():
    return transformer("flat"), 3


def four():
    return transformer("flat"), dataset("flat"), {}, {}


def bare_collate():
    return transformer("flat"), dataset("flat"), toy_cohort.collate


def misspelt():
    return transformer("flat"), dataset("flat"), {"colate": toy_cohort.collate}


def elsewhere():
    return transformer("flat"), dataset("flat"), {"out": "/"}


def own():
    return toy_cohort.Attention(), toy_cohort.Records(30), {
        "collate": toy_cohort.collate, "vocabularies": toy_cohort.VOCABULARIES, "explain": toy_cohort.explain,
        "part_samples": 10, "batch_tokens": 60,
    }


number = 3
'''


@pytest.fixture
def run(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # status, stdout and stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "entries", raising=False)
    (tmp_path / "entries.py").write_text(ENTRY)
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
        (
            ("--entry", "entries:nothing"),
            "--entry entries:nothing must return (model, dataset) or (model, dataset, arguments), got NoneType",
        ),
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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("entries:raises", "RuntimeError: --entry entries:raises raised KeyError: 'weights' (ROLLOUT_DEBUG=1 shows"),
        ("entries:reads", "RuntimeError: --entry entries:reads raised FileNotFoundError: [Errno 2] No such file"),
        ("entries:wrong_model", "TypeError: attribute_cohort: model must be a torch.nn.Module, got dict"),
        ("entries:wrong_dataset", "got int"),
        ("entries:two_lines", "RuntimeError: --entry entries:two_lines raised RuntimeError: one two (ROLLOUT"),
        (
            "entries:four",
            "--entry entries:four must return (model, dataset) or (model, dataset, arguments), got tuple of 4",
        ),
        ("entries:bare_collate", "--entry entries:bare_collate must return as arguments a mapping such as"),
        ("entries:misspelt", "--entry entries:misspelt returned the argument 'colate'; did you mean \"collate\"?"),
        (
            "entries:elsewhere",
            "--entry entries:elsewhere returned the argument 'out'; did you mean \"readout\"? It may",
        ),
        ("broken:f", "RuntimeError: --entry broken:f: importing it raised ZeroDivisionError: division by zero"),
        (
            "lacking:f",
            "RuntimeError: --entry lacking:f: importing it raised ModuleNotFoundError: No module named 'no_such'",
        ),
    ],
)
def test_what_goes_wrong_in_an_entry_point_is_one_line(run: Any, tmp_path: Path, entry: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "lacking.py").write_text("import no_such\n")
    status, out, err = attribute(run, "--entry", entry)
    assert (status, out) == (2, "")
    assert err.startswith("rollout: ")
    assert message in err
    assert err.count("\n") == 1


def test_debug_shows_where(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["rollout", "attribute", "--entry", "entries:raises", "--output", "out"])
    with pytest.raises(RuntimeError, match="--entry entries:raises raised KeyError: 'weights'") as caught:
        main()
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_entry_point_of_a_model_and_data_of_ones_own(run: Any, tmp_path: Path) -> None:
    assert attribute(run, "--entry", "entries:own", "--batch-tokens", 120)[0] == 0
    toy_cohort.attribute(tmp_path / "direct", count=30, part_samples=10)
    toy_cohort.assert_same(tmp_path / "direct", tmp_path / "out")
    status, _, err = attribute(run, "--entry", "entries:own")  # the function's own batch_tokens now
    assert status == 2
    assert "plan.batch_tokens: 120 there, 60 now" in err


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
    module.write_report = lambda path, *rest, **named: f"{path} {rest} {named}"
    monkeypatch.setitem(sys.modules, "rollout.report", module)
    given = "'names': None, 'evaluation': None, 'overwrite': False"
    assert run("report", "out", "--patient", "p1")[:2] == (0, f"out (None,) {{'patient': 'p1', {given}}}\n")
    given = "'patient': None, 'names': PosixPath('n.json'), 'evaluation': PosixPath('ev'), 'overwrite': True"
    options = ("--output", "a.html", "--names", "n.json", "--evaluation", "ev", "--overwrite")
    assert run("report", "out", *options)[:2] == (
        0, f"out (PosixPath('a.html'),) {{{given}}}\n"
    )  # fmt: skip


def test_trusting_a_cache_is_for_run_files(run: Any) -> None:
    status, _, err = attribute(run, "--entry", "entries:good", "--trust-cache")
    assert status == 2
    assert "--trust-cache is for the cache of a run file" in err
