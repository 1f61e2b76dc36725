"""What a PyHealth model reads of the rollout matrix, and the shapes it is handed back in. Needs torch only."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Relevance = dict[str, Tensor]
Readout = Callable[..., Relevance]
Batch = Mapping[str, Any]


def rows_read(
    readout: Readout, shapes: Mapping[str, tuple[int, int]], device: torch.device, data: Batch
) -> Relevance | None:
    """The row of R [B, S, S] that `get_relevance_tensor` picks of each sample, or None when it does anything else.

    It is asked twice: with R[b, i, j] = i, which answers i, and with random numbers, which must come back as exactly
    row i. Both are views of O(B + S) numbers.

    Args:
        readout: the model's `get_relevance_tensor`.
        shapes: (B, S) per feature key.
        device: where R would be.
        data: the batch, as the model was given it.

    Returns:
        Per feature key long [B].
    """
    found = readout({key: _row_numbers(*shape, device) for key, shape in shapes.items()}, **data)
    if not _has_rows(found, shapes):
        return None
    rows = {key: found[key][:, 0].long().clamp(0, seq - 1) for key, (_, seq) in shapes.items()}
    noise = {key: _noise(*shape, device) for key, shape in shapes.items()}
    picked = readout(noise, **data)
    if not _has_rows(picked, shapes):
        return None
    agree = [_agree(found[key], picked[key], rows[key], noise[key]) for key in shapes]
    return rows if not agree or bool(torch.stack(agree).all()) else None


def _row_numbers(batch: int, seq: int, device: torch.device) -> Tensor:
    """R[b, i, j] = i."""
    return torch.arange(seq, dtype=torch.float32, device=device).view(1, seq, 1).expand(batch, seq, seq)


def _noise(batch: int, seq: int, device: torch.device) -> Tensor:
    """R[b, i, j] = r[7b + 3i + j] for random r: no two rows of a sample, nor its rows and columns, are alike."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(7 * batch + 4 * seq, generator=generator).to(device)
    return numbers.as_strided((batch, seq, seq), (7, 3, 1))


def _has_rows(result: Any, shapes: Mapping[str, tuple[int, int]]) -> bool:
    return (
        isinstance(result, dict)
        and result.keys() == shapes.keys()
        and all(isinstance(result[key], Tensor) and tuple(result[key].shape) == shapes[key] for key in shapes)
    )


def _agree(found: Tensor, picked: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
    expected = noise[torch.arange(len(rows), device=rows.device), rows]
    return (found == rows[:, None]).all() & (picked == expected).all()


class MissingFeatureError(KeyError, ValueError):
    """The batch lacks a feature of the model. A `KeyError` because PyHealth raises that."""

    def __str__(self) -> str:
        return str(self.args[0])


def check_features(keys: list[str], data: Batch, caller: str) -> None:
    """Raise MissingFeatureError unless every feature key is in the batch."""
    missing = [key for key in keys if key not in data]
    if missing:
        raise MissingFeatureError(
            f"{caller}: the batch must hold every feature of the model, {keys}; missing {missing}, got {sorted(data)}"
        )


def feature_value(model: Any, key: str, data: Batch) -> Tensor | None:
    """The value tensor of a feature: the feature itself, or the `value` member of a tuple; None when there is none."""
    feature = data.get(key)
    if feature is None or isinstance(feature, Tensor):
        return feature
    processor = _processor(model, key)
    schema = () if processor is None else processor.schema()
    return feature[schema.index("value")] if "value" in schema else None


def _processor(model: Any, key: str) -> Any:
    return getattr(getattr(model, "dataset", None), "input_processors", {}).get(key)


def without_empty_features(keys: list[str], data: Batch) -> dict[str, Any]:
    """The batch with one padded position in each feature that has none, so that the model can run.

    PyHealth's models fail when a feature is empty in every sample, [B, 0]; with [B, 1] of padding they do what they do
    for an empty sample beside a longer one.
    """
    return {name: _padded(value) if name in keys else value for name, value in data.items()}


def _padded(feature: Any) -> Any:
    if isinstance(feature, Tensor) and feature.dim() > 1 and feature.shape[1] == 0:
        return feature.new_zeros((feature.shape[0], 1, *feature.shape[2:]))
    if isinstance(feature, tuple):
        return tuple(_padded(member) for member in feature)
    return feature


def to_value_shapes(model: Any, relevance: Relevance, data: Batch) -> Relevance:
    """Each relevance [B, S] in the shape of its feature's value tensor.

    A visit's score is copied to every code cell, padding included. Positions beyond the model's `max_seq_len` were not
    read and get 0. A value that is one position to the model, [B, F], gets that position's score in every cell.
    """
    shaped = {}
    for key, scores in relevance.items():
        value = feature_value(model, key, data)
        shaped[key] = scores if value is None else _to_shape(model, key, scores, value)
    return shaped


def _to_shape(model: Any, key: str, scores: Tensor, value: Tensor) -> Tensor:
    if scores.dim() > 1 and value.dim() > 1 and scores.shape[1] != value.shape[1]:
        scores = _fit_positions(model, key, scores, value)
    if value.dim() > scores.dim():
        scores = scores[(...,) + (None,) * (value.dim() - scores.dim())].expand_as(value)
    return scores


def _fit_positions(model: Any, key: str, scores: Tensor, value: Tensor) -> Tensor:
    read, wanted = scores.shape[1], value.shape[1]
    if wanted == 0:
        return scores[:, :0]
    if value.dim() == 2 and read == 1 and not _is_sequence(model, key):
        return scores.expand(-1, wanted)
    if read == getattr(model, "max_seq_len", None) and read < wanted:
        unread = scores.new_zeros((scores.shape[0], wanted - read, *scores.shape[2:]))
        return torch.cat([scores, unread], 1)
    return scores


def _is_sequence(model: Any, key: str) -> bool:
    """Whether the first axis of the feature's value is a sequence of positions, as its processor says."""
    spatial = getattr(_processor(model, key), "spatial", None)
    try:
        return spatial is None or bool(spatial()[0])
    except (NotImplementedError, IndexError):  # PyHealth's base processor raises the first: it does not say
        return True


def empty_batch(model: Any, keys: list[str], data: Batch) -> Relevance | None:
    """For a batch of no samples, which PyHealth's models cannot run, relevance shaped like the values; else None."""
    values = {key: feature_value(model, key, data) for key in keys}
    if not values or any(value is None or value.dim() == 0 or len(value) for value in values.values()):
        return None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return {key: like.new_zeros(value.shape) for key, value in values.items() if value is not None}
