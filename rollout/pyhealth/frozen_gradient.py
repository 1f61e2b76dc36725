"""Gradient × input with what weights signals held, for PyHealth models: signed, class-specific, no chain at all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rollout._capture.adapters.pyhealth import CannotFuseError, fused_attention, valid_positions
from rollout.frozen.gradient import run_frozen
from rollout.pyhealth import readout as readout_of
from rollout.pyhealth.protocol import usable
from rollout.pyhealth.readout import Relevance
from rollout.pyhealth.watch import BaseInterpreter, attention_sites, hooks_off

__all__ = ["FrozenGradient"]

EMBEDDING = "embedding_model"


class FrozenGradient(BaseInterpreter):
    """The signed relevance of every code for the logit of a class: `rollout.frozen_gradient` at the embedding.

    Attention weights, norm statistics and gates are held; what is left of the model is linear in the embedding, and the
    scores and the constants sum to the logit. One forward pass, on fused attention in PyHealth's Transformer and
    StageAttentionNet, and one backward pass; no parameter's `.grad` is touched, and nothing is left on the model.
    `model.eval()` is called once, here.

    Args:
        model: its `embedding_model` embeds every feature.

    Raises:
        TypeError: the model has no `embedding_model`.

    Source: Ali et al. 2022 (ICML), arXiv:2202.07304.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(getattr(model, EMBEDDING, None), nn.Module):
            raise TypeError(
                f"FrozenGradient: model must have an embedding_model, as PyHealth's have, got {type(model).__name__}: "
                f"use rollout.frozen_gradient(model, inputs, at=...)"
            )
        super().__init__(model)

    def attribute(self, target_class_idx: int | None = None, **data: Any) -> Relevance:
        """The relevance of every input position for the logit of a class; positive speaks for it, negative against it.

        Args:
            target_class_idx: the class; None is the one predicted, per sample. A single logit has no choice.
            **data: a batch of the dataloader, labels and ids included.

        Returns:
            Per feature key a tensor of the shape of the feature's value tensor, on the model's device, in the dtype of
            its embedding.

        Raises:
            MissingFeatureError: the batch lacks a feature of the model (a `ValueError` and a `KeyError`).
            ValueError: there is no such class.
            rollout.CaptureError: dropout is on, or the model does with the embedding what is not known to be linear.
        """
        keys = list(self.model.feature_keys)
        readout_of.check_features(keys, data, "FrozenGradient")
        nothing = readout_of.empty_batch(self.model, keys, data)
        if nothing is not None:
            return nothing
        runnable = usable(readout_of.without_empty_features(keys, data))

        def target(output: Any) -> Tensor:
            logits = output["logit"]
            if target_class_idx is not None and not 0 <= target_class_idx < max(logits.shape[1], 2):
                raise ValueError(
                    f"FrozenGradient: target_class_idx must be below {max(logits.shape[1], 2)}, got {target_class_idx}"
                )
            classes = self._resolve_target_indices(logits.detach(), target_class_idx)
            return logits.gather(1, classes[:, None])

        sites = attention_sites(self.model) or {}
        fused = {site: _attend for layers in sites.values() for site in layers}
        with hooks_off(self.model):
            found, _ = run_frozen(self.model, lambda: self.model(**runnable), target, EMBEDDING, fused, frozenset(keys))
        scores = {key: self._by_code(key, found[key], data) for key in keys}
        return readout_of.to_value_shapes(self.model, scores, data)

    def _by_code(self, key: str, scores: Tensor, data: dict[str, Any]) -> Tensor:
        """Some models embed the codes of all visits as one sequence."""
        value = readout_of.feature_value(self.model, key, data)
        return scores if value is None or scores.numel() != value.numel() else scores.view(value.shape)


def _attend(
    module: nn.Module,
    forward: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: nn.Module | None = None,
) -> Any:
    """PyHealth's `Attention` on fused attention, where its mask is made of valid positions; nobody reads the map."""
    if not query.requires_grad:
        return forward(query, key, value, mask=mask, dropout=dropout)
    try:
        with torch._C.DisableTorchFunction():
            valid = valid_positions(mask)
    except CannotFuseError:
        return forward(query, key, value, mask=mask, dropout=dropout)
    return fused_attention(query, key, value, valid), query.new_empty(0)
