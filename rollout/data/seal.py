"""A seal that only this user can set: a keyed digest (HMAC-SHA256) of a record, its key kept outside of what it seals.

The key is made on first use, in `$XDG_STATE_HOME/attention-rollout/cache.key` (`~/.local/state` by default), for its
owner alone to read. Where no key can be kept, this process seals with one of its own, which no other process has.
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "seal"
BYTES = 32
_of_this_process = secrets.token_bytes(BYTES)


def key_file() -> Path:
    """Where the key is kept.

    Raises:
        OSError: If there is no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # as the XDG specification has it, a relative one counts as none
        try:
            state = str(Path.home() / ".local" / "state")
        except RuntimeError as error:
            raise OSError("there is no home folder") from error
    return Path(state) / "attention-rollout" / "cache.key"


def seal_record(record: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the record with its seal; and, when only this process can check it, why no key could be kept."""
    try:
        key, trouble = _read_or_make_key(), None
    except OSError as error:
        key, trouble = _of_this_process, str(error)
    return {**record, SEAL: _digest(record, key)}, trouble


def seal_problem(record: Mapping[str, Any]) -> str | None:
    """Why a record is not known to be this user's own, in words; None when it is."""
    seal = record.get(SEAL)
    if not isinstance(seal, str) or not seal.isascii():
        return "it has no seal"
    if hmac.compare_digest(seal, _digest(record, _of_this_process)):
        return None
    try:
        path = key_file()
        key = _read_key(path)
    except OSError as error:
        return f"there is no key of yours to check its seal with ({error})"
    if not hmac.compare_digest(seal, _digest(record, key)):
        return f"its seal was not set with your key, {path}"
    return None


def _digest(record: Mapping[str, Any], key: bytes) -> str:
    content = {name: value for name, value in record.items() if name != SEAL}
    return hmac.digest(key, json.dumps(content, sort_keys=True).encode("ascii"), hashlib.sha256).hex()


def _read_or_make_key() -> bytes:
    path = key_file()
    try:
        return _read_key(path)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_key(path)
        return _read_key(path)


def _write_key(path: Path) -> None:
    """Written under another name and linked, so that of two processes at once one key wins, and is whole."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        try:
            file.write(secrets.token_hex(BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
            os.link(partial, path)
        except FileExistsError:
            pass  # another process was first
        finally:
            partial.unlink()


def _read_key(path: Path) -> bytes:
    """The key, if it is a file that only its owner, this user, can read.

    Raises:
        OSError: If it is not there, or cannot be trusted to be a secret of this user.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"{path} must be a file of yours that nobody else can read or write (chmod 600)")
        content = file.read(1000)
    try:
        key = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != BYTES:
        raise OSError(f"{path} is damaged; delete it, and a new key is made")
    return key
