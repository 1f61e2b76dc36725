"""The probe that asks a model which row of R it reads. Needs torch only."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rollout.pyhealth.readout import rows_read

SHAPES = {"a": (3, 5), "b": (3, 4)}
PICKS = {
    "first": lambda r: r[:, 0],
    "last": lambda r: r[:, -1],
    "one of each": lambda r: r[torch.arange(3), torch.tensor([2, 0, 3])],
    "by gather": lambda r: r.gather(1, torch.tensor([1, 1, 0]).view(3, 1, 1).expand(3, 1, r.shape[2]))[:, 0],
}
OTHERWISE = {
    "column": lambda r: r[:, :, 0],
    "diagonal": lambda r: r.diagonal(dim1=1, dim2=2),
    "mean of rows": lambda r: r.mean(1),
    "mean of two, a whole row number": lambda r: 0.5 * (r[:, 0] + r[:, 2]),
    "largest": lambda r: r.amax(1),
    "scaled": lambda r: r[:, 0] * 2,
    "normalised": lambda r: r[:, 1] / r[:, 1].sum(-1, keepdim=True),
    "clamped": lambda r: r[:, 1].clamp(min=0),
    "masked": lambda r: r[:, 0] * (torch.arange(r.shape[2]) < 3),
    "rolled": lambda r: r[:, 1].roll(1, -1),
    "of another sample": lambda r: r.flip(0)[:, 1],
    "of the transpose": lambda r: r.transpose(1, 2)[:, 0],
    "by value": lambda r: r[torch.arange(3), r[:, :, 0].argmax(1)],
    "kept dimension": lambda r: r[:, :1],
    "cut": lambda r: r[:, 0, 1:],
    "a number": lambda r: 0.0,
}


@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)
def test_the_probe_finds_the_row(pick: Any) -> None:
    found = rows_read(lambda R, **data: {k: pick(r) for k, r in R.items()}, SHAPES, torch.device("cpu"), {})
    assert found is not None
    for key, (size, seq) in SHAPES.items():
        r = torch.rand(size, seq, seq)
        assert torch.equal(r[torch.arange(size), found[key]], pick(r))


@pytest.mark.parametrize("read", OTHERWISE.values(), ids=OTHERWISE)
def test_the_probe_refuses_anything_but_a_row(read: Any) -> None:
    def readout(R: dict[str, Tensor], **data: Any) -> dict[str, Any]:
        return {"a": R["a"][:, 0], "b": read(R["b"])}

    assert rows_read(readout, SHAPES, torch.device("cpu"), {}) is None


def test_the_probe_refuses_other_keys_and_holds_no_matrix() -> None:
    assert rows_read(lambda R, **data: {"a": R["a"][:, 0]}, SHAPES, torch.device("cpu"), {}) is None
    sizes: list[int] = []

    def readout(R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        sizes.extend(r.untyped_storage().nbytes() for r in R.values())
        return {key: r[:, 7] for key, r in R.items()}

    found = rows_read(readout, {"a": (32, 4096)}, torch.device("cpu"), {})
    assert found is not None
    assert found["a"].tolist() == [7] * 32
    assert max(sizes) < 100_000, "a [32, 4096, 4096] matrix of its own would take 2 GB"
