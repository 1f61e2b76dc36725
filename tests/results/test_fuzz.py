"""Mutated folders of a run, signed again so that what lies behind the digests is reached: read right, or one line."""

import json
import math
import random
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from rollout.report import write_report
from rollout.results.attributions import READ_POSITION, CohortAttributions
from rollout.results.faithfulness import open_faithfulness
from rollout.results.folder import RunFolder
from rollout.results.layout import SCHEMAS
from rollout.results.ranking import rank_codes
from rollout.results.verify import verify_folder
from tests.support.bounds import bounded, refused
from tests.support.evaluated import evaluate_toy
from tests.support.mutated_runs import mutated
from tests.support.toy_cohort import Records
from tests.support.written_run import Record, Run, write_run

PARTS, SEEDS = 7, 100
"""Parts, the first of which always runs, and the folders in each."""
KINDS = tuple(SCHEMAS)
Rows = list[tuple[Any, ...]]


def base_run(folder: Path) -> Path:
    """Flat, nested, timed and numeric features beside each other, in three parts with a failure and names."""
    draw = random.Random(0)
    records = []
    for i in range(8):
        drugs = [(draw.choice("abcd"), draw.random()) for _ in range(1 + i)]
        visits = [([draw.choice("xyz") for _ in range(1 + i % 3)], draw.random()) for _ in range(1 + i % 2)]
        labs = [(None, draw.random(), float(step)) for step in range(i % 4)]
        stays = [(draw.choice("st"), draw.random(), float(step)) for step in range(2)]
        features = {"drugs": drugs, "visits": visits, "labs": labs, "stays": stays}
        records.append(
            Record(f"p{i // 2}", features, (draw.random(),), (float(i % 2),), f"v{i}", [0.0, 0.1, None, 0.0])
        )
    names = {"drugs": {"a": "Aspirin", "b": "Bread"}, "visits": {"x": "病"}}
    failures = {5: "it could not be read"}
    run = Run("complete with failures", failures=failures, names=names, time={"labs": "hours"}, notes=["a note"])
    return write_run(folder, records, run, part_samples=3)


def read(folder: Path) -> dict[str, Any]:
    """Everything the readers give of a folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not complete.*")
        cohort = CohortAttributions(folder)
    frames = {kind: getattr(cohort, kind).collect() for kind in KINDS}
    patients = frames["predictions"]["patient_id"].drop_nulls().unique().to_list()
    rows, predicted = frames["attributions"]["sample"].to_list(), frames["predictions"]["sample"].to_list()
    for patient in patients:
        of = frames["predictions"].filter(pl.col("patient_id") == patient)["sample"].to_list()
        assert sorted(cohort.patient(patient)["sample"]) == sorted(number for number in rows if number in of)
    for number in predicted:
        assert cohort.sample(number)["sample"].to_list() == [number] * rows.count(number)
    cohort.labels()
    for by in ("lift", "prevalence"):
        cohort.top_codes(by=by, per_label=bool(cohort.labels().height), minimum_records=0)
    cohort.by_visit(from_end=True)
    cohort.lengths()
    rank_codes(frames["attributions"], read_position=cohort.read_position)
    codes = cohort.top_codes(minimum_records=0, k=None).select(
        "feature", "code", "name", "relevance", "lift", "prevalence", "records", "entries"
    )
    return {
        "manifest": cohort.manifest,
        "names": cohort.names,
        **{kind: frame.rows() for kind, frame in frames.items()},
        "codes": {row[:2]: row[2:] for row in codes.rows()},
        "positions": {row[:2]: row[2:] for row in cohort.by_position().rows()},
    }


def told(folder: Path) -> dict[str, Any]:
    """The same by other means: json, pyarrow, and sums in plain Python."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    path = folder / "code_names.json"
    names = json.loads(path.read_bytes()) if path.is_file() else {}
    names = json.loads(json.dumps(names, ensure_ascii=False).encode("utf-8", "replace"))  # no half of a surrogate pair
    tables = {}
    for kind in KINDS:
        files = sorted((folder / kind).glob("part-*.parquet"))
        known = [path for path in files if (folder / "parts" / f"{path.stem}.json").is_file()]
        tables[kind] = [tuple(row.values()) for path in known for row in pq.read_table(path).to_pylist()]
    read_position = READ_POSITION.get(manifest["identity"]["model"]["class"].rpartition(".")[2])
    samples = len(tables["predictions"])
    rows = in_one_place(tables["attributions"], manifest["granularity"])
    return {
        "manifest": manifest,
        "names": names,
        **tables,
        "codes": code_sums(rows, read_position, samples, names),
        "positions": position_means(rows),
    }


def in_one_place(rows: Rows, granularity: dict[str, str]) -> Rows:
    """A record of a feature that has one score is one place."""
    scores: dict[tuple[int, str], set[float]] = defaultdict(set)
    for row in rows:
        scores[row[0], row[3]].add(row[8])
    one = {record for record, found in scores.items() if granularity.get(record[1]) == "feature" and len(found) == 1}
    return [(*row[:4], row[4] and 0, 0, *row[6:]) if (row[0], row[3]) in one else row for row in rows]


def record_places(rows: Rows) -> dict[tuple[int, str], dict[int, list[tuple[str | None, float]]]]:
    """(sample, feature) → place → its codes, each with its score."""
    found: dict[tuple[int, str], dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for sample, _, _, feature, visit, position, code, _, score in rows:
        found[sample, feature][position if visit is None else visit].append((code, score))
    return found


def code_sums(rows: Rows, read: int | None, samples: int, names: dict[str, dict[str, str]]) -> dict[tuple, tuple]:
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0, 0, 0])
    for (_, feature), places in record_places(rows).items():
        means = {place: sum(score for _, score in cells) / len(cells) for place, cells in places.items()}
        at = None if read is None else read if read >= 0 else max(places) + 1 + read
        others = [abs(mean) for place, mean in means.items() if place != at]
        even = sum(others) / len(others) if others else 0.0
        codes: dict[str, list[float]] = defaultdict(list)
        for place, cells in places.items():
            for code in {code for code, _ in cells if code is not None}:
                codes[code] += [means[place]] if place != at else []
        for code, scores in codes.items():
            lifts = sum(scores) / even if even > 0 else 0.0
            for i, value in enumerate((sum(scores), lifts, len(scores), bool(scores), 1)):
                sums[feature, code][i] += value
    return {
        (feature, code): (
            names.get(feature, {}).get(code),
            relevance / records if records else None,
            lift / entries if entries else None,
            present / samples if samples else None,
            records,
            entries,
        )
        for (feature, code), (relevance, lift, entries, records, present) in sums.items()
    }


def position_means(rows: Rows) -> dict[tuple, tuple]:
    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for (_, feature), places in record_places([row for row in rows if row[4] is None]).items():
        means = {place: sum(score for _, score in cells) / len(cells) for place, cells in places.items()}
        even = sum(map(abs, means.values())) / len(means)
        for place, mean in means.items():
            for i, value in enumerate((mean, mean / even if even > 0 else 0.0, 1)):
                sums[feature, place][i] += value
    return {place: (relevance / n, lift / n, n) for place, (relevance, lift, n) in sums.items()}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("manifest", "names"):
        assert found[name] == wanted[name], name
    for name in KINDS:
        assert repr(found[name]) == repr(wanted[name]), name  # NaN too
    for name in ("codes", "positions"):
        assert found[name].keys() == wanted[name].keys()
        for key, row in wanted[name].items():
            assert all(map(close, found[name][key], row)), (key, found[name][key], row)


def close(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return one == other


def one_line_at_most(read: Callable[[], Any]) -> None:
    try:
        read()
    except ValueError as error:
        refused(error)


def end(folder: Path, seed: int, report: bool) -> str:
    """What comes of the folder of a seed: `read` or `refused`."""
    draw = random.Random(seed)
    what = mutated(draw, base_run(folder))
    try:
        with bounded():
            findings = verify_folder(folder)
            try:
                found = read(folder)
            except ValueError as error:
                refused(error)
                found = None
            if report:
                patient = draw.choice((None, None, "p1"))
                one_line_at_most(lambda: write_report(folder, folder.parent / f"{seed}.html", patient))
        assert all(len(finding.splitlines()) == 1 for finding in findings), findings
        if found is None:
            assert findings, "it was refused, and verifying found nothing"
            return "refused"
        same(found, told(folder))
        return "read"
    except BaseException as error:
        error.add_note(f"seed {seed}: {what} in {folder}")
        raise


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_a_mutated_folder_is_read_right_or_refused_in_one_line(
    tmp_path: Path, part: int, capfd: pytest.CaptureFixture
) -> None:
    ends = [end(tmp_path / str(seed), seed, seed % 4 == 0) for seed in range(part * SEEDS, (part + 1) * SEEDS)]
    assert ends.count("read") >= SEEDS // 8
    assert ends.count("refused") >= SEEDS // 3
    assert capfd.readouterr().err == ""  # nor does a reader below ours panic


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts, some samples failed."""
    out = tmp_path_factory.mktemp("evaluation") / "run"
    evaluate_toy(out, dataset=Records(24, {3: "unreadable"}), part_samples=8)
    return out


def end_of_evaluation(folder: Path, seed: int) -> str:
    what = mutated(random.Random(seed), folder)
    try:
        with bounded():
            findings = verify_folder(folder)
            try:
                run = RunFolder(folder)
                found = {kind: run.scan(kind).collect().rows() for kind in run.kinds}
            except ValueError as error:
                refused(error)
                assert findings
                return "refused"
            one_line_at_most(lambda: open_faithfulness(folder).differences())
            if seed % 4 == 0:
                one_line_at_most(lambda: write_report(folder, folder.parent / f"{seed}.html"))
        for kind, rows in found.items():
            files = [folder / kind / f"{record.name}.parquet" for record in run.of(kind)]
            assert repr(rows) == repr(
                [tuple(row.values()) for path in files for row in pq.read_table(path).to_pylist()]
            )
        with pytest.raises(ValueError, match="must be the folder of a run that attributes"):
            CohortAttributions(folder)
        return "read"
    except BaseException as error:
        error.add_note(f"seed {seed}: {what} in {folder}")
        raise


def test_a_mutated_evaluation_is_read_right_or_refused_in_one_line(evaluation: Path, tmp_path: Path) -> None:
    copies = [(Path(shutil.copytree(evaluation, tmp_path / str(seed))), seed) for seed in range(SEEDS)]
    ends = [end_of_evaluation(folder, seed) for folder, seed in copies]
    assert ends.count("read") >= SEEDS // 8
    assert ends.count("refused") >= SEEDS // 3


def test_the_run_itself_is_read_right(tmp_path: Path) -> None:
    """And the sums in plain Python are those of a folder that nothing happened to."""
    folder = base_run(tmp_path / "run")
    same(read(folder), told(folder))
    assert verify_folder(folder) == []
    assert isinstance(CohortAttributions(folder).attributions, pl.LazyFrame)
