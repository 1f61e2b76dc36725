"""A finished run attacked byte by byte: nothing is read silently different, and verifying names what is wrong."""

import itertools
import json
import random
import shutil
from pathlib import Path

import polars as pl
import pytest

from rollout.cli import main
from rollout.results.attributions import CohortAttributions
from rollout.results.verify import verify_folder
from rollout.runfile.verify import verify_run
from tests.support.toy_cohort import Attention, Records, attribute
from tests.support.written_run import edit

ATTACKS = 120
SPOILED = {21: "unreadable", 46: "unknown code"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 90 samples in 5 parts, with failures and names of codes."""
    out = tmp_path_factory.mktemp("cohort") / "whole"
    attribute(out, dataset=Records(90, SPOILED), code_names={"codes": {"c9": "Heart failure", "c10": "病"}})
    return out


def read(folder: Path) -> dict[str, object]:
    """Everything a reader gives of a folder."""
    cohort = CohortAttributions(folder)
    return {
        "manifest": cohort.manifest,
        "names": cohort.names,
        "sums": cohort.top_codes(minimum_records=0).to_dict(as_series=False),
        "patient": cohort.patient("p4 ").to_dict(as_series=False) if "p4 " in known(cohort) else None,
        **{kind: getattr(cohort, kind).collect().rows() for kind in ("attributions", "predictions", "failures")},
    }


def known(cohort: CohortAttributions) -> list[str]:
    return cohort.predictions.select(pl.col("patient_id").unique()).collect()["patient_id"].to_list()


def attack(folder: Path, rng: random.Random) -> str | None:
    """Damage a file, or two; None if nothing changed by it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    other = rng.choice([one for one in files if one.parent == path.parent])
    before = path.read_bytes()
    how, place = (
        rng.choice(("bit", "byte", "cut", "zeros", "longer", "swap", "copy", "gone")),
        rng.randrange(len(before)),
    )
    content = bytearray(other.read_bytes() if how in ("swap", "copy") else before)
    if how == "bit":
        content[place] ^= 1 << rng.randrange(8)
    elif how == "byte":
        content[place] = rng.randrange(256)
    elif how == "cut":
        del content[place:]
    elif how == "zeros":
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    elif how == "longer":
        content += rng.randbytes(1 + place % 40)
    elif how == "swap":
        other.write_bytes(before)
    if how == "gone":
        path.unlink()
    elif bytes(content) == before:
        return None
    else:
        path.write_bytes(content)
    return f"{how} {path.relative_to(folder)}"


def test_no_damage_is_read_silently_different(whole: Path, tmp_path: Path) -> None:
    """120 seeded flips, cuts, swaps, copies and removals of files: each is refused, or changes nothing that is read."""
    expected, attacks, refused = read(whole), [], 0
    for seed in itertools.count():
        folder = shutil.copytree(whole, tmp_path / str(seed))
        what = attack(folder, random.Random(seed))
        if what is not None:
            attacks.append(what)
            try:
                found = read(folder)
            except ValueError as error:
                found, refused = str(error), refused + 1
            assert found == expected or (isinstance(found, str) and str(folder) in found), what
            assert found == expected or verify_folder(folder), what
        shutil.rmtree(folder)
        if len(attacks) == ATTACKS:
            break
    assert refused > ATTACKS - 5  # another kind of space between two fields of a manifest changes nothing


def test_a_file_is_checked_once_and_again_when_it_changes(whole: Path, tmp_path: Path, monkeypatch) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    from rollout.results import folder as module

    checked: list[str] = []
    real = module.check_bytes

    def counting(path, wanted):
        checked.append(f"{path.parent.name}/{path.stem}")
        real(path, wanted)

    monkeypatch.setattr(module, "check_bytes", counting)
    cohort = CohortAttributions(folder)
    assert checked == []
    first = cohort.sample(45)
    assert checked == ["predictions/part-00002", "attributions/part-00002"]
    cohort.attributions.collect()
    cohort.top_codes()
    assert len(checked) == len(set(checked)) == 6
    assert cohort.sample(45).equals(first, null_equal=True)
    assert len(checked) == 6
    checked.clear()
    other = CohortAttributions(folder)
    other.patient(first["patient_id"][0])  # samples 44 and 45: of the attributions, the part that holds them
    assert checked == [f"predictions/part-0000{n}" for n in range(5)] + ["attributions/part-00002"]
    path = folder / "attributions" / "part-00002.parquet"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"attributions/part-00002\.parquet in .* does not hold the bytes .*SHA-256"):
        cohort.sample(45)
    assert cohort.sample(5).height > 0


def test_a_sound_folder_has_no_finding(whole: Path, capsys) -> None:
    assert verify_folder(whole) == []
    with pytest.raises(ValueError, match="no such folder"):
        verify_folder(whole / "none")
    with pytest.raises(ValueError, match=r"path must be a path, .*home directory"):
        verify_folder("~nouser/x")


def test_every_finding_is_named(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "attributions" / "part-00001.parquet").unlink()
    (folder / "predictions" / "part-00002.parquet").write_bytes(b"PAR1")
    (folder / "parts" / "part-00003.json").write_text("{}")
    (folder / "attributions" / "part-00009.parquet").write_bytes(b"")
    edit(folder / "parts" / "part-00004.json", batches=[1, 9])
    (folder / "code_names.json").write_text('{"codes": {"c9": "Hope"}}')
    found = "\n".join(verify_folder(folder))
    for what in (
        "attributions/part-00001.parquet in .*cannot be read: No such file",
        "predictions/part-00002.parquet in .*must have",
        "part-00003.json: run is missing", "must have 5 parts, as its manifest says, got 4",
        "manifest.json: parts must be those of the commit records", "no part holds the samples 60 … 79",
        "part-00009.parquet has no sound commit record", "code_names.json does not hold what was written",
        "attributions/part-00003.parquet has no sound commit record",
    ):  # fmt: skip
        assert pl.Series([found]).str.contains(f"(?s){what.replace('.', '[.]').replace('[.]*', '.*')}").item(), what
    (folder / "manifest.json").unlink()
    assert any("manifest.json cannot be read: No such file" in line for line in verify_folder(folder))


class Changed(Records):
    """Records of which some hold other values."""

    def __init__(self, count: int, numbers: set[int]) -> None:
        super().__init__(count)
        self.numbers = numbers

    def __getitem__(self, number: int) -> dict:
        return super().__getitem__(number + 2 if number in self.numbers else number)


def replaced():
    """An entry point whose dataset has a changed sample that no resume looks at for certain."""
    return Attention(), Changed(90, {47, 48, 3})


def same():
    return Attention(), Records(90)


def raising():
    raise KeyError("no such table")


def fewer():
    return Attention(), Records(89)


@pytest.mark.parametrize("command", [False, True])
def test_samples_are_compared_with_what_was_attributed(whole: Path, command: bool, capsys) -> None:
    def lines(entry: str) -> list[str]:
        if not command:
            return verify_run(whole, entry=f"{__name__}:{entry}")
        from typer.testing import CliRunner

        from rollout.cli import app

        done = CliRunner().invoke(app, ["verify", str(whole), "--entry", f"{__name__}:{entry}"])
        assert done.exit_code == (0 if entry == "same" else 2), done.output
        return [] if entry == "same" else done.output.splitlines()

    assert lines("same") == []  # also where samples failed: they may be mended
    assert lines("replaced") == [
        "part-00000: 1 samples hold other values than when they were attributed: 3",
        "part-00002: 2 samples hold other values than when they were attributed: 47, 48",
    ]
    assert lines("fewer") == [f"{whole} is of 90 samples, the dataset has 89"]


def test_an_entry_point_that_raises_is_named(whole: Path) -> None:
    with pytest.raises(RuntimeError, match=r"--entry .*:raising raised KeyError: 'no such table'"):
        verify_run(whole, entry=f"{__name__}:raising")
    with pytest.raises(ValueError, match="a run file or --entry, not both"):
        verify_run(whole, "run.toml", f"{__name__}:same")


def test_a_finding_is_a_line_whatever_the_folder_is_called(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(whole, tmp_path / "a 'run'\nof \"two\" lines\x1b[31m")
    (folder / "manifest.json").unlink()
    (folder / "attributions" / "part-00001.parquet").unlink()
    monkeypatch.setattr("sys.argv", ["rollout", "verify", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 2
    assert len(lines) == len(verify_folder(folder)) == 2
    assert all(line.isprintable() and "a 'run' of \"two\" lines" in line for line in lines)


def test_a_manifest_of_another_run_is_found(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    identity = json.loads((folder / "manifest.json").read_bytes())["identity"]
    edit(folder / "manifest.json", identity=identity | {"readout": "forward"})
    found = verify_folder(folder)
    assert len(found) == 5
    assert all("it is of another run" in line for line in found)
