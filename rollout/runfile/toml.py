"""Plain values as a TOML file, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.files import write_whole


def write_toml(tables: Mapping[str, Mapping[str, Any]], path: str | Path, heading: str = "") -> Path:
    """Write tables of plain values as TOML, `heading` as its first lines, commented.

    Raises:
        ValueError: If a value has no form in TOML, such as None, naming it.
    """
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{_key(key)} = {_toml(value, f'{name}.{key}')}" for key, value in table.items()]
    return write_whole(Path(path), ("\n".join(lines).lstrip("\n") + "\n").encode())


def _toml(value: Any, where: str) -> str:
    if isinstance(value, str | Path):
        return _string(str(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(entry, where) for entry in value)}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(key)} = {_toml(entry, f'{where}.{key}')}" for key, entry in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    raise ValueError(f"{where} must be text, a number, true or false, a list or a table of these, got {value!r}")


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _string(key)
