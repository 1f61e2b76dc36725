"""Code → id: fitted on a MEDS folder, or read from a JSON file, and which of its entries are no codes."""

import re
from collections.abc import Mapping
from pathlib import Path

from rollout.data.meds.folder import MedsFolder
from rollout.data.meds.tables import CODE_NAMES, collected, scan_table
from rollout.files import parse_json, usable_path

PAD, UNKNOWN = "<pad>", "<unk>"
MOST_IDS = 2**24
_FORMS = {
    "pad": "pad(?:ding)?",
    "unk": "unk(?:nown)?",
    "first": "cls|s|bos|begin(?:ning)?(?:_of_(?:text|sequence))?",
    "last": "sep|/s|eos|end(?:_of_?(?:text|sequence))?",
}


def fit_vocabulary(root: str | Path) -> dict[str, int]:
    """Give every code of a MEDS folder an id: `<pad>` 0, `<unk>` 1, the codes by their names from 2 on.

    The shards are read one by one, of each only its codes.

    Raises:
        ValueError: As `MedsFolder`.
    """
    folder, codes = MedsFolder(root), set[str]()
    for shard in folder.shards:
        frame = scan_table(shard, CODE_NAMES, {}, "MEDS events").select("code").unique()
        codes.update(collected(frame, shard, "MEDS events")["code"].drop_nulls())
    return {code: number for number, code in enumerate([PAD, UNKNOWN, *sorted(codes - {PAD, UNKNOWN})])}


def read_code_ids(path: str | Path) -> dict[str, int]:
    """Read a vocabulary file: a JSON object of code → id, or a `tokenizer.json` of whole words (`WordLevel`).

    Raises:
        ValueError: If it cannot be read, or is something else; as `check_code_ids`.
    """
    path = usable_path(path, "vocabulary")
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"vocabulary must be a JSON object of code → id, got {path}: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(model, dict):
        if model.get("type") != "WordLevel":
            raise ValueError(
                f"vocabulary {path} is a tokenizer that splits codes into pieces ({model.get('type')!r}); it must give "
                "each code one id: a JSON object of code → id, or a WordLevel tokenizer"
            )
        try:
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
            content = {**(model.get("vocab") or {}), **added}
        except (TypeError, KeyError) as error:
            raise ValueError(f"vocabulary {path} must be a tokenizer with vocab and added_tokens") from error
    return check_code_ids(content, f"vocabulary {path}")


def check_code_ids(given: object, name: str) -> dict[str, int]:
    """Return a vocabulary of code → id.

    Raises:
        ValueError: If it is no such mapping, is empty, or two codes have one id; if it names two paddings or two
            unknowns, or gives the id 0 to a code and names no padding.
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{name} must be an object of code → id, got {type(given).__name__}")
    for code, number in given.items():
        if not isinstance(code, str) or type(number) is not int or not 0 <= number < MOST_IDS:
            raise ValueError(
                f"{name} must be of strings → whole numbers from 0 to {MOST_IDS - 1:,}, got {code!r}: {number!r}"
            )
    if len(set(given.values())) < len(given):
        seen: dict[int, str] = {}
        for code, number in given.items():
            if number in seen:
                raise ValueError(
                    f"{name} must give each code an id of its own, {seen[number]!r} and {code!r} have {number}"
                )
            seen[number] = code
    found = dict(given)
    special_token(found, "unk", name)
    padding_of(found, name)
    return found


def special_token(vocabulary: Mapping[str, int], kind: str, name: str = "vocabulary") -> str | None:
    """The entry that is no code: of padding (`pad`), of unknown codes (`unk`), that begins (`first`) or ends (`last`)
    a sequence; None where there is none.

    Raises:
        ValueError: If there are several.
    """
    form = re.compile(rf"[<\[]\|?(?:{_FORMS[kind]})\|?[>\]]", re.IGNORECASE)
    found = [code for code in vocabulary if form.fullmatch(code)]
    if len(found) > 1 and kind in ("pad", "unk"):
        raise ValueError(f"{name} must name one token of the kind {kind!r}, got {', '.join(map(repr, found))}")
    return found[0] if found else None


def padding_of(vocabulary: Mapping[str, int], name: str = "vocabulary") -> int:
    """The id of padding: that of `<pad>` or `[PAD]`, else 0.

    Raises:
        ValueError: If a code has that id.
    """
    token = special_token(vocabulary, "pad", name)
    if token is not None:
        return vocabulary[token]
    taken = next((code for code, number in vocabulary.items() if number == 0), None)
    if taken is not None:
        raise ValueError(f"{name} gives the id 0 to {taken!r} and names no padding: it needs <pad> or [PAD]")
    return 0
