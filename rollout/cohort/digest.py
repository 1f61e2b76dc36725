"""Digests of values, the same in every process: no ids, no addresses, no order of a set."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHORT = 40
"""Characters of a setting that stand in the manifest; of a longer one, a digest does."""

_ADDRESS = re.compile("0x[0-9a-fA-F]+")


def digest_of(value: Any) -> str:
    """A digest of anything made of tensors, arrays, numbers, strings, lists and dicts."""
    digest = hashlib.sha256()
    add_to(digest, value)
    return digest.hexdigest()


def add_to(digest: Any, value: Any) -> None:
    """Add a value in a form in which no two values look alike."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.layout is not torch.strided:
            value = value.to_dense()
        _add_bytes(digest, f"tensor {value.dtype} {list(value.shape)}", _raw(value))
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        add_to(digest, [list(value.shape), value.tolist()])
    elif isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value)
        _add_bytes(digest, f"array {value.dtype} {list(value.shape)}", np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _add_bytes(digest, f"mapping {len(value)}", b"")
        for key in sorted(value, key=repr):
            add_to(digest, key)
            add_to(digest, value[key])
    elif isinstance(value, list | tuple):
        _add_bytes(digest, f"list {len(value)}", b"")
        for item in value:
            add_to(digest, item)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        _add_bytes(
            digest,
            type(value).__name__,
            value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass"),
        )
    elif isinstance(value, set | frozenset):
        add_to(digest, ["set", sorted(map(digest_of, value))])
    else:
        told = _ADDRESS.sub("", repr(value)) if type(value).__repr__ is not object.__repr__ else ""
        _add_bytes(digest, f"{type(value).__module__}.{type(value).__qualname__}", told.encode(errors="replace"))


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _add_bytes(digest: Any, kind: str, content: bytes) -> None:
    digest.update(f"{kind}:{len(content)}:".encode())
    digest.update(content)


def is_plain(value: Any) -> bool:
    """Whether a value is None, a flag, a number or a string, or tuples and lists of them."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def shown(value: Any) -> bool | int | float | str | None:
    """A value as the manifest holds it: itself if it is short, else a digest."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if value is None or (isinstance(value, bool | int) and -(2**53) < value < 2**53):
        return value
    text = str(value) if isinstance(value, str) else json.dumps(value) if is_plain(value) else ""
    return text if 0 < len(text) <= SHORT and text.isprintable() else f"sha256:{digest_of(value)[:16]}"
