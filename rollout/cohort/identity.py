"""What tells one run from another: fingerprints of the model and of the data, and where two runs differ."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLED = 64
"""Samples by whose content a dataset is known again, evenly spread over it, first and last among them."""

CONTENT = "content"


def model_identity(model: nn.Module) -> dict[str, Any]:
    """The model's class, its number of parameters, and a digest of weights, buffers and plain settings of its modules.

    Settings are numbers, strings and flags held by a module, and tuples and lists of them, such as its number of heads,
    which no weight shows. A module that changes one of them as it runs is another model each time.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        _add(digest, [name, type(module).__qualname__, dict(_settings(module))])
    for name, tensor in (dict(model.named_buffers()) | model.state_dict()).items():
        _add(digest, [name, tensor])
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": digest.hexdigest(),
    }


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and name != "training" and _is_plain(value):
            yield name, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def sampled_content(samples: Any, count: int) -> dict[str, str | None]:
    """Sample number → digest, of ``SAMPLED`` samples; None for one that cannot be read now.

    It takes a moment however large the cohort is, so a change in a sample that is not among those goes unseen.

    Args:
        samples: Gives sample i by ``samples[i]``.
        count: How many there are.
    """
    content: dict[str, str | None] = {}
    for number in np.unique(np.linspace(0, count - 1, min(SAMPLED, count)).round().astype(int)).tolist():
        try:
            content[str(number)] = digest_of(samples[number])[:16]
        except Exception:  # a failure of its own, later
            content[str(number)] = None
    return content


def digest_of(value: Any) -> str:
    """A digest of anything made of tensors, arrays, numbers, strings, lists and dicts."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a value in a form in which no two values look alike."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.layout is not torch.strided:
            value = value.to_dense()
        _add_bytes(digest, f"tensor {value.dtype} {list(value.shape)}", _raw(value))
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        _add(digest, [list(value.shape), value.tolist()])
    elif isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value)
        _add_bytes(digest, f"array {value.dtype} {list(value.shape)}", np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        _add_bytes(digest, f"mapping {len(value)}", b"")
        for key in sorted(value, key=repr):
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        _add_bytes(digest, f"list {len(value)}", b"")
        for item in value:
            _add(digest, item)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        _add_bytes(
            digest,
            type(value).__name__,
            value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass"),
        )
    elif isinstance(value, set | frozenset):
        _add(digest, ["set", sorted(map(digest_of, value))])
    else:
        told = repr(value) if type(value).__repr__ is not object.__repr__ else ""
        _add_bytes(digest, f"{type(value).__module__}.{type(value).__qualname__}", told.encode(errors="replace"))


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _add_bytes(digest: Any, kind: str, content: bytes) -> None:
    digest.update(f"{kind}:{len(content)}:".encode())
    digest.update(content)


def run_digest(identity: Mapping[str, Any]) -> str:
    """A digest of an identity but for the sampled content, which need not be readable each time."""
    dataset = {key: value for key, value in identity["dataset"].items() if key != CONTENT}
    return digest_of({**identity, "dataset": dataset})


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Where two identities differ, in words: ``model.fingerprint: 'ab…' there, 'cd…' now``."""
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        there, here, name = before.get(key), now.get(key), f"{path}{key}"
        if key == CONTENT:
            both = [(n, there.get(n), digest) for n, digest in (here or {}).items() if isinstance(there, Mapping)]
            changed = [n for n, old, new in both if old is not None and new is not None and old != new]
            if changed:
                found.append(f"{path}samples {', '.join(changed[:5])}{', …' * (len(changed) > 5)} hold other values")
        elif isinstance(there, Mapping) and isinstance(here, Mapping):
            found += differences(there, here, f"{name}.")
        elif there != here:
            found.append(f"{name}: {_short(there)} there, {_short(here)} now")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:16] + "…" + text[-1:]
