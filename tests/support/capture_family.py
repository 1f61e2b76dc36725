"""A family of models in the tests of capture: how to make one, and what a capture must say of it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import rollout
from rollout._capture import patch
from tests.support.capture_state import assert_nothing_left, state
from tests.support.cases import same_bits
from tests.support.oracles import array, rollout_matrices

Maps = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Family:
    """One family: how to make a model of it, what to call it with, and what a capture must say.

    Attributes:
        make: gives the model, for an attention implementation.
        inputs: what it is called with, or a function that gives it.
        maps: gives the maps of each stream that the model itself makes, from the model, its inputs and the tape.
        refused: what the refusal says; None when the family is captured.
        implementations: to be tried.
        shared: its layers share weights.
        single: run in float32; some kernels of mixtures of experts know no float64.
        stateful: its modules keep something of every call.
        padding: the input that is 0 on padding, of every stream but a decoder's.
        sparse: what it attends to leaves open which positions are padding.
    """

    make: Callable[[str], Any]
    inputs: dict[str, Any] | Callable[[], dict[str, Any]]
    maps: Callable[[Any, dict[str, Tensor], Any], Maps]
    refused: str | None = None
    implementations: tuple[str, ...] = ("eager",)
    shared: bool = False
    single: bool = False
    stateful: bool = False
    padding: str = "attention_mask"
    sparse: bool = False


def prepared(family: Family, implementation: str) -> tuple[Any, dict[str, Any]]:
    """A model of the family and its inputs, in float64 where it can be."""
    model = family.make(implementation)
    inputs = family.inputs() if callable(family.inputs) else family.inputs
    if family.single:
        return model, inputs
    return model.double(), {key: _double(value) for key, value in inputs.items()}


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def largest_error(family: Family, model: Any, inputs: dict[str, Tensor], tape: Any) -> float:
    """max|error| of the full rollout of every stream, against the maps of the model itself, on valid rows."""
    maps, result = family.maps(copy.deepcopy(model), inputs, tape), tape.rollout()
    assert tuple(maps) == tape.streams
    worst = 0.0
    for stream, layers in maps.items():
        assert len(layers) == len(tape.layers(stream))
        difference = array(result[stream]) - rollout_matrices(layers, rollout.METHODS["rollout"])
        if family.padding in inputs and "decoder" not in stream:
            difference = difference * inputs[family.padding].numpy()[..., None]
        worst = max(
            worst, float(abs(difference).max()), _error_at_the_end(family, inputs, tape, stream, result[stream])
        )
    return worst


def _error_at_the_end(family: Family, inputs: dict[str, Tensor], tape: Any, stream: str, full: Tensor) -> float:
    """max|error| of the row that −1 means, against that row of the full rollout: the last one that is no padding."""
    if family.sparse:
        with pytest.raises(ValueError, match="so where a sample ends cannot be told"):
            tape.rollout({stream: -1})
        return 0.0
    seq, rows = full.shape[1], torch.arange(len(full))
    last = torch.full((len(full),), seq - 1)
    if family.padding in inputs and "decoder" not in stream:
        last = torch.where(inputs[family.padding].bool(), torch.arange(seq), -1).amax(1)
    return float((tape.rollout({stream: -1})[stream] - full[rows, last]).abs().max())


def check(family: Family, implementation: str) -> None:
    """Assert the same bits with a capture as without, nothing left, and right rollouts, or the refusal."""
    model, inputs = prepared(family, implementation)
    with torch.no_grad():
        plain = _tensors(model(**inputs))
        before = {} if family.stateful else state(model)
        if family.refused is not None:
            with pytest.raises(rollout.CaptureError, match=family.refused), rollout.capture(model):
                model(**inputs)
            assert not patch._patches
            assert family.stateful or state(model) == before
            return
        with rollout.capture(model, shared_layers=family.shared) as tape:
            looked_at, after = _tensors(model(**inputs)), _tensors(model(**inputs))
    assert_nothing_left(model, before)
    for captured in (looked_at, after):
        assert len(captured) == len(plain)
        assert all(same_bits(a, b) for a, b in zip(captured, plain, strict=True))
    assert tape.notes == ()
    error = largest_error(family, model, inputs, tape)
    assert error <= (5e-6 if family.single else 1e-7)  # some take the softmax in float32 whatever they are


def _tensors(output: Any) -> list[Tensor]:
    if hasattr(output, "items"):
        output = [value for key, value in output.items() if "past" not in key and "cache" not in key]
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
