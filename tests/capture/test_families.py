"""Every family: the same bits with a capture as without, and the rollout of the maps it hands out, or a refusal."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import rollout
from rollout._capture import patch
from tests.support.cases import same_bits
from tests.support.oracles import array, rollout_matrices

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'attention-rollout[hf]'")

from tests.support.capture_families import FAMILIES, Family
from tests.support.capture_state import assert_nothing_left, state

ROLLOUT = rollout.METHODS["rollout"]
CASES = [(name, kind) for name, family in FAMILIES.items() for kind in family.implementations]


def prepared(family: Family, implementation: str) -> tuple[Any, dict[str, Tensor]]:
    model = family.make(implementation)
    if family.single:
        return model, family.inputs
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in family.inputs.items()}
    return model.double(), inputs


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


def largest_error(family: Family, model: Any, inputs: dict[str, Tensor], tape: Any) -> float:
    """max|error| of the full rollout of every stream, against the maps the model hands out, on valid rows."""
    twin = copy.deepcopy(model)
    if twin.config._attn_implementation != "eager":
        twin.set_attn_implementation("eager")
    with torch.no_grad():
        output = twin(**inputs, output_attentions=True)
    assert len(tape.streams) == len(family.eager)
    worst = 0.0
    for stream, given in zip(tape.streams, family.eager, strict=True):
        maps = [layer for layer in output[given] if layer is not None]
        assert len(maps) == len(tape.layers(stream))
        difference = array(tape.rollout()[stream]) - rollout_matrices(maps, ROLLOUT)
        mask = inputs.get("attention_mask")
        if mask is not None and "decoder" not in given:
            difference = difference * mask.numpy()[..., None]
        worst = max(worst, float(abs(difference).max()))
    return worst
