"""Records with repeats for the tests of merged rows, and whether a model's are merged."""

from contextlib import suppress
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import rollout
from rollout.pyhealth.merged import CannotMergeError, merged_blocks

PYHEALTH = rollout.METHODS["pyhealth"]


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Records of a few codes with repeats, padded, some of them empty, position 0 masked, or with masks beside them."""
    data: dict[str, Any] = {}
    size = draw(st.integers(1, 4))
    for key in ("conditions", "drugs"):
        seq = draw(st.integers(1, 9))
        records = []
        for _ in range(size):
            length = draw(st.integers(0, seq))
            record = draw(st.lists(st.integers(2, draw(st.sampled_from([3, 5, 7]))), min_size=length, max_size=length))
            if record and draw(st.integers(0, 3)) == 0:
                record[0] = 0
            records.append(record + [0] * (seq - length))
        ids = torch.tensor(records)
        mask = st.lists(st.lists(st.booleans(), min_size=seq, max_size=seq), min_size=size, max_size=size)
        data[key] = (ids, torch.tensor(draw(mask))) if draw(st.integers(0, 3)) == 0 else ids
    return data | {"label": torch.ones(size, 1, dtype=torch.float64)}


def record(data: dict[str, Any], b: int) -> dict[str, Any]:
    """One sample of a batch, at the batch's width."""

    def cut(value: Any) -> Any:
        return tuple(map(cut, value)) if isinstance(value, tuple) else value[b : b + 1]

    return {key: cut(value) for key, value in data.items()}


def sines(x: Tensor) -> Tensor:
    """A position encoding [S, E]."""
    return torch.sin(torch.outer(torch.arange(x.shape[1]), torch.arange(x.shape[2]))).to(x)


def repeated() -> dict[str, Any]:
    """Records of twenty codes, three of them different."""
    ids = torch.randint(2, 5, (4, 20), generator=torch.Generator().manual_seed(2))
    return {"conditions": ids, "drugs": ids.flip(0), "label": torch.ones(4, 1)}


def with_masked_starts() -> dict[str, Any]:
    """`repeated`, of one record position 0 masked, of one the end, and of one all but position 0; float64 labels."""
    data = repeated()
    for key in ("conditions", "drugs"):
        data[key][0, 0] = data[key][1, 12:] = data[key][2, 1:] = 0
    return data | {"label": data["label"].double()}


def merges(subject: Any, method: rollout.Method = PYHEALTH) -> bool:
    with suppress(CannotMergeError):
        return bool(merged_blocks(subject, method, "auto"))
    return False
