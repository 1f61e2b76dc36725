"""MIMIC-IV tables as a MEDS folder: what the demo and the tests need, with the labels of PyHealth's mortality task.

Events:

- without a time `GENDER//…`; `MEDS_BIRTH` on 1 January of the anchor year less the anchor age; `MEDS_DEATH`;
- `HOSPITAL_ADMISSION//type//from` and `HOSPITAL_DISCHARGE//to` at their times;
- `DIAGNOSIS//ICD//version//code` at discharge, when diagnoses are coded;
- `PROCEDURE//ICD//version//code` at the end of its day, within the admission;
- `MEDICATION//NDC//ndc` at its start, `MEDICATION//DRUG//name` where the table has no NDC.

`labels/mortality.parquet` is of the admissions that `MortalityPredictionMIMIC4` makes samples of, at their discharge:
whether the patient dies in the next one. Each table is read whole.
"""

from pathlib import Path

import polars as pl

from rollout.data.meds.write import EVENT_FIELDS, LABEL_FIELDS, whole_folder, write_metadata, write_table
from rollout.data.mimic import check_mimic_root, find_table, read_header
from rollout.data.names import NO_NDC, code_names
from rollout.errors import require

SHARD_SUBJECTS = 1000
"""Subjects in a file of events."""
TASK = "labels/mortality.parquet"
_KEPT = ["subject_id", "time", "code", "numeric_value", "hadm_id"]


def convert_mimic(root: str | Path, out: str | Path) -> dict[str, int]:
    """Write the events of MIMIC-IV tables, or of a synthetic cohort, and the labels of death in the next admission.

    Args:
        root: Folder with MIMIC-IV's `hosp/`.
        out: The MEDS folder; new or empty. It is there whole or not at all.

    Returns:
        How many `subjects`, `events`, `codes` and `labels` there are.

    Raises:
        ValueError: If `root` lacks a table or column, or `out` is not empty.
    """
    require("pyarrow", "cohort")
    folder = check_mimic_root(root)
    with whole_folder(out, "convert_mimic: out") as made:
        events = _events(folder)
        subjects = events["subject_id"].unique().sort()
        for number, start in enumerate(range(0, len(subjects), SHARD_SUBJECTS)):
            here = events.filter(pl.col("subject_id").is_in(subjects[start : start + SHARD_SUBJECTS].implode()))
            write_table(
                here, {**EVENT_FIELDS, "hadm_id": EVENT_FIELDS["subject_id"]}, made / "data" / f"{number}.parquet"
            )
        codes, labels = _codes(folder, events["code"].unique()), mortality_labels(folder)
        said = {"dataset_name": "MIMIC-IV tables", "raw_source_id_columns": ["hadm_id"]}
        write_metadata(made, codes, said)
        if len(labels):
            write_table(labels, LABEL_FIELDS, made / TASK)
    return {"subjects": len(subjects), "events": len(events), "codes": len(codes), "labels": len(labels)}


def mortality_labels(root: Path) -> pl.DataFrame:
    """`subject_id`, `prediction_time`, `boolean_value`: death in the next admission, at the discharge of each that has
    one after it, and a diagnosis, a procedure and an NDC, of patients of 18 years and more; as PyHealth has it.
    """
    admissions = _table(root, "admissions", "subject_id", "hadm_id", "admittime", "dischtime", "hospital_expire_flag")
    ages = _table(root, "patients", "subject_id", "anchor_age")
    young = ages.filter(pl.col("anchor_age").cast(pl.Float64, strict=False) < 18)["subject_id"]
    timed = admissions.with_columns(_time("admittime"), _time("dischtime")).sort("subject_id", "admittime")
    died = pl.col("hospital_expire_flag").str.strip_chars() == "1"
    found = timed.with_columns(boolean_value=died.fill_null(False).shift(-1).over("subject_id")).filter(
        pl.col("boolean_value").is_not_null(),
        pl.col("dischtime").is_not_null(),
        ~pl.col("subject_id").is_in(young.implode()),
    )
    ended = timed.select("hadm_id", time="dischtime")
    for name in ("diagnoses_icd", "procedures_icd"):
        rows = _coded(_table(root, name, "subject_id", "hadm_id", "icd_code"), "icd_code")
        found = _with_one(found, rows.join(ended, on="hadm_id").select("subject_id", "time"))
    drugs = _coded(_table(root, "prescriptions", "subject_id", "starttime", "ndc"), "ndc")
    found = _with_one(found, drugs.select("subject_id", time=_time("starttime")))
    chosen = found.select(pl.col("subject_id").cast(pl.Int64), "boolean_value", prediction_time="dischtime")
    return chosen.unique(["subject_id", "prediction_time"], keep="first", maintain_order=True)


def _with_one(admissions: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """The admissions with an event of their patient in their time."""
    pairs = admissions.select("subject_id", "hadm_id", "admittime", "dischtime").join(events.unique(), on="subject_id")
    within = pairs.filter(pl.col("time").is_between("admittime", "dischtime"))["hadm_id"].unique()
    return admissions.filter(pl.col("hadm_id").is_in(within.implode()))


def _coded(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    return frame.filter(pl.col(column).str.strip_chars().str.len_chars() > 0)


def _events(root: Path) -> pl.DataFrame:
    """Every event, by subject and time, those without a time first; at equal times in the order of the list below."""
    stays = _table(
        root, "admissions", "subject_id", "hadm_id", "admittime", "dischtime", "deathtime", "admission_type",
        "admission_location", "discharge_location",
    ).with_columns(_time("admittime"), _time("dischtime"), _time("deathtime"))  # fmt: skip
    times = stays.select("hadm_id", "admittime", "dischtime")
    coded = _coded(_table(root, "diagnoses_icd", "subject_id", "hadm_id", "icd_code", "icd_version"), "icd_code")
    diagnosis, admission = _code("DIAGNOSIS//ICD", "icd_version", "icd_code"), ("admission_type", "admission_location")
    who, dead, no_visit = ("subject_id", "hadm_id"), pl.lit("MEDS_DEATH").alias("code"), pl.lit(None, pl.String)
    events = [
        *_of_patients(root),
        stays.select(*who, _code("HOSPITAL_ADMISSION", *admission), time="admittime"),
        _drugs(root, times),
        _procedures(root, times),
        coded.join(times, on="hadm_id").select(*who, diagnosis, time="dischtime"),
        stays.select(*who, _code("HOSPITAL_DISCHARGE", "discharge_location"), time="dischtime"),
        stays.filter(pl.col("deathtime").is_not_null()).select("subject_id", dead, time="deathtime", hadm_id=no_visit),
    ]
    static = pl.col("code").str.starts_with("GENDER//")
    return (
        pl.concat(events, how="diagonal")
        .filter(pl.col("time").is_not_null() | static)
        .with_columns(pl.col("subject_id", "hadm_id").cast(pl.Int64), numeric_value=pl.lit(None, pl.Float32))
        .select(_KEPT)
        .sort("subject_id", "time", nulls_last=False, maintain_order=True)
    )


def _of_patients(root: Path) -> list[pl.DataFrame]:
    table = _table(root, "patients", "subject_id", "gender", "anchor_age", "anchor_year")
    year = pl.col("anchor_year").cast(pl.Int32, strict=False) - pl.col("anchor_age").cast(pl.Int32, strict=False)
    no_visit = pl.lit(None, pl.String).alias("hadm_id")
    gender = table.filter(pl.col("gender").is_not_null())
    return [
        gender.select("subject_id", no_visit, _code("GENDER", "gender"), time=pl.lit(None, pl.Datetime("us"))),
        table.select("subject_id", no_visit, code=pl.lit("MEDS_BIRTH"), time=pl.datetime(year, 1, 1, time_unit="us")),
    ]


def _procedures(root: Path, times: pl.DataFrame) -> pl.DataFrame:
    table = _table(root, "procedures_icd", "subject_id", "hadm_id", "chartdate", "icd_code", "icd_version")
    day = pl.col("chartdate").str.slice(0, 10).str.to_datetime("%Y-%m-%d", time_unit="us", strict=False)
    end = pl.max_horizontal(
        pl.min_horizontal(day + pl.duration(hours=23, minutes=59, seconds=59), "dischtime"), "admittime"
    )
    coded = _coded(table, "icd_code").join(times, on="hadm_id")
    return coded.select("subject_id", "hadm_id", _code("PROCEDURE//ICD", "icd_version", "icd_code"), time=end)


def _drugs(root: Path, times: pl.DataFrame) -> pl.DataFrame:
    table = _table(root, "prescriptions", "subject_id", "hadm_id", "starttime", "drug", "ndc")
    ndc, drug = pl.col("ndc").str.strip_chars(), pl.col("drug").str.strip_chars()
    code = pl.when(ndc.str.contains("[1-9]")).then("MEDICATION//NDC//" + ndc).otherwise("MEDICATION//DRUG//" + drug)
    begun = pl.coalesce(_time("starttime"), "admittime")
    return (
        table.join(times, on="hadm_id", how="left")
        .select("subject_id", "hadm_id", code=code, time=begun)
        .filter(pl.col("code").is_not_null())
    )


def _codes(root: Path, used: pl.Series) -> pl.DataFrame:
    """`code`, `description`, `parent_codes` of the codes that are used."""
    parts = used.to_frame("code").with_columns(part=pl.col("code").str.split("//"))
    kind, version, bare = (
        pl.col("part").list.get(0),
        pl.col("part").list.get(2, null_on_oob=True),
        pl.col("part").list.last(),
    )
    drug = pl.col("code").str.starts_with("MEDICATION//NDC//")
    icd = kind.is_in(["DIAGNOSIS", "PROCEDURE"])
    table = parts.with_columns(key=pl.when(icd).then(version + "_" + bare).when(drug).then(bare))
    features = {"conditions": kind == "DIAGNOSIS", "procedures": kind == "PROCEDURE", "drugs": drug}
    table = table.with_columns(feature=pl.coalesce(pl.when(one).then(pl.lit(name)) for name, one in features.items()))
    asked = {name: table.filter(feature=name)["key"].to_list() for name in features}
    named = [(name, *pair) for name, found in code_names(root, asked).items() for pair in found.items()]
    names = pl.DataFrame(named, schema=dict.fromkeys(("feature", "key", "description"), pl.String), orient="row")
    return table.join(names, on=["feature", "key"], how="left").select(
        "code",
        pl.when(pl.col("description") != NO_NDC).then("description"),
        parent_codes=_parent(kind, version, bare, drug),
    )


def _parent(kind: pl.Expr, version: pl.Expr, bare: pl.Expr, drug: pl.Expr) -> pl.Expr:
    """A code as its own vocabulary has it, which MEDS takes for its parent: `ICD10CM/I50.9`."""
    old = version == "9"
    cut = pl.when(old & (kind == "PROCEDURE")).then(2).when(old & bare.str.starts_with("E")).then(4).otherwise(3)
    point = pl.when(bare.str.len_chars() > cut).then(pl.lit(".")).otherwise(pl.lit(""))
    dotted = pl.concat_str(bare.str.slice(0, cut), point, bare.str.slice(cut))
    own = pl.coalesce(
        pl.when(kind == "DIAGNOSIS").then(pl.concat_str(pl.lit("ICD"), version, pl.lit("CM/"), dotted)),
        pl.when((kind == "PROCEDURE") & old).then(pl.concat_str(pl.lit("ICD9Proc/"), dotted)),
        pl.when(kind == "PROCEDURE").then(pl.concat_str(pl.lit("ICD10PCS/"), bare)),
        pl.when(drug).then(pl.concat_str(pl.lit("NDC/"), bare)),
    )
    return pl.when(own.is_not_null()).then(pl.concat_list(own))


def _code(prefix: str, *columns: str) -> pl.Expr:
    parts = [pl.col(column).str.strip_chars().fill_null("UNK") for column in columns]
    return pl.concat_str(pl.lit(prefix), *parts, separator="//").alias("code")


def _time(column: str) -> pl.Expr:
    return pl.col(column).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False)


def _table(root: Path, name: str, *columns: str) -> pl.DataFrame:
    """Columns of a table as text; null where it has no such column."""
    path = find_table(root, f"hosp/{name}")
    assert path is not None  # checked
    header = read_header(path)
    try:
        table = pl.read_csv(path, has_header=False, skip_rows=1, new_columns=header, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"ehr_root: {path} cannot be read as a CSV table: {str(error).splitlines()[0]}") from error
    there = [pl.col(column) if column in header else pl.lit(None, pl.String).alias(column) for column in columns]
    return table.select(there)
