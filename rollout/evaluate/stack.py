"""A model's predictions for many versions of each record at once: equal ones run once, the rest in stacks by length."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rollout.evaluate.removal import Removal, rows_of

Batch = Mapping[str, Any]
Predict = Callable[[Batch], Tensor]
"""A batch → probabilities [B, K]."""

STACK_TOKENS = 4096
"""Most entries in a stack, padding included, all features added; a longer record goes alone."""


def predict_kept(
    predict: Predict,
    batch: Batch,
    kept: Mapping[str, Tensor],
    removal: Removal,
    tokens: int = STACK_TOKENS,
    intact: Tensor | None = None,
) -> Tensor:
    """Predictions for V versions of each of B records, of which only some entries are kept.

    Equal versions of a record run once, matched entry by entry. The others are sorted by how long they are and run in
    stacks.

    Args:
        predict: what is asked.
        batch: what the model takes.
        kept: bool [V, B, ...], per feature; the others are handed on as they are.
        removal: what stands in place of the rest.
        tokens: most entries in a stack.
        intact: probabilities [B, K] of the whole records, if they are known: versions that keep all have them.

    Returns:
        Probabilities [V, B, K].
    """
    versions, samples = next(iter(kept.values())).shape[:2]
    flat = {key: each.flatten(0, 1) for key, each in kept.items()}
    owner = torch.arange(samples).repeat(versions)
    first, same = distinct(owner, *flat.values())
    whole = torch.stack([each[first.to(each.device)].flatten(1).all(1).cpu() for each in flat.values()]).all(0)
    widths = sum(_width(each[first], removal.deletes(key, batch[key])) for key, each in flat.items())
    found: Tensor | None = None
    left = torch.arange(len(first))
    if intact is not None:
        found = intact.new_empty(len(first), intact.shape[1])
        found[whole] = intact[owner[first[whole]]]
        left = left[~whole]
    for places in _stacks(torch.as_tensor(widths)[left], tokens):
        chosen = left[places]
        rows = first[chosen]
        stack = {key: rows_of(value, owner[rows]) for key, value in batch.items() if key not in kept}
        for key, each in flat.items():
            stack[key] = removal.cut(key, batch[key], each[rows.to(each.device)], owner[rows].to(each.device))
        probability = predict(stack)
        if found is None:
            found = probability.new_empty(len(first), probability.shape[1])
        found[chosen] = probability
    assert found is not None
    return found[same].view(versions, samples, -1)


def distinct(owner: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of some bools, each sample's apart, matched exactly.

    Args:
        owner: long [R], the sample of each row.
        parts: bool [R, ...] each.

    Returns:
        `first` [D], one row of each kind, and `same` [R], for each row its place in `first`.
    """
    bits = [np.packbits(part.flatten(1).cpu().numpy(), axis=1) for part in parts]
    number = owner.numpy().astype(">i4").view(np.uint8).reshape(len(owner), 4)
    rows = np.ascontiguousarray(np.concatenate([number, *bits], axis=1))
    _, first, same = np.unique(rows.view(np.dtype((np.void, rows.shape[1]))), return_index=True, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(same.reshape(-1))


def _width(kept: Tensor, deletes: bool) -> Tensor:
    """How long each record is, long [R]."""
    flat = kept.flatten(1)
    return flat.sum(1).cpu() if deletes else torch.full((len(flat),), flat.shape[1])


def _stacks(widths: Tensor, tokens: int) -> Iterator[Tensor]:
    """Records to run together, the longest first, at most `tokens` entries by the longest of each stack."""
    order = widths.argsort(descending=True, stable=True)
    lengths = widths[order].clamp(min=1).tolist()
    start = 0
    while start < len(order):
        stop = min(len(order), start + max(1, tokens // lengths[start]))
        yield order[start:stop]
        start = stop


def class_probabilities(output: Mapping[str, Tensor]) -> Tensor:
    """A model's output as probabilities of C ≥ 2 classes, float32 [B, C]; raises as `probabilities`."""
    return both_classes(probabilities(output))


def probabilities(output: Mapping[str, Tensor]) -> Tensor:
    """The probabilities in a model's output, float32, as many as it gives: [B], [B, 1] or [B, C].

    Raises:
        ValueError: there are none in it.
    """
    if "y_prob" in output:
        return output["y_prob"].float()
    if "logit" not in output:
        raise ValueError(f"faithfulness: the model must return 'y_prob' or 'logit', got {sorted(output)}")
    logit = output["logit"].float()
    return logit.sigmoid() if logit.dim() == 1 or logit.shape[1] == 1 else logit.softmax(1)


def both_classes(probability: Tensor) -> Tensor:
    """Probabilities [B] or [B, 1] of the positive class as those of both, [B, 2]; others as they are."""
    if probability.dim() == 1 or probability.shape[1] == 1:
        probability = probability.reshape(-1, 1)
        return torch.cat([1 - probability, probability], 1)
    return probability


def predicted_class(probability: Tensor, threshold: float = 0.5) -> Tensor:
    """The class predicted, long [B]: of two, 1 from `threshold` on; of more, the most probable, the first of equals."""
    return (probability[:, 1] >= threshold).long() if probability.shape[1] == 2 else probability.argmax(1)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inference mode with the model in eval mode; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training
