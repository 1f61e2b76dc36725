"""Attention rollout of PyHealth models, as its own interpreter gives it.

One forward pass without gradients and, in float32 and float64, without an attention map: the model runs torch's fused
attention, and the chain its queries and keys.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from rollout.api import attention_rollout
from rollout.method import METHODS, get_method
from rollout.pyhealth.captured import CapturedRollout, Query
from rollout.pyhealth.fused import CannotFuseError, FusedCapture, can_fuse
from rollout.pyhealth.interpreter import RowInterpreter
from rollout.pyhealth.merged import CannotMergeError, MergedCapture
from rollout.pyhealth.protocol import protocol_maps
from rollout.pyhealth.readout import Relevance
from rollout.pyhealth.residual import CannotMeasureError, residuals_of
from rollout.pyhealth.watch import READOUT_METHODS, MapCapture, Sites, attention_sites
from rollout.pyhealth.zoo import reading_of, why_unread
from rollout_kernels import Method
from rollout_kernels._dispatch import BACKENDS
from rollout_kernels.method import HEAD_FUSIONS, HeadFusion

__all__ = ["AttentionRollout"]

READOUTS = ("model", "forward")
MAPS_ONLY = "half precision, autocast, dropout, or someone else's eyes on the attention"
NOT_OWN = "its attention or what hooks it is not PyHealth's own"


class AttentionRollout(RowInterpreter):
    """Attention rollout of a PyHealth model, a drop-in for `pyhealth.interpret.methods.AttentionRollout`.

    R = M_L · … · M_1 with M_l = ½(I + mean_h A_l), and of R the row the model reads, per feature.

    For PyHealth's Transformer and StageAttentionNet only that row is computed. Which one it is, is asked of
    `get_relevance_tensor`; when that does anything but pick one row per sample, it is handed the full R. A model that
    overrides a readout method, or any other model that has the three, is run by PyHealth's protocol and handed the full
    R [B, S, S].

    In float32 and float64 a Transformer on a CPU, which knows no positions, runs on the distinct rows of each record,
    and of its top layer only what row 0 needs (`rollout.pyhealth.merged`). Otherwise, as when others have hooks inside
    its layers, the two models run whole on fused attention and no map is kept. A hook on an `Attention` brings its maps
    back, as do half precision, autocast, dropout, a mask that is not made of valid positions, and an open
    `rollout.capture`. A method that measures values runs on all positions, and is refused where maps are all there is.

    A model of PyHealth's without the three, of which it is known what its attention is over (`rollout.pyhealth.zoo`),
    is recorded by `rollout.capture`, no map made: of a TransformersModel the relevance of its tokens [B, S], of a
    TorchvisionModel that is a ViT that of the image [B, 1, H, W], as PyHealth gives it: of the patches, bilinear to the
    image's size, or with `attribute(interpolate=False)` the patches' own [B, 1, h, w]; that of the class token is left
    out; of a ConCare that of each column of a feature, at all its steps, for the columns as its pooling weighs them.
    Where each position predicts, `query` names one: of a TransformerDeID the relevance is [B, S], of GPT2 and HALO
    that of `visits` as they are given, of PromptEHR that of the decoder's inputs and of the encoder's by stream, of
    MedLink that of `s_q` and of `s_p`. Such a model is refused in training mode.

    Nothing is left on the model: no hook, no map, no flag, no `.grad`, also after an exception. `model.eval()` is
    called once, here; a model put back in training mode is attributed with its dropout, as by PyHealth.

    Args:
        model: has `set_attention_hooks`, `get_attention_layers` and `get_relevance_tensor`, or is one of the others
            above.
        head_fusion: `"mean"`: PyHealth's numbers. `"max"`, `"min"`, or a tensor of head weights [H] or [L, H]: fused
            so, and renormalised.
        method: a name in `rollout.METHODS` or a `rollout.Method`, instead of `head_fusion`; gradient-free ones only.
            Those that measure values (`"value_norm"`, `"kobayashi"`) need PyHealth's own Transformer or
            StageAttentionNet on fused attention: the residual is what a layer adds the attention's output to, before
            its norm in the one, before the norm of the sum in the other.
        backend: as in `rollout.attention_rollout`.
        readout: `"model"`: the row `get_relevance_tensor` picks. `"forward"`: the row the forward pass predicted from.
            They differ for a StageAttentionNet with `stagenet_tensor` features, whose readout takes its mask from the
            raw values while the model takes it from their embedding. PyHealth's own two models only.
        query: of a model whose every position predicts, the position wanted: an int, −1 being each sample's last, long
            [B], or weights over the positions float [B, S]; of MedLink also one of each, `{"s_q": …, "s_p": …}`.

    Raises:
        ValueError: unknown `head_fusion`, `method`, `backend` or `readout`; `head_fusion` and `method` both given; a
            method that needs gradients; one that measures values, of a model where they are not seen; `query` is
            missing, or given where the model says which row it reads.
        TypeError: the model lacks a readout method, and is none of the others above; `head_fusion` or `method` is of
            the wrong type.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3.
    """

    def __init__(
        self,
        model: Any,
        head_fusion: HeadFusion = "mean",
        *,
        method: str | Method | None = None,
        backend: str = "auto",
        readout: str = "model",
        query: Query | None = None,
    ) -> None:
        self.method = _resolve_method(head_fusion, method)
        if backend not in BACKENDS:
            raise ValueError(f"AttentionRollout: backend must be one of {BACKENDS}, got {backend!r}")
        if readout not in READOUTS:
            raise ValueError(f"AttentionRollout: readout must be one of {READOUTS}, got {readout!r}")
        missing = [name for name in READOUT_METHODS if not hasattr(model, name)]
        reading = reading_of(model) if missing else None
        if missing and reading is None:
            raise TypeError(_missing(model, missing))
        if query is not None and reading is None:
            raise ValueError(
                f"AttentionRollout: query is for models whose every position predicts; which row a "
                f"{type(model).__name__} reads, its get_relevance_tensor says, got {query!r}"
            )
        super().__init__(model)
        self.head_fusion = head_fusion
        self.backend = backend
        self.readout = readout
        self.captured = None
        if reading is None:
            self._check_values(attention_sites(model))
        elif readout != "model":
            raise ValueError(_no_forward(model))
        else:
            self.captured = CapturedRollout(model, reading, query, self.method, backend)

    def attribute(self, target_class_idx: int | None = None, **data: Any) -> Relevance:
        """The relevance of every input position for the row the model reads.

        Args:
            target_class_idx: accepted and ignored: rollout is class-agnostic.
            **data: a batch of the dataloader, labels and ids included.

        Returns:
            Per feature key a tensor of the shape of the feature's value tensor, on the model's device, in the dtype of
            its attention maps. Over the positions the model read it is non-negative and sums to 1, before a visit's
            score is copied to its codes; all 0 where the method leaves the own path out and there is no other.

        Raises:
            MissingFeatureError: the batch lacks a feature of the model (a `ValueError` and a `KeyError`).
            RuntimeError: the model gave no attention map for a feature.
            ValueError: the method measures values, and they are not seen any more, or a mask is not made of valid
                positions.
        """
        if self.captured is not None:
            return self.captured.attribute(data)
        return super().attribute(target_class_idx, **data)

    def _by_protocol(self, data: dict[str, Any], target_class_idx: int | None) -> Relevance:
        self._check_values(None)
        if self.readout == "forward":
            raise ValueError(_no_forward(self.model))
        maps = protocol_maps(self.model, data)
        matrices = {key: self._rollout(maps.pop(key), None) for key in list(maps)}
        return self._read_matrices(matrices, data)

    def _by_capture(self, sites: Sites, data: dict[str, Any], target_class_idx: int | None) -> Relevance:
        """Queries and keys where fused attention can stand in, else the maps."""
        self._check_values(sites)
        if can_fuse(self.model, sites):
            with suppress(CannotFuseError):
                return self._by_fused(sites, data)
        if self.method.values is not None:
            raise _unmeasured(self.model, "a mask is not made of valid positions")
        captured = MapCapture(self.model, sites)
        captured.run(data)
        rows = self._rows(captured, data)
        relevance = {key: self._rollout(captured.take(key), None if rows is None else rows[key]) for key in sites}
        return self._read_matrices(relevance, data) if rows is None else relevance

    def _by_fused(self, sites: Sites, data: dict[str, Any]) -> Relevance:
        """Row 0 of each stream when that is all that is read, else any rows, else the full matrix."""
        with suppress(CannotMergeError):
            merged = MergedCapture(self.model, sites, self.method, self._merged_blocks())
            relevance = self._by_merged(merged, data)
            if relevance is not None:
                return relevance
        captured = FusedCapture(self.model, sites, self.method, self.backend)
        captured.run(data)
        rows = self._rows(captured, data)
        relevance = {key: captured.rollout(key, None if rows is None else rows[key]) for key in sites}
        return self._read_matrices(relevance, data) if rows is None else relevance

    def _check_values(self, sites: Sites | None) -> None:
        """Refuse a method that measures values where they and the residuals are not seen."""
        if self.method.values is None:
            return
        if sites is None:
            raise _unmeasured(self.model, NOT_OWN)
        if not can_fuse(self.model, sites):
            raise _unmeasured(self.model, MAPS_ONLY)
        try:
            residuals_of(self.model, sites)
        except CannotMeasureError as error:
            raise _unmeasured(self.model, str(error)) from None

    def describe_path(self) -> str:
        """How batches are run on this model as it is, and where it is not the fastest way, why."""
        if self.captured is not None:
            return "with its own attention, queries and keys recorded by rollout.capture"
        sites = attention_sites(self.model)
        if sites is None:
            return f"by PyHealth's protocol, the full matrix: {NOT_OWN}"
        if not can_fuse(self.model, sites):
            return f"from stored maps: {MAPS_ONLY}"
        try:
            self._merged_blocks()
        except CannotMergeError as error:
            return f"on all positions with fused attention: {error}"
        return "on the distinct rows of each record, every score visited once, and of the top layer one row"

    def _rollout(self, maps: list[Tensor], rows: Tensor | None) -> Tensor:
        """Rows [B, S] of the rollout, or all of it [B, S, S], in the maps' dtype; a NaN stays in its sample."""
        result = attention_rollout(maps, query=rows, method=self.method, backend=self.backend, validate=False)
        return result.to(_stock_dtype(maps[0]))


def _missing(model: Any, missing: list[str]) -> str:
    why = why_unread(model)
    advice = (
        "They say which row the model reads; where you know it, record the attention and take that row: with "
        "rollout.capture(model) as tape: model(**batch); tape.rollout(0)"
    )
    return (
        f"AttentionRollout: model must have the attention readout methods {', '.join(READOUT_METHODS)}; got "
        f"{type(model).__name__}. Missing: {', '.join(missing)}. {advice if why is None else 'Of it, ' + why}"
    )


def _no_forward(model: Any) -> str:
    return (
        "AttentionRollout: readout='forward' needs PyHealth's own Transformer or StageAttentionNet, "
        f"got {type(model).__name__} with attention or readout methods of its own; use readout='model'"
    )


def _unmeasured(model: Any, why: str) -> ValueError:
    return ValueError(
        f"AttentionRollout: method must not measure values for this {type(model).__name__}: that is for PyHealth's own "
        f"Transformer and StageAttentionNet on fused attention, and here {why}; use method='rollout'"
    )


def _stock_dtype(attention: Tensor) -> torch.dtype:
    """The dtype of PyHealth's product of maps: the map's own, or autocast's where it is on."""
    kind = attention.device.type
    if attention.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return attention.dtype


def _resolve_method(head_fusion: HeadFusion, method: str | Method | None) -> Method:
    """The method that `head_fusion` or `method` stands for: PyHealth's own by default."""
    if not (isinstance(head_fusion, Tensor) or callable(head_fusion) or head_fusion in HEAD_FUSIONS):
        raise ValueError(
            f"AttentionRollout: head_fusion must be one of {HEAD_FUSIONS} or a tensor of head weights [H] or [L, H], "
            f"got {head_fusion!r}"
        )
    by_mean = isinstance(head_fusion, str) and head_fusion == "mean"
    if method is None:
        return METHODS["pyhealth"] if by_mean else Method(head_fusion=head_fusion, residual=0.5, renormalize=True)
    if not by_mean:
        raise ValueError(
            "AttentionRollout: give head_fusion or method, not both; rollout.Method(head_fusion=...) says both"
        )
    chosen = get_method(method, "AttentionRollout")
    if chosen.gradients is not None:
        raise ValueError(
            f"AttentionRollout: method must be gradient-free, got {method!r}, which weights maps by their gradients; "
            f"use rollout.attention_rollout(maps, gradients=...)"
        )
    return chosen
