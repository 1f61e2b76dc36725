"""What tells one run from another: fingerprints of model, data and functions, and where two runs differ."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from torch import nn

from rollout.cohort.code import describe, name_of, settings_of
from rollout.cohort.content import UNKNOWN, known_digest
from rollout.cohort.digest import add_to, shown
from rollout.results.manifest import CONTENT

SAMPLED = 64
"""Samples by whose content a dataset is known again, evenly spread over it, first and last among them."""


State = Callable[[], dict[str, Any]]
"""What model and functions hold now, by name: see `Manifest.state`."""


def model_identity(model: nn.Module) -> dict[str, Any]:
    """The model's class, its number of parameters, a digest of weights, buffers and the classes of its modules, and one
    of the code of those classes that no installed package brings.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        add_to(digest, [name, type(module).__qualname__])
    for name, tensor in (dict(model.named_buffers()) | model.state_dict()).items():
        add_to(digest, [name, tensor])
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": digest.hexdigest(),
        "code": describe(_classes(model), "model").code,
    }


def function_identity(function: Any, known: Collection[Any]) -> dict[str, Any]:
    """The name of a function of the caller's, and a digest of its code and of what that calls; see `code`."""
    return {"name": name_of(function), "code": describe([function], "", known).code}


def read_state(model: nn.Module, functions: Mapping[str, Any], known: Collection[Any]) -> dict[str, Any]:
    """What model and functions hold beside weights and code, by name: `model.encoder._heads`, `explain.SCALE`.

    Args:
        model: The model.
        functions: Name → a function of the caller's.
        known: Objects the functions may hold that are described elsewhere.
    """
    state = {
        ".".join(filter(None, ("model", prefix, name))): shown(value)
        for prefix, module in model.named_modules()
        for name, value in sorted(settings_of(module).items())
    }
    state |= describe(_classes(model), "model").state
    for name, function in functions.items():
        state |= describe([function], name, known).state
    return state


def _classes(model: nn.Module) -> list[type]:
    return list(dict.fromkeys(type(module) for module in model.modules()))


def sampled_content(samples: Any, count: int) -> dict[str, str | None]:
    """Sample number → digest, of `SAMPLED` samples; None for one that cannot be read now.

    It takes a moment however large the cohort is; the commit records hold what every other sample was.

    Args:
        samples: Gives sample i by `samples[i]`.
        count: How many there are.
    """
    numbers = np.unique(np.linspace(0, count - 1, min(SAMPLED, count)).round().astype(int)).tolist()
    digests = {number: known_digest(samples, number) for number in numbers}
    return {str(number): None if digest == UNKNOWN else f"{digest:08x}" for number, digest in digests.items()}


def adopt_code(identity: dict[str, Any], there: Mapping[str, Any]) -> bool:
    """Take the digests of code from an identity of another version of Python, where code cannot be compared.

    Returns:
        Whether that was so.
    """
    if there.get("python") in (None, identity.get("python")):
        return False
    for key in ("model", "explain", "collate"):
        if isinstance(identity.get(key), dict) and isinstance(there.get(key), Mapping):
            identity[key]["code"] = there[key].get("code")
    identity["python"] = there["python"]
    return True


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Where two identities differ, in words: `model.fingerprint: 'ab…' there, 'cd…' now`."""
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
