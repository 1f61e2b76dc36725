"""Planted codes and codes taken out alone, against counting by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from rollout.cohort.evaluation.truth import agreement, recovered, versions_without_one
from rollout.demo.training import auroc


def drawn(seed: int, levels: int = 6) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Scores, real entries and planted entries of 5 records in two features."""
    generator = torch.Generator().manual_seed(seed)
    scores, valid, planted = {}, {}, {}
    for key, width in (("a", 7), ("b", 4)):
        scores[key] = torch.randint(0, levels, (5, width), generator=generator) / 3.0
        lengths = torch.randint(0, width + 1, (5, 1), generator=generator)
        valid[key] = torch.arange(width) < lengths
        planted[key] = torch.rand(5, width, generator=generator) < 0.3
    return scores, valid, planted


@given(st.integers(0, 10**6))
def test_recovered_by_hand(seed: int) -> None:
    scores, valid, planted = drawn(seed)
    recall, area = recovered(scores, valid, planted)
    for row in range(5):
        hits = total = won = pairs = 0.0
        for key in scores:
            real = valid[key][row]
            mine, marks = scores[key][row][real].numpy(), planted[key][row][real].numpy()
            k = int(marks.sum())
            best = sorted(range(len(mine)), key=lambda place: -mine[place])[:k]
            hits, total = hits + marks[best].sum(), total + k
            if 0 < k < len(mine):
                won += auroc(marks.astype(float), mine) * k * (len(mine) - k)
            pairs += k * (len(mine) - k)
        assert recall[row] == pytest.approx(hits / total if total else np.nan, nan_ok=True)
        assert area[row] == pytest.approx(won / pairs if pairs else np.nan, nan_ok=True)


@given(st.integers(0, 10**6), st.integers(2, 11))
def test_each_code_is_taken_out_once(seed: int, most: int) -> None:
    _, valid, _ = drawn(seed)
    kept, total = versions_without_one(valid, most)
    for row in range(5):
        counts = {key: int(real[row].sum()) for key, real in valid.items()}
        short = sum(counts.values()) <= most
        wanted = sum(count for count in counts.values() if count > 1) if short else 0
        assert int(total[row]) == wanted
        gone = []
        for version in range(len(kept["a"])):
            absent = {
                key: (real[row] & ~kept[key][version, row]).nonzero()[:, 0].tolist() for key, real in valid.items()
            }
            lacking = [(key, place) for key, places in absent.items() for place in places]
            if version < wanted:
                assert len(lacking) == 1
                gone += lacking
            else:
                assert not lacking
                assert all(bool(kept[key][version, row].all()) for key in kept)
        assert len(set(gone)) == wanted


@given(st.integers(0, 10**6))
def test_agreement_is_spearmans(seed: int) -> None:
    scores, valid, _ = drawn(seed)
    _, total = versions_without_one(valid, 11)
    effects = torch.randint(0, 5, (int(total.max()), 5), generator=torch.Generator().manual_seed(seed)) / 7.0
    found = agreement(scores, valid, effects, total)
    for row in range(5):
        place, parts, weights = 0, [], []
        for key in scores:
            mine = scores[key][row][valid[key][row]].numpy()
            if len(mine) < 2:
                continue
            effect = effects[place : place + len(mine), row].numpy()
            place += len(mine)
            if len(mine) > 2 and mine.std() > 0 and effect.std() > 0:
                parts.append(float(spearmanr(mine, effect).statistic))
                weights.append(len(mine))
        wanted = np.average(parts, weights=weights) if parts else np.nan
        assert found[row] == pytest.approx(wanted, nan_ok=True)
