"""The synthetic cohort: the same bytes from the same seed, MIMIC's shape, and an outcome the planted codes drive."""

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rollout.data.codebook import repeated_entry
from rollout.data.mimic import REQUIRED, check_mimic_root
from rollout.data.names import code_names
from rollout.data.synthetic import BLOCK_PATIENTS, write_synthetic_cohort
from rollout.results.ranking import planted_codes

EVENTS = {
    "conditions": ("diagnoses_icd", "icd_code"),
    "procedures": ("procedures_icd", "icd_code"),
    "drugs": ("prescriptions", "ndc"),
}


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(root: Path, name: str) -> pl.DataFrame:
    return pl.read_csv(root / f"{name}.csv.gz", infer_schema=False)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cohort") / "tables"
    write_synthetic_cohort(root, patients=6000, seed=3)
    return root


@pytest.fixture(scope="module")
def admissions(cohort: Path) -> pl.DataFrame:
    """Admissions in order, with the planted codes of each stream, the stream's length, and the next one's outcome."""
    truth = planted_codes(json.loads((cohort / "truth.json").read_text()))
    frame = table(cohort, "hosp/admissions").sort("subject_id", "admittime")
    for feature, (name, column) in EVENTS.items():
        events = table(cohort, f"hosp/{name}")
        counted = events.group_by("hadm_id").agg(
            pl.len().alias(f"n_{feature}"),
            pl.col(column).filter(pl.col(column).is_in(truth[feature])).n_unique().alias(f"planted_{feature}"),
        )
        frame = frame.join(counted, on="hadm_id", how="left").with_columns(
            pl.col(f"n_{feature}", f"planted_{feature}").fill_null(0)
        )
    died = pl.col("hospital_expire_flag").cast(pl.Int64)
    return frame.sort("subject_id", "admittime").with_columns(
        died_next=died.shift(-1).over("subject_id"),
        planted=pl.sum_horizontal(f"planted_{feature}" for feature in EVENTS),
    )


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_synthetic_cohort(tmp_path / name, patients=120, seed=seed)
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert len(first) == 9
    assert all(first[name] != other[name] for name in first if "d_icd" not in name)


def test_a_cohort_of_several_blocks_numbers_patients_and_admissions_once(tmp_path: Path) -> None:
    patients = BLOCK_PATIENTS + 37
    truth = write_synthetic_cohort(tmp_path / "tables", patients=patients, seed=0)
    subjects = table(tmp_path / "tables", "hosp/patients")["subject_id"]
    visits = table(tmp_path / "tables", "hosp/admissions")["hadm_id"]
    assert subjects.n_unique() == len(subjects) == patients
    assert visits.n_unique() == len(visits) == truth["admissions"]
    assert set(table(tmp_path / "tables", "hosp/admissions")["subject_id"]) == set(subjects)


def test_every_table_of_the_task_is_there_with_its_columns(cohort: Path) -> None:
    assert check_mimic_root(cohort) == cohort
    for name, columns in REQUIRED.items():
        assert set(columns) <= set(table(cohort, name).columns)


@pytest.mark.parametrize(
    ("feature", "median", "ninetieth", "largest"),
    [("conditions", (15, 19), (27, 36), (39, 43)), ("procedures", (2, 4), (6, 10), (15, 43)),
     ("drugs", (44, 60), (125, 185), (350, 1010))],
)  # fmt: skip
def test_record_lengths_are_heavy_tailed_like_mimics(
    admissions: pl.DataFrame, feature: str, median: tuple, ninetieth: tuple, largest: tuple
) -> None:
    lengths = admissions[f"n_{feature}"].to_numpy()
    lengths = lengths[lengths > 0]
    for value, (low, high) in zip(np.percentile(lengths, [50, 90, 100]), (median, ninetieth, largest), strict=True):
        assert low <= value <= high


def test_drugs_are_ordered_again_as_often_as_mimics_are(cohort: Path) -> None:
    """Distinct codes of a record over all of them: 0.51 in the open demo, 0.96 of the shortest and 0.3 of the longest;
    diagnoses stand once there too, procedures nearly."""
    for feature, (name, column) in EVENTS.items():
        records = table(cohort, f"hosp/{name}").group_by("hadm_id").agg(pl.len(), pl.col(column).n_unique().alias("u"))
        if feature != "drugs":
            assert (records["u"] == records["len"]).all()
            continue
        assert 0.48 <= records["u"].sum() / records["len"].sum() <= 0.54
        share = records.with_columns(pl.col("u") / pl.col("len"))
        assert share.filter(pl.col("len") < 16)["u"].mean() > 0.85
        assert 0.33 <= share.filter(pl.col("len").is_between(128, 255))["u"].mean() <= 0.45


def test_an_entry_repeats_one_before_it_in_its_own_record_and_that_one_is_new() -> None:
    place = np.concatenate([np.arange(length) for length in (1, 500, 3, 800)])
    record = np.repeat(np.arange(4), (1, 500, 3, 800))
    repeated = repeated_entry(np.random.default_rng(0), place, 90.0)
    assert (record[repeated] == record).all()
    assert (repeated <= np.arange(len(place))).all()
    assert (repeated[repeated] == repeated).all()
    new = [np.unique(repeated[record == each]).size for each in (1, 3)]
    assert new == [pytest.approx(90 * np.log1p(length / 90), rel=0.15) for length in (500, 800)]


def test_half_the_patients_have_one_admission_and_a_few_have_many(admissions: pl.DataFrame) -> None:
    visits = admissions.group_by("subject_id").len()["len"].to_numpy()
    assert 0.45 <= (visits == 1).mean() <= 0.65
    assert 1.5 <= visits.mean() <= 3.0
    assert visits.max() >= 15


def test_streams_grow_together(admissions: pl.DataFrame) -> None:
    full = admissions.filter(pl.all_horizontal(pl.col(f"n_{feature}") > 0 for feature in EVENTS))
    logs = np.log(full.select(f"n_{feature}" for feature in EVENTS).to_numpy())
    correlation = np.corrcoef(logs.T)
    assert 0.5 <= correlation[0, 2] <= 0.7
    assert 0.4 <= correlation[1, 2] <= 0.62


def test_planted_codes_drive_the_outcome_of_the_next_admission(admissions: pl.DataFrame) -> None:
    pairs = admissions.drop_nulls("died_next")
    rate = {
        n: pairs.filter(pl.col("planted").clip(0, 2) == n)["died_next"].mean()
        for n in range(3)
    }  # fmt: skip
    assert rate[0] == pytest.approx(1 / (1 + np.exp(4.0)), abs=0.015)
    assert rate[1] == pytest.approx(0.5, abs=0.05)
    assert rate[2] == pytest.approx(1 / (1 + np.exp(-4.0)), abs=0.05)


def test_every_other_planted_code_protects_where_it_is_asked_for(tmp_path: Path) -> None:
    truth = write_synthetic_cohort(tmp_path / "tables", patients=4000, seed=1, protective=True)
    effects = {feature: [row["log_odds"] for row in rows] for feature, rows in truth["planted"].items()}
    assert effects == {"conditions": [4.0, -4.0] * 2, "procedures": [4.0, -4.0, 4.0], "drugs": [4.0, -4.0] * 2}
    frame = table(tmp_path / "tables", "hosp/admissions").sort("subject_id", "admittime")
    died = pl.col("hospital_expire_flag").cast(pl.Int64).shift(-1).over("subject_id")
    pairs = frame.select("hadm_id", died=died).drop_nulls()
    base = pairs["died"].mean()
    for feature, (name, column) in EVENTS.items():
        present = (
            table(tmp_path / "tables", f"hosp/{name}").select("hadm_id", column).unique().join(pairs, on="hadm_id")
        )
        risk = dict(present.group_by(column).agg(pl.col("died").mean()).iter_rows())
        for row in truth["planted"][feature]:
            assert risk[row["code"]] > 1.5 * base if row["log_odds"] > 0 else risk[row["code"]] < 0.7 * base


@pytest.mark.parametrize("feature", list(EVENTS))
def test_each_planted_code_raises_the_risk_and_no_other_code_does(
    cohort: Path, admissions: pl.DataFrame, feature: str
) -> None:
    name, column = EVENTS[feature]
    pairs = admissions.drop_nulls("died_next").select("hadm_id", "died_next")
    base = pairs["died_next"].mean()
    present = table(cohort, f"hosp/{name}").select("hadm_id", column).unique().join(pairs, on="hadm_id")
    risk = present.group_by(column).agg(pl.len(), pl.col("died_next").mean()).filter(pl.col("len") >= 100)
    planted = set(planted_codes(json.loads((cohort / "truth.json").read_text()))[feature])
    ratio = dict(zip(risk[column], risk["died_next"] / base, strict=True))
    assert planted <= set(ratio)
    assert min(ratio[code] for code in planted) > 1.8
    assert max(value for code, value in ratio.items() if code not in planted) < 1.7


def test_a_record_ends_with_the_death(admissions: pl.DataFrame) -> None:
    died = admissions.filter(pl.col("hospital_expire_flag") == "1")
    assert len(died) > 100
    assert died["died_next"].null_count() == len(died)
    assert died["deathtime"].null_count() == 0
    assert (died["discharge_location"] == "DIED").all()


def test_admissions_of_a_patient_do_not_overlap(admissions: pl.DataFrame) -> None:
    gap = admissions.select(pl.col("admittime") > pl.col("dischtime").shift(1).over("subject_id")).to_series()
    assert gap.drop_nulls().all()
    assert (admissions["dischtime"] > admissions["admittime"]).all()


def used_codes(cohort: Path) -> dict[str, set[str]]:
    return {feature: set(table(cohort, f"hosp/{name}")[column]) for feature, (name, column) in EVENTS.items()}


def test_codes_and_names_are_distinct_and_every_code_has_a_name(cohort: Path) -> None:
    names = code_names(cohort, used_codes(cohort))
    for feature, used in used_codes(cohort).items():
        assert used <= set(names[feature])
        assert len(set(names[feature].values())) == len(names[feature])


def test_truth_lists_each_planted_code_with_its_name(cohort: Path) -> None:
    truth, names = json.loads((cohort / "truth.json").read_text()), code_names(cohort, used_codes(cohort))
    assert {feature: len(rows) for feature, rows in truth["planted"].items()} == {
        "conditions": 4,
        "procedures": 3,
        "drugs": 4,
    }
    for feature, rows in truth["planted"].items():
        assert [names[feature][row["code"]] for row in rows] == [row["name"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"patients": 0}, "patients must be at least 1, got 0"), ({"seed": -1}, "seed must not be negative, got -1")],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_synthetic_cohort(tmp_path / "tables", **arguments)
    assert not (tmp_path / "tables").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="root must be a new or empty folder"):
        write_synthetic_cohort(tmp_path, patients=10)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
