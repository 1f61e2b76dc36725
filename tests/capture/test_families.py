"""Every family: the same bits with a capture as without, and the rollout of the maps it hands out, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import rollout
from rollout._capture import patch
from tests.support.cases import same_bits

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'")

from tests.support.capture_families import FAMILIES, largest_error, prepared
from tests.support.capture_state import assert_nothing_left, state

CASES = [(name, kind) for name, family in FAMILIES.items() for kind in family.implementations]


def tensors(output: Any) -> list[Tensor]:
    kept = [value for key, value in output.items() if "past" not in key and "cache" not in key]
    return [leaf.clone() for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_family(name: str, implementation: str) -> None:
    family = FAMILIES[name]
    model, inputs = prepared(family, implementation)
    with torch.no_grad():
        plain = tensors(model(**inputs))
        before = {} if family.stateful else state(model)
        if family.refused is not None:
            with pytest.raises(rollout.CaptureError, match=family.refused), rollout.capture(model):
                model(**inputs)
            assert not patch._patches
            assert family.stateful or state(model) == before
            return
        with rollout.capture(model, shared_layers=family.shared) as tape:
            looked_at, after = tensors(model(**inputs)), tensors(model(**inputs))
    assert_nothing_left(model, before)
    for captured in (looked_at, after):
        assert len(captured) == len(plain)
        assert all(same_bits(a, b) for a, b in zip(captured, plain, strict=True))
    assert tape.notes == ()
    error = largest_error(family, model, inputs, tape)
    assert error <= (5e-6 if family.single else 1e-7)  # some take the softmax in float32 whatever they are


def test_the_page_has_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "capture.md").read_text()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in page.splitlines() if line.startswith("| ")}
    outcomes = {(name, kind): outcome for name, kind, outcome in rows}
    for name, kind in CASES:
        assert outcomes[name, kind].startswith("right" if FAMILIES[name].refused is None else "refused")
