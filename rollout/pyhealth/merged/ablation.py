"""Predictions of PyHealth's Transformer for many versions of each record, of which only some codes are kept.

What is gone is not computed: a code taken out is in no row, and all blanks of a record are one row with its count. Each
stream runs its distinct versions once, the top layer for row 0 alone, and only the head is run for every version.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rollout.evaluate.removal import Removal, values_of
from rollout.evaluate.stack import Batch, both_classes, distinct
from rollout.pyhealth.merged.capture import CannotMergeError, is_looked_up, merged_blocks
from rollout.pyhealth.merged.encode import first_rows
from rollout.pyhealth.merged.rows import Rows, rows_of_ids
from rollout_kernels import Method

CUT_ENTRIES = 1 << 18
"""Most entries of versions that are laid out at once; it bounds memory only."""


class Ablation:
    """A PyHealth Transformer that predicts from what is kept of a record.

    Args:
        model: in evaluation mode, on a CPU.

    Attributes:
        single: whether it predicts one number, the probability of class 1.

    Raises:
        CannotMergeError: it must be run on all positions; see `merged_blocks`.
    """

    def __init__(self, model: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.blocks = merged_blocks(model, Method(), "auto")
        if model._forward_hooks or model._forward_pre_hooks:
            raise CannotMergeError("someone's hook watches the model")
        self.model = model
        self.single = model.fc.out_features == 1

    def serves(self, batch: Batch, kept: Mapping[str, Tensor]) -> bool:
        """Whether every feature of a batch is ids that are looked up, and nothing else is removed."""
        keys = list(self.blocks)
        served = all(is_looked_up(self.model, key, batch[key]) and values_of(batch[key]).numel() for key in keys)
        return served and set(kept) <= set(keys)

    @torch.inference_mode()
    def predict(
        self, batch: Batch, kept: Mapping[str, Tensor], removal: Removal, rows: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Probabilities [V, B, K ≥ 2] of V versions of B records; as `rollout.evaluate.stack.predict_kept`.

        Args:
            batch, kept, removal: As there.
            rows: Row 0 of each stream of the whole records, as `intact` gives them: versions that keep all have them.

        Raises:
            ValueError: codes are to be taken out of a model whose padding is attended to: its embedding is not 0.
        """
        versions, samples = next(iter(kept.values())).shape[:2]
        rows = self.intact(batch)[1] if rows is None else rows
        found = []
        for key in self.blocks:
            if key not in kept:
                found.append(rows[key].repeat(versions, 1))
                continue
            owner = torch.arange(samples).repeat(versions)
            flat = kept[key].flatten(0, 1)
            first, same = distinct(owner, flat)
            distinct_rows = rows[key][owner[first]]
            cut = ~flat[first].all(1)
            if bool(cut.any()):
                chosen = first[cut]
                distinct_rows[cut] = self._stream(key, values_of(batch[key]), flat[chosen], owner[chosen], removal)
            found.append(distinct_rows[same])
        return self._head(found).view(versions, samples, -1)

    @torch.inference_mode()
    def intact(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Probabilities [B, K ≥ 2] of whole records, and row 0 of each of their streams, [B, E]."""
        rows = {
            key: first_rows(self.blocks[key], self._rows(key, values_of(batch[key])[:, : self.model.max_seq_len]))
            for key in self.blocks
        }
        return self._head(list(rows.values())), rows

    def _head(self, rows: list[Tensor]) -> Tensor:
        return both_classes(self.model.prepare_y_prob(self.model.fc(torch.cat(rows, 1))).float())

    def _stream(self, key: str, values: Tensor, kept: Tensor, owner: Tensor, removal: Removal) -> Tensor:
        """Row 0 of a stream's encoder for R records, [R, E], the longest together."""
        if removal.deletes(key, values) and self._attends_padding(key, removal):
            raise ValueError(
                f"removal='delete' needs a padding embedding of 0, and that of {key!r} is not: the model attends to "
                "padding, so a record cannot be made shorter; use 'pad' or 'resample'"
            )
        order = kept.sum(1).argsort(descending=True, stable=True)
        at_once = max(1, CUT_ENTRIES // kept.shape[1])
        output: Tensor | None = None
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            ids = removal.cut(key, values, kept[chosen], owner[chosen])[:, : self.model.max_seq_len]
            part = first_rows(self.blocks[key], self._rows(key, ids))
            if output is None:
                output = part.new_empty(len(order), part.shape[1])
            output[chosen] = part
        assert output is not None
        return output

    def _rows(self, key: str, ids: Tensor) -> Rows:
        embedding = self.model.embedding_model
        rows = rows_of_ids(
            ids,
            embedding.embedding_layers[key].num_embeddings,
            lambda found: embedding({key: found})[key],
            self.model._mask_from_embeddings,
        )
        if rows is None:
            raise ValueError(f"{key!r} has ids beyond the {embedding.embedding_layers[key].num_embeddings} it knows")
        return rows

    def _attends_padding(self, key: str, removal: Removal) -> bool:
        embedding = self.model.embedding_model.embedding_layers[key]
        return bool(embedding.weight[removal.padding.get(key, 0)].any())


def ablation_of(model: Any) -> Ablation | None:
    """How a model is run on what is kept alone; None where it must be run on all positions."""
    try:
        return Ablation(model)
    except CannotMergeError:
        return None
