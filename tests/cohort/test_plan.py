"""The batch plan: every sample once, within the budget, a function of lengths and settings alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.cohort.plan import Plan, sample_lengths
from rollout.cohort.rows import Decoder, vocabulary_array

LENGTHS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=80)


@given(LENGTHS, st.integers(1, 400), st.integers(1, 20))
def test_every_sample_is_in_one_batch_within_the_budget(lengths, tokens, most) -> None:
    sizes = np.array(lengths)
    plan = Plan(batch_tokens=tokens, batch_samples=most)
    batches = plan.batches(sizes)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * sizes[batch].max(0).sum()
        assert len(batch) == 1 or (padded <= tokens and len(batch) <= most)
    longest = sizes[np.concatenate(batches)].max(1)
    assert (np.diff(longest) <= 0).all()


@given(LENGTHS, st.integers(1, 400), st.integers(1, 20))
def test_a_batch_is_not_cut_sooner_than_it_must(lengths, tokens, most) -> None:
    sizes = np.array(lengths)
    batches = Plan(batch_tokens=tokens, batch_samples=most).batches(sizes)
    for batch, after in pairwise(batches):
        joined = [*batch, after[0]]
        assert len(joined) > most or len(joined) * sizes[joined].max(0).sum() > tokens


@given(LENGTHS, st.integers(1, 400), st.integers(1, 20))
def test_equal_lengths_share_a_batch_and_no_others(lengths, tokens, most) -> None:
    sizes = np.array(lengths)
    plan = Plan(batch_tokens=tokens, batch_samples=most, equal_lengths=True)
    samples = [{"a": torch.ones(a), "b": (torch.ones(b), torch.ones(b, 3)), "id": "p"} for a, b in lengths]
    batches = plan.batches(sizes, [plan.group_of(sample) for sample in samples])
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(np.unique(sizes[batch], axis=0)) == 1
        assert len(batch) == 1 or (len(batch) * sizes[batch[0]].sum() <= tokens and len(batch) <= most)
    for batch, after in pairwise(batches):
        joined = [*batch, after[0]]
        differ = (sizes[after[0]] != sizes[batch[0]]).any()
        assert differ or len(joined) > most or len(joined) * sizes[batch[0]].sum() > tokens


@pytest.mark.parametrize(("one", "other"), [
    ({"f": torch.ones(2, 3)}, {"f": torch.ones(2, 4)}),
    ({"f": (torch.ones(2), torch.ones(2))}, {"f": (None, torch.ones(2))}),
    ({"f": {"ids": torch.ones(2)}}, {"f": {"ids": torch.ones(3)}}),
    ({"f": [[1, 2], [3]]}, {"f": [[1], [2, 3]]}),
    ({"f": [1, 2]}, {"f": [1]}),
    ({"f": np.ones(2)}, {"f": np.ones(3)}),
])  # fmt: skip
def test_what_a_batch_could_pad_is_not_equal(one, other) -> None:
    plan = Plan(equal_lengths=True)
    assert plan.group_of(one) != plan.group_of(other)
    assert plan.group_of(one) == plan.group_of({"f": one["f"]})
    missing = isinstance(one["f"], tuple)
    assert (Plan().group_of(one) != Plan().group_of(other)) == missing


def test_sorting_saves_padding() -> None:
    sizes = np.random.default_rng(0).lognormal(3.9, 0.85, (2048, 1)).astype(int) + 1
    batches = Plan(batch_tokens=8192).batches(sizes)
    padded = sum(len(batch) * sizes[batch].max() for batch in batches)
    unsorted = sum(len(part) * part.max() for part in np.split(sizes[:, 0], 64))
    assert padded < 1.15 * sizes.sum() < unsorted / 2


def test_parts_are_runs_of_samples() -> None:
    assert Plan(part_samples=4).parts(10) == [range(4), range(4, 8), range(8, 10)]
    assert Plan(part_samples=4).parts(8) == [range(4), range(4, 8)]


@pytest.mark.parametrize("name", ["batch_tokens", "batch_samples", "part_samples"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 to .*, got 0"):
        Plan(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be a whole number from 1 to .*, got 2.5"):
        Plan(**{name: 2.5})
    with pytest.raises(TypeError, match="equal_lengths must be true or false, got 1"):
        Plan(equal_lengths=1)


def test_lengths_count_what_attention_runs_over() -> None:
    codes = vocabulary_array({"a": 1})
    decoders = {
        "flat": Decoder(None, None, codes, False, False),
        "nested": Decoder(None, None, codes, False, True),
        "timed": Decoder(1, 0, codes, False, False),
        "hot": Decoder(None, None, codes, True, False),
        "hot visits": Decoder(None, None, codes, True, True),
        "steps": Decoder(None, None, None, False, False),
        "number": Decoder(None, None, None, False, False),
    }
    sample = {
        "flat": torch.ones(5), "nested": torch.ones(3, 9), "timed": (None, torch.ones(4)), "hot": torch.ones(400),
        "hot visits": torch.ones(2, 400), "steps": torch.ones(6, 10), "number": torch.tensor(1.5),
    }  # fmt: skip
    assert sample_lengths(sample, decoders) == [5, 3, 4, 1, 2, 6, 1]
