"""What a code says of itself: its version of the ICD, its chapter, its ATC class; from the code's form, no table.

Chapters by the published ranges:

- ICD-9-CM: the 17 chapters 001–999 and the supplementary classifications V01–V91 and E000–E999 (CMS and NCHS, ICD-9-CM
  version 32, 2014);
- ICD-10 and ICD-10-CM: the 22 chapters A00–U99 (WHO, ICD-10 2019; CMS and NCHS, ICD-10-CM 2024, where a chapter may
  end further: `C00–D49`, `K00–K95`).

ATC classes are the first 1, 3, 4 and 5 signs of a code (WHO Collaborating Centre for Drug Statistics Methodology).
"""

import re
from typing import NamedTuple

__all__ = ["ATC_LEVELS", "Diagnosis", "atc_class", "chapter", "is_atc", "read_diagnosis"]

ICD9_CHAPTERS = (
    ("001", "139", "Infectious and parasitic diseases"),
    ("140", "239", "Neoplasms"),
    ("240", "279", "Endocrine, nutritional and metabolic diseases, and immunity disorders"),
    ("280", "289", "Diseases of the blood and blood-forming organs"),
    ("290", "319", "Mental disorders"),
    ("320", "389", "Diseases of the nervous system and sense organs"),
    ("390", "459", "Diseases of the circulatory system"),
    ("460", "519", "Diseases of the respiratory system"),
    ("520", "579", "Diseases of the digestive system"),
    ("580", "629", "Diseases of the genitourinary system"),
    ("630", "679", "Complications of pregnancy, childbirth, and the puerperium"),
    ("680", "709", "Diseases of the skin and subcutaneous tissue"),
    ("710", "739", "Diseases of the musculoskeletal system and connective tissue"),
    ("740", "759", "Congenital anomalies"),
    ("760", "779", "Certain conditions originating in the perinatal period"),
    ("780", "799", "Symptoms, signs, and ill-defined conditions"),
    ("800", "999", "Injury and poisoning"),
    ("E000", "E999", "External causes of injury and poisoning"),
    ("V01", "V91", "Factors influencing health status and contact with health services"),
)
"""First and last category of each chapter, both within it."""
ICD10_CHAPTERS = (
    ("A00", "B99", "Certain infectious and parasitic diseases"),
    ("C00", "D49", "Neoplasms"),
    ("D50", "D89", "Diseases of the blood and blood-forming organs and certain disorders of the immune mechanism"),
    ("E00", "E90", "Endocrine, nutritional and metabolic diseases"),
    ("F00", "F99", "Mental and behavioural disorders"),
    ("G00", "G99", "Diseases of the nervous system"),
    ("H00", "H59", "Diseases of the eye and adnexa"),
    ("H60", "H95", "Diseases of the ear and mastoid process"),
    ("I00", "I99", "Diseases of the circulatory system"),
    ("J00", "J99", "Diseases of the respiratory system"),
    ("K00", "K95", "Diseases of the digestive system"),
    ("L00", "L99", "Diseases of the skin and subcutaneous tissue"),
    ("M00", "M99", "Diseases of the musculoskeletal system and connective tissue"),
    ("N00", "N99", "Diseases of the genitourinary system"),
    ("O00", "O9A", "Pregnancy, childbirth and the puerperium"),
    ("P00", "P96", "Certain conditions originating in the perinatal period"),
    ("Q00", "Q99", "Congenital malformations, deformations and chromosomal abnormalities"),
    ("R00", "R99", "Symptoms, signs and abnormal clinical and laboratory findings, not elsewhere classified"),
    ("S00", "T98", "Injury, poisoning and certain other consequences of external causes"),
    ("U00", "U99", "Codes for special purposes"),
    ("V00", "Y99", "External causes of morbidity"),
    ("Z00", "Z99", "Factors influencing health status and contact with health services"),
)
"""As `ICD9_CHAPTERS`. A category may end in a letter (`C7A`), which sorts after every digit."""


def _listed(codes: str) -> frozenset[str]:
    return frozenset(codes.split())


IN_BOTH = _listed(
    "E030 E8020 E8021 E8029 E8300 E8301 E8309 E8310 E8311 E8319 E8330 E8331 E8332 E8339 E8340 E8341 E8342 E8349 E8350 "
    "E8351 E8352 E8359 E8381 E8389 E8411 E8419 E848 E851 E8581 E8582 E8589 E8720 E8721 E8722 E8729 E8801 E8809 E882 "
    "E8840 E8841 E8842 E8843 E8849 E8881 E8889 E892 E894 E895 E896 E8981"
)
"""The codes of ICD-9-CM (version 32), without point, that ICD-10-CM (2024) has too: as a code, or as a category that an
earlier edition had as a code (`E8881`)."""
OF_ICD10 = _listed(
    "E000 E001 E002 E009 E010 E011 E012 E018 E800 E801 E803 E804 E805 E806 E807 E832 E839 E840 E849 E850 E852 E853 "
    "E854 E859 E860 E861 E869 E870 E871 E873 E874 E875 E876 E877 E8770 E8771 E8779 E878 E8802 E881 E883 E889 E890 E891 "
    "E893 E8940 E8941 E8982 E8989"
)
"""The codes and categories of ICD-10-CM alone that have the form of an external cause of ICD-9-CM."""
OF_ICD9 = _listed("E846 E847 E856 E857 E867 E887 E897 E899")
"""The codes of three digits, of ICD-9-CM alone, that have the form of an endocrine disease of ICD-10."""

EITHER = "ICD-9 external cause or ICD-10 endocrine disease: the code is in both"
"""The chapter of a code of `IN_BOTH`, and of a category that both have."""

_WRITTEN = re.compile(
    r"(?:(?P<version>9|10)_|(?P<kind>[DP])_|DIAGNOSIS//ICD//(?P<meds>9|10)//|ICD(?P<own>9|10)CM/)?(?P<code>.*)",
    re.DOTALL,
)
_ICD9 = re.compile(r"\d{3}(?:\.?\d{1,2})?|V\d{2}(?:\.?\d{1,2})?|E\d{3}(?:\.?\d)?", re.ASCII)
_ICD10 = re.compile(r"[A-Z]\d[0-9A-Z](?:\.?[0-9A-Z]{1,4})?", re.ASCII)
_ATC = re.compile(r"[ABCDGHJLMNPRSV](?:\d{2}(?:[A-Z](?:[A-Z](?:\d{2})?)?)?)?", re.ASCII)

ATC_LEVELS = {1: 1, 2: 3, 3: 4, 4: 5}
"""Level of an ATC class → how many signs of a code say it; the fifth is the substance itself."""
ATC_GROUPS = {
    "A": "Alimentary tract and metabolism", "B": "Blood and blood forming organs", "C": "Cardiovascular system",
    "D": "Dermatologicals", "G": "Genito-urinary system and sex hormones",
    "H": "Systemic hormonal preparations, excluding sex hormones and insulins",
    "J": "Antiinfectives for systemic use", "L": "Antineoplastic and immunomodulating agents",
    "M": "Musculo-skeletal system", "N": "Nervous system",
    "P": "Antiparasitic products, insecticides and repellents", "R": "Respiratory system", "S": "Sensory organs",
    "V": "Various",
}  # fmt: skip
"""The main groups, level 1."""


class Diagnosis(NamedTuple):
    """A diagnosis as its code tells it.

    Attributes:
        code: Without point, in capitals.
        version: 9 or 10; None where the code may be of both.
    """

    code: str
    version: int | None


def read_diagnosis(code: str, version: int | None = None) -> Diagnosis | None:
    """Read a diagnosis code of ICD-9-CM or of ICD-10 (WHO's or CM), as PyHealth's tasks or MEDS write it.

    The version is the one that the code says (`9_4280`, `10_I10`), else that of the only form it fits: an ICD-9 code
    begins with a digit, with `V` and digits alone, or with `E` and three of them. Codes with `V` are ICD-9's where
    digits alone follow: those of ICD-10-CM end in a letter (WHO's do not: say that they are of version 10). A bare code
    with `E` that fits both is of the version whose list it stands in; one that stands in both lists (`E8889`) is of no
    known version.

    Args:
        code: `I50.9`, `i509`, `4280`, `D_I509`, `10_I509`, `DIAGNOSIS//ICD//10//I509`, `ICD10CM/I50.9`, ….
        version: 9 or 10, what the codes are known to be; None: not known.

    Returns:
        None for what is no diagnosis code, or is of another version, or a procedure (`P_…`).
    """
    found = _WRITTEN.fullmatch(code.strip())
    assert found is not None  # the last group takes anything
    if found["kind"] == "P":
        return None
    written = found["version"] or found["meds"] or found["own"]
    said = int(written) if written else version
    if None not in (said, version) and said != version:
        return None
    text = found["code"].upper()
    bare, forms = text.replace(".", ""), [v for v, form in ((9, _ICD9), (10, _ICD10)) if form.fullmatch(text)]
    if said is not None:
        return Diagnosis(bare, said) if said in forms else None
    if len(forms) < 2:
        return Diagnosis(bare, forms[0]) if forms else None
    return Diagnosis(bare, _version_of_both(bare))


def _version_of_both(bare: str) -> int | None:
    """Of a code with V or E, whose form is that of both versions."""
    if bare[0] == "V" or bare >= "E900":
        return 9
    if not ("E000" <= bare[:4] <= "E030" or bare >= "E800"):
        return 10
    if bare in OF_ICD10:
        return 10
    if bare in OF_ICD9 or (len(bare) == 5 and bare not in IN_BOTH):
        return 9
    return None


def chapter(code: str, version: int | None = None) -> str | None:
    """The chapter of a diagnosis code, such as `ICD-10 I00–I99: Diseases of the circulatory system`.

    Args:
        code, version: As in `read_diagnosis`.

    Returns:
        `EITHER` where the code may be of both versions; None where it is no diagnosis code, or in no chapter.
    """
    found = read_diagnosis(code, version)
    if found is None:
        return None
    if found.version is None:
        return EITHER
    chapters = ICD9_CHAPTERS if found.version == 9 else ICD10_CHAPTERS
    for first, last, title in chapters:
        if len(found.code) >= len(first) and first <= found.code[: len(first)] <= last and _alike(first, found.code):
            return f"ICD-{found.version} {first}–{last}: {title}"
    return None


def _alike(first: str, code: str) -> bool:
    """Whether both begin with a digit, or both with a letter: `E000` is not between `001` and `139`."""
    return first[0].isdigit() == code[0].isdigit()


def is_atc(code: str) -> bool:
    """Whether a code has the form of an ATC code, of whatever level."""
    return _ATC.fullmatch(code.strip().upper()) is not None


def atc_class(code: str, level: int) -> str | None:
    """The class of an ATC code at a level of `ATC_LEVELS`, named at level 1.

    Returns:
        None for what is no ATC code, or one of a higher level, which does not say so much.
    """
    bare, length = code.strip().upper(), ATC_LEVELS[level]
    if not is_atc(bare) or len(bare) < length:
        return None
    return f"{bare[:1]}: {ATC_GROUPS[bare[:1]]}" if level == 1 else bare[:length]
