"""Output folders, refused if they hold anything or cannot be written; and files that are there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

PROBE = ".write-probe"
PARTIAL = ".partial"
"""Ending of the name a file has until it is whole."""


def empty_folder(path: str | Path, name: str) -> Path:
    """Return ``path`` as a folder that exists, is empty and can be written.

    Args:
        path: The folder; its parents are made too.
        name: What to call it in an error.

    Raises:
        ValueError: If it is a file, is not empty, or cannot be made or written.
    """
    folder = Path(path).expanduser()
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
        with partial.open("wb") as file:
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
