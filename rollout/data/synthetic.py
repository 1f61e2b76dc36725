"""A synthetic cohort in the layout of MIMIC-IV, with planted risk codes that drive the outcome.

Every table is invented: diagnosis codes come from the range U50–U99 that ICD-10 leaves to research, procedure codes
from a section ICD-10-PCS does not have, drug codes are made-up numbers of 11 digits, and names come from word lists.
Record lengths follow the shape of the open MIMIC-IV demo: log-normal, correlated between the streams, cut at a largest
length.
"""

import gzip
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import polars as pl

from rollout.data.codebook import PREVALENCE, STREAMS, CodeBook, Stream, code_books, repeated_entry
from rollout.files import empty_folder

BLOCK_PATIENTS = 4096
"""Patients generated at a time: the memory a cohort needs does not grow with its size."""

BASE_LOG_ODDS = -4.0
BASE_WITH_PROTECTIVE = -1.5  # where no code protects from next to nothing, none could be seen to
FIRST_VISIT_DEATHS = 0.02
DAY = 86_400
LENGTH_CORRELATION = np.array([[1.0, 0.27, 0.61], [0.27, 1.0, 0.53], [0.61, 0.53, 1.0]])


def write_synthetic_cohort(
    root: str | Path, patients: int = 6000, seed: int = 0, *, protective: bool = False
) -> dict[str, Any]:
    """Write MIMIC-IV tables of `patients` invented patients under `root`; return what was planted.

    A patient has 1–25 admissions (Zipf). An admission's codes are drawn independently of everything but that drugs
    already there are ordered again, about as often as in the open MIMIC-IV demo; each planted code
    is added to an admission with a probability of its own. The patient dies in admission t+1 with probability
    `sigmoid(base + Σ_{planted codes present in admission t} log_odds)`, and the record ends there. So the codes of a
    visit decide the label that `MortalityPredictionMIMIC4` gives it, and nothing else does. (Death in a first
    admission, which labels no sample, is drawn at a fixed rate.)

    Args:
        root: Folder to write: `hosp/*.csv.gz`, `icu/icustays.csv.gz` and `truth.json`; new or empty.
        patients: Number of patients, at least 1.
        seed: Same seed and size, same bytes.
        protective: Whether every other planted code lowers the log odds, of a base rate that is then higher.

    Returns:
        The content of `truth.json`: `planted` maps each feature to a list of `{code, name, log_odds,
        prevalence}`; beside it `seed`, `patients`, `base_log_odds` and `admissions`.

    Raises:
        ValueError: If `patients` or `seed` is out of range, or `root` cannot be written or is not empty.
    """
    if patients < 1:
        raise ValueError(f"write_synthetic_cohort: patients must be at least 1, got {patients}")
    if seed < 0:
        raise ValueError(f"write_synthetic_cohort: seed must not be negative, got {seed}")
    root = empty_folder(root, "write_synthetic_cohort: root")
    sequence = np.random.SeedSequence(seed)
    books = code_books(np.random.default_rng(sequence.spawn(1)[0]), protective)
    base = BASE_WITH_PROTECTIVE if protective else BASE_LOG_ODDS
    admissions = 0
    with _Tables(root) as tables:
        _write_dictionaries(tables, books)
        for first in range(0, patients, BLOCK_PATIENTS):
            rng = np.random.default_rng(sequence.spawn(1)[0])
            block = _Block(rng, books, base, first, min(BLOCK_PATIENTS, patients - first), admissions)
            for name, frame in block.frames():
                tables.write(name, frame)
            admissions += block.admissions
    truth = {
        "seed": seed,
        "patients": patients,
        "admissions": admissions,
        "base_log_odds": base,
        "outcome": "a planted code of admission t adds log_odds to the log odds of death in admission t + 1",
        "planted": {s.feature: books[s.feature].planted_rows() for s in STREAMS},
    }
    (root / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    return truth


class _Block:
    """The admissions and codes of a run of patients, as flat arrays.

    `patient`, `ordinal`, `died`, `admitted` and `discharged` are [A]; `rows` maps each feature to
    (admission, code), both [T], in record order.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        books: Mapping[str, CodeBook],
        base: float,
        first: int,
        patients: int,
        admissions: int,
    ) -> None:
        self.rng, self.books, self.first, self.first_admission = rng, books, first, admissions
        planned = rng.choice(np.arange(1, 26), patients, p=_zipf(25, 1.75))
        patient = np.repeat(np.arange(patients), planned)
        ordinal = _within(planned)
        lengths, present = self._draw_lengths(len(patient)), {}
        log_odds = np.full(len(patient), base)
        for stream in STREAMS:
            hit = rng.random((len(patient), stream.planted)) < PREVALENCE
            present[stream.feature] = hit & (lengths[stream.feature] > 0)[:, None]
            log_odds += present[stream.feature] @ books[stream.feature].effects
        dies_next = rng.random(len(patient)) < 1.0 / (1.0 + np.exp(-log_odds))
        died = np.where(ordinal == 0, rng.random(len(patient)) < FIRST_VISIT_DEATHS, np.roll(dies_next, 1))
        before = np.cumsum(died) - died
        keep = before == np.repeat(before[ordinal == 0], planned)

        self.patients, self.patient, self.ordinal, self.died = patients, patient[keep], ordinal[keep], died[keep]
        self.admissions = len(self.patient)
        self._draw_times()
        self.rows = {
            s.feature: self._draw_codes(s, lengths[s.feature][keep], present[s.feature][keep]) for s in STREAMS
        }

    def _draw_lengths(self, admissions: int) -> dict[str, np.ndarray]:
        z = self.rng.multivariate_normal(np.zeros(len(STREAMS)), LENGTH_CORRELATION, admissions, method="cholesky")
        lengths = {}
        for column, s in enumerate(STREAMS):
            length = np.clip(np.rint(s.median * np.exp(s.sigma * z[:, column])), 1, s.cap).astype(np.int64)
            lengths[s.feature] = np.where(self.rng.random(admissions) < s.empty, 0, length)
        return lengths

    def _draw_times(self) -> None:
        """Set the admission and discharge times, in whole minutes: stays in days, gaps of months, never overlapping."""
        rng, count = self.rng, self.admissions
        stay = np.maximum(0.2, 4.8 * np.exp(0.85 * rng.standard_normal(count)))
        gap = 0.5 + 90.0 * np.exp(1.3 * rng.standard_normal(count))
        end = np.cumsum(stay + gap)
        visits = np.bincount(self.patient, minlength=self.patients)
        start_of_patient = np.repeat((end - stay - gap)[self.ordinal == 0], visits)
        birthday = np.repeat(rng.uniform(0, 365 * 60, self.patients), visits)
        admitted = np.rint((end - stay - gap - start_of_patient + birthday) * DAY / 60).astype(np.int64) * 60
        self.admitted = np.datetime64("2110-01-01", "s") + admitted
        self.discharged = self.admitted + (np.rint(stay * DAY / 60).astype(np.int64) * 60)

    def _draw_codes(self, stream: Stream, length: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng, book = self.rng, self.books[stream.feature]
        admission = np.repeat(np.arange(self.admissions), length)
        code = np.searchsorted(book.cdf, rng.random(len(admission)), side="right")
        hit, which = np.nonzero(present)
        if stream.fresh is None:
            admission, code = np.divmod(np.unique(admission * stream.vocabulary + code), stream.vocabulary)
        else:
            code = code[repeated_entry(rng, _within(length), stream.fresh)]
            times = 1 + rng.poisson(0.5, len(hit))
            hit, which = np.repeat(hit, times), np.repeat(which, times)
        admission = np.concatenate([admission, hit])
        code = np.concatenate([code, book.planted[which]])
        order = np.lexsort((rng.random(len(admission)), admission))
        return admission[order], code[order]

    def frames(self) -> list[tuple[str, pl.DataFrame]]:
        """Return the tables of this block, named as MIMIC-IV names them."""
        return [
            ("hosp/patients", self._patients()),
            ("hosp/admissions", self._admissions()),
            ("hosp/diagnoses_icd", self._diagnoses()),
            ("hosp/procedures_icd", self._procedures()),
            ("hosp/prescriptions", self._prescriptions()),
            ("icu/icustays", self._icustays()),
        ]

    def _ids(self, admission: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "subject_id": 10_000_000 + self.first + self.patient[admission],
            "hadm_id": 20_000_000 + self.first_admission + admission,
        }

    def _patients(self) -> pl.DataFrame:
        rng, count = self.rng, self.patients
        start = self.admitted[self.ordinal == 0]
        last = np.append(self.ordinal[1:] == 0, True)
        death = np.where(self.died[last], self.discharged[last], np.datetime64("NaT", "s"))
        year = start.astype("datetime64[Y]").astype(np.int64) + 1970
        return pl.DataFrame(
            {
                "subject_id": 10_000_000 + self.first + np.arange(count),
                "gender": rng.choice(["F", "M"], count),
                "anchor_age": np.clip(np.rint(rng.normal(60, 17, count)), 18, 91).astype(np.int64),
                "anchor_year": year,
                "anchor_year_group": rng.choice(["2008 - 2010", "2011 - 2013", "2014 - 2016"], count),
                "dod": pl.Series(death.astype("datetime64[D]").astype("datetime64[ms]")).dt.date(),
            }
        )

    def _admissions(self) -> pl.DataFrame:
        rng, count = self.rng, self.admissions
        home = rng.choice(["HOME", "HOME HEALTH CARE", "SKILLED NURSING FACILITY"], count, p=[0.5, 0.3, 0.2])
        return pl.DataFrame(
            {
                **self._ids(np.arange(count)),
                "admittime": _times(self.admitted),
                "dischtime": _times(self.discharged),
                "deathtime": _times(np.where(self.died, self.discharged, np.datetime64("NaT", "s"))),
                "admission_type": rng.choice(["EW EMER.", "URGENT", "ELECTIVE", "OBSERVATION ADMIT"], count),
                "admit_provider_id": pl.Series([None] * count, dtype=pl.String),
                "admission_location": rng.choice(["EMERGENCY ROOM", "PHYSICIAN REFERRAL"], count),
                "discharge_location": np.where(self.died, "DIED", home),
                "insurance": rng.choice(["Medicare", "Medicaid", "Other"], count),
                "language": rng.choice(["ENGLISH", "?"], count, p=[0.9, 0.1]),
                "marital_status": rng.choice(["MARRIED", "SINGLE", "WIDOWED"], count),
                "race": rng.choice(["WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "OTHER"], count),
                "edregtime": pl.Series([None] * count, dtype=pl.String),
                "edouttime": pl.Series([None] * count, dtype=pl.String),
                "hospital_expire_flag": self.died.astype(np.int64),
            }
        )

    def _diagnoses(self) -> pl.DataFrame:
        admission, code = self.rows["conditions"]
        return pl.DataFrame(
            {
                **self._ids(admission),
                "seq_num": 1 + _within(np.bincount(admission, minlength=self.admissions)),
                "icd_code": self.books["conditions"].codes[code],
                "icd_version": np.full(len(code), 10),
            }
        )

    def _procedures(self) -> pl.DataFrame:
        admission, code = self.rows["procedures"]
        stay = (self.discharged - self.admitted).astype(np.int64)[admission]
        date = self.admitted[admission] + (stay * self.rng.random(len(code))).astype(np.int64)
        return pl.DataFrame(
            {
                **self._ids(admission),
                "seq_num": 1 + _within(np.bincount(admission, minlength=self.admissions)),
                "chartdate": pl.Series(date.astype("datetime64[ms]")).dt.date(),
                "icd_code": self.books["procedures"].codes[code],
                "icd_version": np.full(len(code), 10),
            }
        )

    def _prescriptions(self) -> pl.DataFrame:
        rng, (admission, code) = self.rng, self.rows["drugs"]
        stay = (self.discharged - self.admitted).astype(np.int64)[admission]
        start = (stay * rng.random(len(code))).astype(np.int64) // 3600 * 3600
        stop = np.minimum(start + DAY * (1 + rng.poisson(2, len(code))), stay)
        book = self.books["drugs"]
        blank = pl.lit(None, dtype=pl.String)
        frame = pl.DataFrame(
            {
                **self._ids(admission),
                "starttime": _times(self.admitted[admission] + start),
                "stoptime": _times(self.admitted[admission] + stop),
                "drug": book.names[code],
                "ndc": book.codes[code],
            }
        )
        return frame.select(
            "subject_id",
            "hadm_id",
            *(blank.alias(name) for name in ("pharmacy_id", "poe_id", "poe_seq", "order_provider_id")),
            "starttime",
            "stoptime",
            pl.lit("MAIN").alias("drug_type"),
            "drug",
            *(blank.alias(name) for name in ("formulary_drug_cd", "gsn")),
            "ndc",
            *(blank.alias(name) for name in ("prod_strength", "form_rx")),
            pl.lit("1").alias("dose_val_rx"),
            pl.lit("TAB").alias("dose_unit_rx"),
            *(blank.alias(name) for name in ("form_val_disp", "form_unit_disp", "doses_per_24_hrs")),
            pl.lit("PO").alias("route"),
        )

    def _icustays(self) -> pl.DataFrame:
        rng = self.rng
        admission = np.flatnonzero(rng.random(self.admissions) < 0.45)
        stay = (self.discharged - self.admitted).astype(np.int64)[admission]
        start = (0.3 * stay * rng.random(len(admission))).astype(np.int64)
        length = ((stay - start) * rng.uniform(0.2, 1.0, len(admission))).astype(np.int64)
        unit = rng.choice(["Medical Intensive Care Unit (MICU)", "Surgical Intensive Care Unit (SICU)"], len(admission))
        return pl.DataFrame(
            {
                **self._ids(admission),
                "stay_id": 30_000_000 + self.first_admission + admission,
                "first_careunit": unit,
                "last_careunit": unit,
                "intime": _times(self.admitted[admission] + start),
                "outtime": _times(self.admitted[admission] + start + length),
                "los": np.round(length / DAY, 4),
            }
        )


class _Tables:
    """The open `.csv.gz` files of a cohort; gzip headers carry no name and no time, so bytes depend on rows alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, gzip.GzipFile] = {}
        self.open = ExitStack()

    def __enter__(self) -> "_Tables":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open.close()

    def write(self, name: str, frame: pl.DataFrame) -> None:
        """Append a frame to table `name`, with a header when it is the first."""
        new = name not in self.files
        if new:
            path = self.root / f"{name}.csv.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = self.open.enter_context(path.open("wb"))
            self.files[name] = self.open.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
        self.files[name].write(frame.write_csv(include_header=new, datetime_format="%Y-%m-%d %H:%M:%S").encode())


def _write_dictionaries(tables: _Tables, books: Mapping[str, CodeBook]) -> None:
    for feature, table in (("conditions", "hosp/d_icd_diagnoses"), ("procedures", "hosp/d_icd_procedures")):
        book = books[feature]
        version = np.full(len(book.codes), 10)
        tables.write(table, pl.DataFrame({"icd_code": book.codes, "icd_version": version, "long_title": book.names}))


def _zipf(largest: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, largest + 1) ** -exponent
    return weights / weights.sum()


def _within(counts: np.ndarray) -> np.ndarray:
    """Number the entries of consecutive groups: counts [2, 0, 3] give 0 1 0 1 2."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _times(seconds: np.ndarray) -> pl.Series:
    return pl.Series(seconds.astype("datetime64[ms]"))
