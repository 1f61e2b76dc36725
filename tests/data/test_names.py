"""Codes get the names of their tables: by kind and version, every meaning of an ambiguous one, in little memory."""

import gzip
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from rollout.data.names import NO_NDC, code_names, names_for, vocabulary_codes

KEY = ("icd_code", "icd_version")
DIAGNOSES = [
    ("V100", 9), ("V100", 10), ("I10", 10), ("5187", 9), ("E8881", 9), ("E8881", 10), ("07070 ", 9), ("X1", 9),
]  # fmt: skip
DIAGNOSES_NAMED = [
    ("V100", 9, "Old"), ("V100", 10, "New"), ("I10", 10, "Hypertension"), ("5187", 9, "TRALI"),
    ("07070", 9, "Hepatitis"), ("E8881", 9, "A fall"),
    ("I10", 9, "Of the version not used"), ("9999", 9, "Never used"),
]  # fmt: skip
PROCEDURES = [("5187", 9), ("0331", 9), ("0331", 9), ("02HV33Z", 10)]
PROCEDURES_NAMED = [("5187", 9, "Bile duct stent"), ("0331", 9, "Spinal tap"), ("02HV33Z", 10, "Infusion device, open")]
DRUGS = [("00123", "Right"), ("00123", "Right"), ("00123", "Wrong"), ("0", "Saline"), (None, "Left out"), ("7", " ")]
LABS = [("50824", "Sodium", "Blood"), ("51006", "Urea Nitrogen", None), ("1", "Not asked for", "Blood")]


def write(root: Path, name: str, rows: list[tuple], columns: tuple[str, ...], packed: bool = True) -> None:
    text = pl.DataFrame(rows, schema=list(columns), orient="row").write_csv().encode()
    (root / "hosp").mkdir(parents=True, exist_ok=True)
    path = root / "hosp" / f"{name}.csv{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(text) if packed else text)


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write(tmp_path, "diagnoses_icd", DIAGNOSES, KEY, request.param)
    write(tmp_path, "procedures_icd", PROCEDURES, KEY, request.param)
    write(tmp_path, "d_icd_diagnoses", DIAGNOSES_NAMED, (*KEY, "long_title"), request.param)
    write(tmp_path, "d_icd_procedures", PROCEDURES_NAMED, (*KEY, "long_title"), request.param)
    write(
        tmp_path, "prescriptions", [(1, *row, "x") for row in DRUGS], ("hadm_id", "ndc", "drug", "route"), request.param
    )
    write(tmp_path, "d_labitems", LABS, ("itemid", "label", "fluid"), request.param)
    return tmp_path


def test_codes_with_their_version_have_the_title_of_that_version(root: Path) -> None:
    asked = {
        "conditions": ["9_V100", "10_V100", "10_I10", "9_07070", "10_5187"],
        "procedures": ["9_5187", "10_02HV33Z"],
    }
    assert code_names(root, asked) == {
        "conditions": {"9_V100": "Old", "10_V100": "New", "10_I10": "Hypertension", "9_07070": "Hepatitis"},
        "procedures": {"9_5187": "Bile duct stent", "10_02HV33Z": "Infusion device, open"},
    }


def test_bare_codes_have_the_title_of_the_version_in_use(root: Path) -> None:
    names = code_names(root, {"conditions": ["I10", "07070", "5187", "9999"], "procedures": ["5187", "0331", "I10"]})
    assert names == {
        "conditions": {"I10": "Hypertension", "07070": "Hepatitis", "5187": "TRALI"},
        "procedures": {"5187": "Bile duct stent", "0331": "Spinal tap"},
    }


def test_an_ambiguous_code_has_every_meaning_with_its_kind(root: Path) -> None:
    names = code_names(
        root, {"icd_codes": ["5187", "V100", "0331", "I10", "E8881", "X1"], "conditions": ["V100", "5187"]}
    )
    assert names["icd_codes"] == {
        "5187": "either ICD-9 diagnosis “TRALI” or ICD-9 procedure “Bile duct stent”",
        "V100": "either ICD-9 diagnosis “Old” or ICD-10 diagnosis “New”",
        "E8881": "either ICD-9 diagnosis “A fall” or ICD-10 diagnosis (no title)",
        "0331": "Spinal tap",
        "I10": "Hypertension",
    }
    assert names["conditions"] == {"V100": names["icd_codes"]["V100"], "5187": "TRALI"}


def test_codes_with_their_kind_have_the_title_of_that_kind(root: Path) -> None:
    names = code_names(root, {"icd_codes": ["D_5187", "P_5187", "P_I10", "D_V100", "P_02HV33Z"]})
    assert names["icd_codes"] == {
        "D_5187": "TRALI",
        "P_5187": "Bile duct stent",
        "D_V100": "either ICD-9 diagnosis “Old” or ICD-10 diagnosis “New”",
        "P_02HV33Z": "Infusion device, open",
    }


def test_drugs_have_their_commonest_name_and_lab_items_their_label(root: Path) -> None:
    names = code_names(
        root, {"drugs": ["00123", "0", "7", "unheard"], "labs": ["50824", "51006"], "drugs_hist": ["00123"]}
    )
    assert names == {
        "drugs": {"00123": "Right", "0": NO_NDC},
        "labs": {"50824": "Sodium (Blood)", "51006": "Urea Nitrogen"},
    }


def test_tables_that_are_absent_name_nothing(root: Path) -> None:
    for path in (root / "hosp").iterdir():
        if not path.name.startswith(("diagnoses_icd", "d_icd_diagnoses")):
            path.unlink()
    asked = {"icd_codes": ["5187", "0331"], "procedures": ["0331"], "drugs": ["00123"], "labs": ["50824"]}
    assert code_names(root, asked) == {"icd_codes": {"5187": "TRALI"}}


def test_only_the_tables_own_codes_are_named(root: Path) -> None:
    """CCS class 193 is no neoplasm of the thyroid: what PyHealth has mapped is left without a name."""
    processors = {
        "conditions": SimpleNamespace(code_vocab={"<pad>": 0, "<unk>": 1, "I10": 2}, _mapper=None),
        "procedures": SimpleNamespace(code_vocab={"<pad>": 0, "<unk>": 1, "0331": 2}, _mapper=object()),
        "drugs": SimpleNamespace(label_vocab={"00123": 0}),
        "labs": SimpleNamespace(n_features=10),
    }
    assert vocabulary_codes(processors) == {"conditions": ["<pad>", "<unk>", "I10"], "drugs": ["00123"]}
    assert names_for(root, processors) == {"conditions": {"I10": "Hypertension"}, "drugs": {"00123": "Right"}}


def test_a_table_that_is_no_table_is_named(root: Path) -> None:
    for path in (root / "hosp").glob("prescriptions*"):
        path.write_bytes(path.read_bytes()[:40] if path.suffix == ".gz" else b"ndc,drug\n00123,\xff\xfe\n")
    with pytest.raises(ValueError, match=r"prescriptions\.csv(\.gz)? cannot be read as a CSV table"):
        code_names(root, {"drugs": ["00123"]})


def test_a_row_that_is_broken_costs_that_row_only(root: Path) -> None:
    path = next((root / "hosp").glob("prescriptions*"))
    text = b"ndc,drug\n00123,Right\nbroken\n,,,,\n00456,Next\n"
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    assert code_names(root, {"drugs": ["00123", "00456"]}) == {"drugs": {"00123": "Right", "00456": "Next"}}


PEAK = """
import sys
from rollout.data.names import code_names
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
names = code_names(sys.argv[1], {"drugs": [f"{code:011d}" for code in range(301)]})
assert names == {"drugs": {f"{code:011d}": f"Drug {code}" for code in range(300)} | {f"{300:011d}": "Last"}}, names
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_follows_the_codes_and_not_the_prescriptions(tmp_path: Path) -> None:
    """900,000 prescriptions, 180 MiB unpacked: reading them at once takes twice that."""
    columns = ["subject_id", "starttime", "drug", "ndc", "prod_strength", "form_unit_disp", "route"]
    rows = [
        (10_000_000 + i, "2180-05-08 08:00:00", f"Drug {i % 300}", f"{i % 300:011d}", "25mg Tablet " * 11, "TAB", "PO")
        for i in range(20_000)
    ]
    block = gzip.compress(pl.DataFrame(rows, schema=columns, orient="row").write_csv(include_header=False).encode(), 1)
    (tmp_path / "hosp").mkdir()
    with (tmp_path / "hosp" / "prescriptions.csv.gz").open("wb") as file:
        file.write(gzip.compress((",".join(columns) + "\n").encode()))
        for _ in range(45):
            file.write(block)
        file.write(gzip.compress(f"1,,Last,{300:011d},,,\n".encode()))
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200
