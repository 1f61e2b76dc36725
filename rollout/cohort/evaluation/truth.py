"""What is known of a record beside what its ablations say: planted codes, and what each code does alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.cohort.evaluation.settings import Planted
from rollout.cohort.rows import Decoder
from rollout.evaluate.sets import ranks

Scores = Mapping[str, Tensor]


def planted_ids(planted: Planted, decoders: Mapping[str, Decoder]) -> dict[str, Tensor]:
    """Feature → the ids of its planted codes, long."""
    found = {}
    for feature, codes in planted.items():
        known = decoders[feature].codes
        assert known is not None
        wanted = set(codes)
        found[feature] = torch.tensor([number for number, code in enumerate(known.to_pylist()) if code in wanted])
    return found


def recovered(scores: Scores, valid: Scores, planted: Scores) -> tuple[np.ndarray, np.ndarray]:
    """How well the planted entries of each record lead its others, feature by feature.

    Args:
        scores, valid: Per feature, [B, ...].
        planted: Which entries are planted, bool, of the features that have any.

    Returns:
        Per record [B], NaN where nothing is known: `recall`, of its k planted entries the share among the k highest of
        their feature (ties by position); `area`, the chance that a planted entry is above another of its feature, ties
        half, over the pairs of all its features.
    """
    hits = total = below = pairs = torch.zeros(())
    for feature, marked in planted.items():
        if feature not in scores:
            continue
        real = valid[feature].flatten(1)
        mine = marked.flatten(1) & real
        rank = ranks(scores[feature], valid[feature]).flatten(1)
        k = mine.sum(1)
        hits = hits + (mine & (rank < k[:, None])).sum(1)
        total = total + k
        won, of = _pairs_won(scores[feature].flatten(1).double(), mine, real & ~mine)
        below, pairs = below + won, pairs + of
    return _ratio(hits, total), _ratio(below, pairs)


def _pairs_won(scores: Tensor, higher: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Per record: pairs in which one of `higher` is above one of `lower`, ties half, and all pairs; in S log S."""
    won = torch.zeros(len(scores), dtype=torch.float64)
    for row in (higher.any(1) & lower.any(1)).nonzero()[:, 0].tolist():
        others = scores[row][lower[row]].sort().values
        mine = scores[row][higher[row]]
        left, right = torch.searchsorted(others, mine), torch.searchsorted(others, mine, right=True)
        won[row] = (left + right).double().sum() / 2
    return won, (higher.sum(1) * lower.sum(1)).double()


def _ratio(above: Tensor, below: Tensor) -> np.ndarray:
    found = torch.where(below > 0, above.double() / below.double(), torch.nan)
    return np.asarray(found.numpy(), dtype=np.float64)


def versions_without_one(valid: Scores, most: int) -> tuple[dict[str, Tensor], Tensor]:
    """Versions of each record that lack one code each, of records with from 2 to `most` real codes in all.

    A feature keeps its last code, so a code that is alone in its feature is not taken out.

    Returns:
        Per feature what is kept, bool [V, B, ...], V the most codes that a record has; and how many versions each
        record has, long [B]: the others keep all.
    """
    size = len(next(iter(valid.values())))
    counts = {feature: real.flatten(1).sum(1) for feature, real in valid.items()}
    short = sum(counts.values()) <= most
    taken = {feature: torch.where(short & (count > 1), count, 0) for feature, count in counts.items()}
    total = torch.stack(list(taken.values())).sum(0)
    versions = int(total.max()) if size else 0
    before = torch.zeros(size, dtype=torch.long)
    kept = {}
    for feature, real in valid.items():
        flat = real.flatten(1)
        turn = (flat.cumsum(1) - 1 + before[:, None]).where(flat & (taken[feature] > 0)[:, None], -1)
        out = turn[None] == torch.arange(versions)[:, None, None]
        whole = ~out.any(2, keepdim=True)
        kept[feature] = ((flat[None] & ~out) | whole).view(versions, *real.shape)
        before = before + taken[feature]
    return kept, total


def agreement(scores: Scores, valid: Scores, effects: Tensor, total: Tensor) -> np.ndarray:
    """Spearman's correlation of scores with what the probability loses without each code, feature by feature.

    Args:
        scores, valid: Per feature, [B, ...].
        effects: [V, B], in the order of `versions_without_one`.
        total: Its second result.

    Returns:
        Per record [B] the mean over its features of three codes and more, each weighted by its codes; NaN without any,
        and where scores or effects are all equal.
    """
    from scipy.stats import rankdata

    found = np.full(len(total), np.nan)
    for row in total.nonzero()[:, 0].tolist():
        place, parts, weights = 0, [], []
        for feature, real in valid.items():
            mine = real[row].flatten()
            count = int(mine.sum())
            if count < 2:
                continue
            effect = effects[place : place + count, row].numpy()
            place += count
            if feature not in scores or count < 3:
                continue
            ranked = [rankdata(each) for each in (scores[feature][row].flatten()[mine].numpy(), effect)]
            if min(each.std() for each in ranked) > 0:
                parts.append(float(np.corrcoef(*ranked)[0, 1]))
                weights.append(count)
        if parts:
            found[row] = np.average(parts, weights=weights)
    return found


def pool_of(dataset: Any, features: Mapping[str, Decoder], most: int = 256) -> dict[str, np.ndarray]:
    """Feature → the ids of codes of up to `most` records spread over a dataset, each as often as it stands there."""
    numbers = np.unique(np.linspace(0, len(dataset) - 1, num=min(most, len(dataset)), dtype=np.int64))
    held: dict[str, list[np.ndarray]] = {feature: [] for feature in features}
    for number in numbers.tolist():
        try:
            sample = dataset[number]
            for feature, decoder in features.items():
                value = sample[feature]
                ids = np.asarray(value if decoder.value is None else value[decoder.value]).reshape(-1)
                held[feature].append(ids if decoder.padding is None else ids[ids != decoder.padding])
        except Exception:
            continue
    return {feature: np.concatenate(parts) if parts else np.zeros(0, np.int64) for feature, parts in held.items()}
