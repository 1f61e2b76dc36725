"""The names of MIMIC-IV's codes, by kind and ICD version, of those codes only that a vocabulary holds.

What a code string stands for is the task's business. Of PyHealth's tasks on MIMIC-IV

- `conditions` holds diagnoses and `procedures` procedures, bare (`I10`: MortalityPrediction) or with their
  version (`10_I10`: LengthOfStayPrediction, ReadmissionPrediction, DrugRecommendation);
- `icd_codes` holds both, bare (the StageNet tasks) or with their kind (`D_I10`, `P_5187`: the DKA tasks);
- `drugs` holds NDCs, `drugs_hist` ATC classes, which no table names; `labs` is a time series without codes or, in a
  task of one's own, holds item ids.

A code without version or kind stands for every one the cohort's tables use it in: `5187` is an ICD-9 diagnosis and an
ICD-9 procedure, `E8881` a fall in ICD-9 and a metabolic syndrome in ICD-10. Where there are several, the name says
all of them; it never is one of them.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from rollout.data.mimic import find_table, read_header
from rollout.errors import require

__all__ = ["code_names", "names_for", "vocabulary_codes"]

KINDS = {
    "conditions": ("diagnosis",),
    "procedures": ("procedure",),
    "icd_codes": ("diagnosis", "procedure"),
}
"""Features of ICD codes, and the kinds they hold."""
ICD_TABLES = {
    "diagnosis": ("hosp/diagnoses_icd", "hosp/d_icd_diagnoses"),
    "procedure": ("hosp/procedures_icd", "hosp/d_icd_procedures"),
}
"""Where the events of a kind and their titles stand."""
FORM = re.compile(r"(?:(?P<version>9|10)_|(?P<kind>[DP])_)?(?P<code>.*)", re.DOTALL)
"""A code as a task writes it. No code of either version has an underscore."""
INITIALS = {"D": "diagnosis", "P": "procedure"}

NO_NDC = "no NDC in the table"
BLOCK = 1 << 20
"""Bytes of a table, unpacked, that stand in memory at a time, about; the CSV reader keeps some hundred of them."""
MERGE_EVERY = 64

Meaning = tuple[str, str, str | None]
"""Kind, version and title of what a code is used as; None: the tables have no title."""


def names_for(root: str | Path, processors: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return feature → code → name for the codes that a dataset's fitted processors know; see `code_names`.

    Args:
        root: MIMIC-IV folder that the dataset was read from.
        processors: `input_processors` of a PyHealth `SampleDataset`.
    """
    return code_names(root, vocabulary_codes(processors))


def vocabulary_codes(processors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return feature → codes of each processor that has a vocabulary of the tables' own codes.

    Codes that PyHealth maps to another system (`code_mapping`) are no longer the tables' and are left out.
    """
    found = {}
    for feature, processor in processors.items():
        vocabulary = getattr(processor, "code_vocab", None) or getattr(processor, "label_vocab", None)
        if vocabulary and getattr(processor, "_mapper", None) is None:
            found[feature] = [str(code) for code in vocabulary]
    return found


def code_names(root: str | Path, codes: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """Return feature → code → name: ICD titles, the commonest drug name of each NDC, labels of lab items.

    The tables are read block by block and only rows of the codes asked for are kept, so that memory follows the number
    of codes, not of prescriptions.

    Args:
        root: MIMIC-IV folder.
        codes: Feature → its codes, as the task writes them.

    Returns:
        The names that are known. A code that the tables use in several kinds or versions is named `either ICD-9
        diagnosis “…” or ICD-9 procedure “…”`. Codes without a title, features of other names and kinds whose tables
        are absent are left out.

    Raises:
        ValueError: If a table cannot be read.
    """
    root = Path(root)
    asked = {feature: sorted(set(given)) for feature, given in codes.items()}
    names = _icd_names(root, {feature: given for feature, given in asked.items() if feature in KINDS})
    if "drugs" in asked:
        names["drugs"] = _drug_names(root, asked["drugs"])
    if "labs" in asked:
        names["labs"] = _lab_names(root, asked["labs"])
    return {feature: names[feature] for feature in asked if names.get(feature)}


def _icd_names(root: Path, asked: Mapping[str, list[str]]) -> dict[str, dict[str, str]]:
    wanted: dict[str, set[str]] = {kind: set() for kind in ICD_TABLES}
    for feature, codes in asked.items():
        for kind in KINDS[feature]:
            wanted[kind].update(_parse(code)[2] for code in codes)
    used = {kind: _meanings(root, kind, bare) for kind, bare in wanted.items() if bare}
    names = {}
    for feature, codes in asked.items():
        named = {code: _describe([m for kind in KINDS[feature] for m in _fitting(used[kind], code)]) for code in codes}
        names[feature] = {code: name for code, name in named.items() if name}
    return names


def _parse(code: str) -> tuple[str | None, str | None, str]:
    """Kind and version, where the code says them, and the code as the tables have it."""
    found = FORM.fullmatch(code.strip())
    assert found is not None  # the last group takes anything
    return INITIALS.get(found["kind"] or ""), found["version"], found["code"].replace(".", "").upper()


def _fitting(used: Mapping[str, list[Meaning]], code: str) -> list[Meaning]:
    kind, version, bare = _parse(code)
    return [one for one in used.get(bare, ()) if kind in (None, one[0]) and version in (None, one[1])]


def _describe(meanings: list[Meaning]) -> str | None:
    """The title, or all of them when a code has several meanings; None when none has a title."""
    if not any(title for *_, title in meanings):
        return None
    if len(meanings) == 1:
        return meanings[0][2]
    said = [f"ICD-{version} {kind} {f'“{title}”' if title else '(no title)'}" for kind, version, title in meanings]
    return f"either {' or '.join(said)}"


def _meanings(root: Path, kind: str, bare: set[str]) -> dict[str, list[Meaning]]:
    """Bare code → what the tables of a kind use it as, by version."""
    events, titles = ICD_TABLES[kind]
    used = _tally(root, events, "icd_code", ("icd_version",), bare)
    known = _tally(root, titles, "icd_code", ("icd_version", "long_title"), bare)
    title_of = {(code, version): title for code, version, title, _ in known.rows()}
    found: dict[str, list[Meaning]] = {}
    for code, version, _ in used.sort("icd_code", pl.col("icd_version").str.to_integer(strict=False)).rows():
        found.setdefault(code, []).append((kind, version, title_of.get((code, version)) or None))
    return found


def _drug_names(root: Path, codes: list[str]) -> dict[str, str]:
    """The commonest name of each NDC: prescriptions spell the drug of one NDC in several ways."""
    counted = _tally(root, "hosp/prescriptions", "ndc", ("drug",), set(codes)).filter(pl.col("drug") != "")
    best = counted.sort("len", "drug", descending=[True, False]).unique("ndc", keep="first", maintain_order=True)
    names = dict(best.select("ndc", "drug").rows())
    return {**names, "0": NO_NDC} if "0" in codes else names


def _lab_names(root: Path, codes: list[str]) -> dict[str, str]:
    rows = _tally(root, "hosp/d_labitems", "itemid", ("label", "fluid"), set(codes)).rows()
    return {code: f"{label} ({fluid})" if fluid else label for code, label, fluid, _ in rows if label}


def _tally(root: Path, name: str, code: str, columns: tuple[str, ...], wanted: set[str]) -> pl.DataFrame:
    """The distinct rows of a table that have a wanted code, with their number `len`; none of an absent table."""
    keys = [code, *columns]
    path = find_table(root, name)
    if path is None or not set(keys) <= set(read_header(path)):
        return pl.DataFrame(schema={**dict.fromkeys(keys, pl.String), "len": pl.UInt32})
    bare = pl.col(code).str.strip_chars().str.replace_all(".", "", literal=True).str.to_uppercase()
    kept = pl.Series(code, sorted(wanted), pl.String)
    held: list[pl.DataFrame] = []
    for block in _blocks(path, keys):
        rows = block.with_columns(bare).filter(pl.col(code).is_in(kept.implode()))
        held.append(rows.with_columns(pl.col(columns).str.strip_chars()).group_by(keys).len())
        if len(held) > MERGE_EVERY:
            held = [_added(held, keys)]
    return _added(held, keys)


def _added(tallies: list[pl.DataFrame], keys: list[str]) -> pl.DataFrame:
    return pl.concat(tallies).group_by(keys).agg(pl.col("len").sum())


def _blocks(path: Path, columns: list[str]) -> Iterable[pl.DataFrame]:
    """Columns of a CSV table as text, block by block. (polars unpacks a `.gz` whole before it reads.)"""
    arrow, csv = require("pyarrow", "cohort"), require("pyarrow.csv", "cohort")
    header = read_header(path)
    try:
        reader = csv.open_csv(
            path,
            read_options=csv.ReadOptions(block_size=BLOCK, column_names=header, skip_rows=1),
            parse_options=csv.ParseOptions(invalid_row_handler=lambda row: "skip"),
            convert_options=csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(header, arrow.string())
            ),
        )
        yield pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
        for batch in reader:
            yield pl.DataFrame(pl.from_arrow(batch))
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"ehr_root: {path} cannot be read as a CSV table: {error}") from error
