"""Folders that are no sound run: damaged, edited, or of other columns, each refused by name."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.cohort.rows import parquet_bytes
from rollout.results.attributions import CohortAttributions
from rollout.results.manifest import signed
from rollout.results.verify import verify_folder
from tests.support.written_run import Record, edit, write_run

RECORDS = [
    Record("p0", {"drugs": [("a", 0.6), ("b", 0.3)], "visits": [(["x", "y", "x"], 0.1)]}, prob=(0.9,), true=(1.0,)),
    Record("p1", {"drugs": [("b", 0.5), ("a", 0.3), ("c", 0.2)]}, prob=(0.2,), true=(0.0,)),
    Record(
        "p0", {"drugs": [("c", 1.0)], "visits": [(["y"], 1.0)], "labs": [(None, 0.25, 1.5)]}, prob=(0.7,), true=(0.0,)
    ),
    Record("p2", {"drugs": [("a", 0.0), ("b", 0.0)]}, prob=(0.4,), true=(1.0,)),
]


def damaged(folder: Path, what: str) -> None:
    manifest = folder / "manifest.json"
    if what == "absent":
        manifest.unlink()
    elif what == "half":
        manifest.write_bytes(manifest.read_bytes()[:200])
    elif what == "edited":
        manifest.write_text(manifest.read_text().replace("demo", "domo"))
    elif what == "lost part":
        (folder / "parts" / "part-00001.json").unlink()
    elif what == "lost file":
        (folder / "attributions" / "part-00001.parquet").unlink()
    elif what == "truncated part":
        part = folder / "predictions" / "part-00000.parquet"
        part.write_bytes(part.read_bytes()[:-20])
    elif what == "copied record":
        (folder / "parts" / "part-00001.json").write_bytes((folder / "parts" / "part-00000.json").read_bytes())
    elif what == "another run":
        edit(folder / "parts" / "part-00001.json", run="0" * 64)
    else:
        edit(manifest, **{"version": {"schema_version": 9}, "status": {"status": "done"}}[what])


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("absent", r"it has no manifest\.json"),
        ("half", r"manifest\.json is damaged: .*run the same attribution again"),
        ("edited", r"manifest\.json is damaged, or was edited"),
        ("version", "schema_version must be 2, got 9: it was written by another version"),
        ("status", "status must be 'running', 'complete' or 'complete with failures', got 'done'"),
        ("lost part", "must have 2 parts, as its manifest says, got 1"),
        ("lost file", r"attributions/part-00001\.parquet in .* cannot be read: No such file"),
        ("truncated part", r"predictions/part-00000\.parquet in .* must have [\d,]+ bytes, .*got"),
        ("copied record", r"part-00001\.json: part must be that of the file's name, got 0"),
        ("another run", "it is of another run"),
    ],
)
def test_a_folder_that_is_no_sound_run_is_refused(tmp_path: Path, what: str, match: str) -> None:
    damaged(write_run(tmp_path, RECORDS, part_samples=2), what)
    with pytest.raises(ValueError, match=match):
        CohortAttributions(tmp_path)


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("identity", {}, "identity.model is missing"),
        ("identity", [], "identity must be a valid dictionary"),
        ("identity.model", "Transformer", "identity.model must be a valid dictionary, got 'Transformer'"),
        ("identity.model", 3, "identity.model must be a valid dictionary, got 3"),
        ("identity.method", [1], "identity.method must be a valid dictionary"),
        ("identity.method.discard_ratio", "0.9", "identity.method.discard_ratio must be a valid number"),
        ("identity.dataset.samples", -1, "identity.dataset.samples must be greater than or equal to 0"),
        ("counts", [], "counts must be a valid dictionary"),
        ("counts.rows", [1], r"counts.rows must be a valid integer, got \[1\]"),
        ("counts.rows", True, "counts.rows must be a valid integer, got True"),
        ("counts.attributed", 1, "counts of a complete run must add up to its 4 samples"),
        ("granularity", None, "granularity must be a valid dictionary"),
        ("granularity.drugs", "line", "granularity.drugs must be 'code', 'visit', 'feature' or 'step'"),
        ("sessions", [{"started": 1}], r"sessions\.0\.started must be a valid string"),
        ("notes", [{}], r"notes\.0 must be a valid string"),
        ("columns.predictions", ["sample"], "columns must be those a cohort run writes"),
        ("labels", {"death": "no"}, "labels.death must be a valid list"),
        ("schema_version", None, "schema_version must be a valid integer"),
    ],
)
def test_fields_of_the_manifest_are_checked_by_name(tmp_path: Path, field: str, value: object, match: str) -> None:
    path = write_run(tmp_path, RECORDS) / "manifest.json"
    whole = json.loads(path.read_bytes())
    *above, last = field.split(".")
    place = whole
    for key in above:
        place = place[key]
    place[last] = value
    del whole["sha256"]
    path.write_bytes(signed(whole))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{match}"):
        CohortAttributions(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (DEEP, "nested too deep"),
        ('{"identity": ' + DEEP + "}", "nested too deep"),
        ("9" * 5000, "damaged"),
        ('{"schema_version": 2, "schema_version": 2}', "'schema_version' is there twice"),
        ("{}", "schema_version is missing"),
        ("[]", "must be an object of fields, got list"),
        ('{"peak": 1e999, "nan": NaN}', "damaged"),
    ],
)
def test_json_that_no_run_writes_is_refused(tmp_path: Path, content: str, match: str) -> None:
    for name in ("manifest.json", "parts/part-00000.json"):
        folder = write_run(tmp_path / Path(name).name, RECORDS)
        (folder / name).write_text(content)
        wanted = "run is missing" if content == "{}" and "parts" in name else match
        with pytest.raises(ValueError, match=wanted):
            CohortAttributions(folder)
    given = tmp_path / "names.json"
    given.write_text(content)
    if content != "{}":
        with pytest.raises(ValueError, match="name"):
            CohortAttributions(write_run(tmp_path / "names", RECORDS), given)


def test_a_huge_number_in_a_session_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, RECORDS) / "manifest.json"
    edit(path, sessions=[{"started": "2026", "finished": None, "peak_bytes": 10**400}])
    with pytest.raises(ValueError, match=r"sessions\.0\.peak_bytes must be less than"):
        CohortAttributions(tmp_path)


def put(folder: Path, kind: str, content: bytes) -> None:
    """A file of part 1, whose commit record agrees with it, as in a folder that somebody made."""
    (folder / kind / "part-00001.parquet").write_bytes(content)
    record = json.loads((folder / "parts" / "part-00001.json").read_bytes())
    record["files"][kind] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(folder / "parts" / "part-00001.json", files=record["files"])


@pytest.mark.parametrize("wrong", ["extra", "twice", "type", "rows", "order"])
def test_a_part_of_other_columns_is_refused_when_it_is_read(tmp_path: Path, wrong: str) -> None:
    folder = write_run(tmp_path, RECORDS, part_samples=2)
    table = pq.read_table(folder / "attributions" / "part-00001.parquet")
    changed = {
        "extra": table.append_column("age", pa.nulls(table.num_rows, pa.int32())),
        "twice": table.append_column("sample", table["sample"]),
        "type": table.set_column(5, "position", table["position"].cast(pa.int64())),
        "rows": table.slice(1),
        "order": table.select([*table.column_names[1:], "sample"]),
    }[wrong]
    put(folder, "attributions", parquet_bytes(changed))
    cohort = CohortAttributions(folder)
    assert cohort.sample(1).height == 3
    match = {
        "extra": "wrong: 'age' unknown", "type": "wrong: position int64", "rows": "must have 5 rows, .*got 4",
        "order": "wrong: their order", "twice": "wrong: 'sample' 2 times",
    }[wrong]  # fmt: skip
    for read in (lambda: cohort.attributions, lambda: cohort.sample(2), cohort.top_codes):
        with pytest.raises(ValueError, match=rf"attributions/part-00001\.parquet in .*{match}"):
            read()


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])


@pytest.mark.parametrize(
    ("kind", "column", "value", "match"),
    [
        ("attributions", "sample", None, "must have rows of the samples 2 … 3 only, got a row without one"),
        ("attributions", "sample", 1, "must have rows of the samples 2 … 3 only, got 1 … 3"),
        ("attributions", "feature", None, "must have a feature, .*got feature None, .* of sample 2"),
        ("attributions", "position", -1, "a place from 0 on .*position -1, .* of sample 2"),
        ("attributions", "position", None, "a place from 0 on .*position None, .* of sample 2"),
        ("attributions", "visit", -3, "a place from 0 on .*visit -3, .* of sample 2"),
        ("attributions", "attribution", float("nan"), "a finite attribution .*attribution nan of sample 2"),
        ("attributions", "attribution", float("inf"), "a finite attribution .*attribution inf of sample 2"),
        ("attributions", "attribution", None, "a finite attribution .*attribution None of sample 2"),
        ("attributions", "code", NOT_UTF8, "cannot be read as Parquet: .*UTF-8"),
        ("predictions", "patient_id", NOT_UTF8, "cannot be read as Parquet: .*UTF-8"),
        ("predictions", "sample", 3, "must have one row for each sample, got several of sample 3"),
    ],
)
def test_rows_that_no_run_writes_are_refused(tmp_path: Path, kind: str, column: str, value: object, match: str) -> None:
    folder = write_run(tmp_path, RECORDS, part_samples=2)
    table = pq.read_table(folder / kind / "part-00001.parquet")
    at = table.column_names.index(column)
    first = value if isinstance(value, pa.Array) else pa.array([value], table.schema.types[at])
    whole = pa.chunked_array([first, *table.column(at).slice(1).chunks])
    put(folder, kind, parquet_bytes(table.set_column(at, table.field(at), whole)))
    cohort, match = CohortAttributions(folder), rf"^{kind}/part-00001\.parquet in [^\n]*{match}"
    for read in (lambda: getattr(cohort, kind), lambda: cohort.sample(2), lambda: cohort.patient("p0")):
        with pytest.raises(ValueError, match=match):
            read()
    assert len(verify_folder(folder)) == 1
    assert re.search(match, verify_folder(folder)[0])


def test_a_file_that_says_two_things_of_its_columns_is_refused(tmp_path: Path) -> None:
    """Readers differ in which of its two schemas they go by; before, polars' own error was all that came."""
    folder = write_run(tmp_path, RECORDS, part_samples=2)
    path = folder / "predictions" / "part-00001.parquet"
    said = pq.read_metadata(path).metadata[b"ARROW:schema"]
    other = base64.b64encode(base64.b64decode(said).replace(b"sample", b"tample"))
    assert len(said) == len(other)
    put(folder, "predictions", path.read_bytes().replace(said, other))
    with pytest.raises(ValueError, match="it says of its columns one thing and another"):
        CohortAttributions(folder).sample(2)
