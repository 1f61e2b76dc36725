"""Which stream a module's attention belongs to, from its path in the model."""

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

NUMBERED = re.compile(r"(.*?)\d+")


def stream_names(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Of every module the stream, which is its path up to the index that counts layers, and the path below that.

    `encoder.layers.3.self_attn` and `encoder.layers.encoder_layer_3.self_attention` belong to `encoder.layers`. Of
    several indices the last counts under which siblings have the same module, or that is alone in a ModuleList:
    `block.3.layer.0.SelfAttention` belongs to `block`, `towers.1.layers.3.attn` to `towers.1.layers`. A path without
    an index belongs to its parent, and to `layers` at the root.

    Args:
        modules: path → module, as `named_modules` gives them.
    """
    split = {path: path.split(".") for path in modules}
    alike = Counter(_masked(parts, at) for parts in split.values() for at in _numbered(parts))
    children = Counter(path.rpartition(".")[0] for path in modules)
    return {path: _stream(parts, modules, alike, children) for path, parts in split.items()}


def _stream(
    parts: list[str], modules: Mapping[str, nn.Module], alike: Counter[tuple[str, ...]], children: Counter[str]
) -> tuple[str, str]:
    numbered = _numbered(parts)
    for at in reversed(numbered):
        head = ".".join(parts[:at])
        if alike[_masked(parts, at)] > 1 or (isinstance(modules[head], nn.ModuleList) and children[head] == 1):
            return head or "layers", ".".join(parts[at + 1 :])
    end = numbered[-1] if numbered else len(parts) - 1
    return ".".join(parts[:end]) or "layers", ".".join(parts[end:])


def _numbered(parts: list[str]) -> list[int]:
    return [at for at, part in enumerate(parts) if NUMBERED.fullmatch(part)]


def _masked(parts: list[str], at: int) -> tuple[str, ...]:
    """The path with the number of one part left out: equal for modules that differ in that index only."""
    match = NUMBERED.fullmatch(parts[at])
    assert match is not None
    return *parts[:at], match[1] + "#", *parts[at + 1 :]
