"""Groups of codes: the systems that need no download, those that do, and mappings of the user's own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.results.code_groups import SYSTEMS, group_codes, read_groups


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PyHealth's cache, empty, and a network that may not be used."""
    utils = pytest.importorskip("pyhealth.medcode.utils")

    def downloaded(*_: object) -> None:
        raise AssertionError("a download began")

    monkeypatch.setattr(utils, "MODULE_CACHE_PATH", str(tmp_path))
    monkeypatch.setattr("pyhealth.medcode.cross_map.MODULE_CACHE_PATH", str(tmp_path))
    monkeypatch.setattr(utils, "download_file", downloaded)
    return tmp_path


def pairs(codes: list[str], by: object, **options: object) -> list[tuple[str, str | None]]:
    return group_codes(codes, by, **options).rows()  # type: ignore[arg-type]


def test_chapters_of_both_versions() -> None:
    found = dict(pairs(["4280", "I509", "<unk>", "E8889"], "icd-chapter", feature="conditions"))
    assert found["4280"] == "ICD-9 390–459: Diseases of the circulatory system"
    assert found["I509"] == "ICD-10 I00–I99: Diseases of the circulatory system"
    assert found["<unk>"] is None
    assert "in both" in str(found["E8889"])
    assert dict(pairs(["4280", "E8889"], "icd10-chapter")) == {
        "4280": None, "E8889": "ICD-10 E00–E90: Endocrine, nutritional and metabolic diseases"}  # fmt: skip


def test_what_pyhealth_installs_needs_no_download(cache: Path) -> None:
    found = dict(pairs(["10_I50.9", "D_E119", "4280"], "ccsr"))
    assert found == {"10_I50.9": "CIR019", "4280": None, "D_E119": "END002"}
    assert pairs(["I509"], "icd10-block") == [("I509", "I30-I5A")]
    assert pairs(["428.0", "9_25000"], "ccs") == [("428.0", "108"), ("9_25000", "49")]


@pytest.mark.parametrize(
    ("code", "by", "source", "target"), [("I509", "ccs", "ICD10CM", "CCSCM"), ("00527051210", "atc-3", "NDC", "ATC")]
)
def test_a_table_that_is_not_there_is_refused_with_the_call_that_gets_it(
    code: str, by: str, source: str, target: str, cache: Path
) -> None:
    with pytest.raises(ValueError, match=f"by='{by}' needs PyHealth's table {source} → {target}, which is not") as said:
        group_codes([code], by)
    how = f"download=True (--download) lets it download the table, as pyhealth.medcode.CrossMap.load({source!r}, "
    assert str(said.value).endswith(f"{how}{target!r}) does")
    assert list(cache.iterdir()) == []


def test_tables_of_the_cache_and_codes_with_several_groups(cache: Path) -> None:
    rows = ",NDC,ATC", "0,00527051210,A10BA02", "1,00527051210,C07AB02", "2,00000000001,A10BA"
    (cache / "NDC_to_ATC.csv").write_text("\n".join(rows))
    (cache / "ICD10CM_to_CCSCM.csv").write_text("ICD10CM,CCSCM\nI50.9,108\n")
    assert pairs(["00527051210", "00000000001", "C07", "99999999999"], "atc-3") == [
        ("00000000001", "A10B"), ("00527051210", "A10B"), ("00527051210", "C07A"), ("99999999999", None), ("C07", None),
    ]  # fmt: skip
    assert pairs(["MEDICATION//NDC//00527051210", "NDC/00000000001", "ATC/C07AB02"], "atc-2") == [
        ("ATC/C07AB02", "C07"), ("MEDICATION//NDC//00527051210", "A10"), ("MEDICATION//NDC//00527051210", "C07"),
        ("NDC/00000000001", "A10"),
    ]  # fmt: skip
    assert pairs(["I509", "4280"], "ccs") == [("4280", "108"), ("I509", "108")]
    (cache / "NDC_to_ATC.csv").write_text("NDC\n1\n")
    with pytest.raises(ValueError, match="is no table NDC → ATC"):
        group_codes(["00527051210"], "atc-1")


def test_a_download_that_is_asked_for_is_pyhealths(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(url: str, path: str, **_: object) -> str:
        asked.append(url)
        Path(path).write_text("NDC,ATC\n00527051210,A10BA02\n")
        return path

    monkeypatch.setattr("pyhealth.medcode.utils.download_file", fetched)
    assert pairs(["00527051210"], "atc-4", download=True) == [("00527051210", "A10BA")]
    assert [url.rpartition("/")[2] for url in asked] == ["NDC_to_ATC.csv"]
    assert pairs(["00527051210"], "atc-2") == [("00527051210", "A10")]


@pytest.mark.parametrize("feature", ["procedures", "icd_codes"])
def test_codes_that_may_be_procedures_are_refused(feature: str) -> None:
    with pytest.raises(ValueError, match=f"'{feature}' holds procedures too, and a code such as '5187' does"):
        group_codes(["<unk>", "5187"], "icd-chapter", feature)
    found = dict(pairs(["D_5187", "P_5187"], "icd-chapter", feature=feature))
    assert found == {"D_5187": "ICD-9 460–519: Diseases of the respiratory system", "P_5187": None}


def test_mappings_and_files(tmp_path: Path) -> None:
    mapping = {"a": "one", "b": ["one", "two", "one"], "c": [], "d": None}
    wanted = [("a", "one"), ("b", "one"), ("b", "two"), ("c", None), ("d", None)]
    assert pairs(["d", "c", "b", "a"], mapping) == wanted
    (tmp_path / "g.json").write_text(json.dumps(mapping))
    assert pairs(["a", "b", "c", "d"], tmp_path / "g.json") == wanted
    (tmp_path / "g.csv").write_text("\ufeffname,code,group\nx,a,one\ny,b,one\nz,b,two\n", encoding="utf-8")
    assert pairs(["a", "b", "c", "d"], str(tmp_path / "g.csv")) == wanted
    assert read_groups(tmp_path / "g.csv") == {"a": ["one"], "b": ["one", "two"]}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p / "no.json", "by must be one of icd-chapter, .*, or a JSON or CSV file"),
        (lambda p: "icd-chapters", "got 'icd-chapters'"),
        (lambda p: put(p / "g.json", "[1]"), r"g.json must be \{code: group\}, got list"),
        (lambda p: put(p / "g.json", '{"a": {"b": 1}}'), "must be code → group, or a list of groups, got 'a'"),
        (lambda p: put(p / "g.json", '{"a": [""]}'), "must be code → group"),
        (lambda p: put(p / "g.json", '{"a": 1'), "is damaged"),
        (lambda p: put(p / "g.csv", "code\n1\n"), r"must have the columns code and group, got \['code'\]"),
        (lambda p: put(p / "g.csv", "code,group\na\n"), "g.csv, line 2 must have a code and a group"),
        (lambda p: put(p / "g.csv", "code,group\na,\xff\n", "latin1"), "cannot be read"),
        (lambda p: {"a": 3}, "by must be code → group"),
        (lambda p: {3: "a"}, "by must be code → group"),
    ],
)  # fmt: skip
def test_what_is_no_mapping_is_refused(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        group_codes(["a"], write(tmp_path))  # type: ignore[arg-type]


def put(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_text(content, encoding=encoding)
    return path


def test_every_system_leaves_codes_it_does_not_know_without_a_group(cache: Path) -> None:
    for system in SYSTEMS:
        assert pairs(["<unk>", "=cmd", ""], system) == [("", None), ("<unk>", None), ("=cmd", None)], system
