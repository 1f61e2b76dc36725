"""Paths the system can look for; output folders, refused if they hold anything; files there whole or not at all."""

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

PROBE = ".write-probe"
PARTIAL = ".partial"
"""Ending of the name a file has until it is whole."""


def usable_path(path: str | Path, name: str) -> Path:
    """Return a path, its `~` replaced, that the system can look for, whether or not anything is there.

    Args:
        path: As given.
        name: What to call it in an error.

    Raises:
        ValueError: If it begins with `~` and a user who is not there, is too long, goes round in links, or holds what
            no path can.
    """
    try:
        found = Path(path).expanduser()
        os.lstat(found)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} must be a path, got {str(path)!r}: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ValueError(f"{name} must be a path, got {str(path)!r}: {error.strerror}") from error
    return found


def empty_folder(path: str | Path, name: str) -> Path:
    """Return `path` as a folder that exists, is empty and can be written.

    Args:
        path: The folder; its parents are made too.
        name: What to call it in an error.

    Raises:
        ValueError: If it is no path, is a file, is not empty, or cannot be made or written.
    """
    folder = usable_path(path, name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {folder}; give another path")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{name} must be a new or empty folder, got {folder}, which is not empty; give another path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / PROBE
        probe.touch()
        os.unlink(probe)
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be written, got {folder}: {error.strerror}") from error
    return folder


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file so that it is there whole or not at all, also after a power cut: another name first, then renamed.

    Raises:
        OSError: If it cannot be written; what was there before is then untouched.
    """
    partial = path.with_name(f".{path.name[:80]}.{os.getpid()}{PARTIAL}")
    try:
        partial.unlink(missing_ok=True)  # what a killed process left, or a link that somebody planted
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_json(content: Any, path: str | Path) -> Path:
    """Write plain values as JSON, in ASCII: any string comes back as it was."""
    return write_whole(Path(path), (json.dumps(content, indent=1) + "\n").encode("ascii"))


def as_json(value: Any) -> bytes:
    """Plain values as JSON in UTF-8; half of a surrogate pair, which UTF-8 cannot say, becomes a question mark."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")


def plain(value: Any) -> Any:
    """Values as they come back from a file."""
    return json.loads(as_json(value))


def first_line(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_json(path: Path) -> Any:
    """Read a JSON file, as `parse_json` does.

    Raises:
        ValueError: If it is no JSON, or leaves open what it means; it names the file.
        OSError: If it cannot be read.
    """
    try:
        return parse_json(path.read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from None


def parse_json(content: bytes | str) -> Any:
    """Return what JSON says, where it says one thing: no key twice, no NaN, no nesting past what can be read.

    Raises:
        ValueError: If it is no JSON, or leaves open what it means.
    """
    try:
        return json.loads(content, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def put_between_markers(path: Path, marker: str, text: str | None) -> Path:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->` on a page; with None, only look for them.

    Raises:
        ValueError: the page lacks them.
    """
    whole, start, end = path.read_text(encoding="utf-8"), f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{path.name} must have the markers {start} and {end} once each")
    if text is not None:
        before, rest = whole.split(start)
        write_whole(path, f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}".encode())
    return path
