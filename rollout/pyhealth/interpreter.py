"""What the interpreters of PyHealth models share: the row a model reads, and the shapes given back."""

from abc import abstractmethod
from typing import Any

import torch

from rollout.method import sums_to_one
from rollout.pyhealth import readout as readout_of
from rollout.pyhealth.merged import Blocks, CannotMergeError, MergedCapture, merged_blocks
from rollout.pyhealth.readout import Relevance
from rollout.pyhealth.watch import (
    READOUT_METHODS,
    BaseInterpreter,
    LayersMissingError,
    ModelCapture,
    Sites,
    StageAttentionNet,
    attention_sites,
    is_own,
)
from rollout_kernels import Method

__all__ = ["RowInterpreter"]


class RowInterpreter(BaseInterpreter):
    """An interpreter whose relevance is a row of a chain of attention layers.

    Attributes:
        method: how the matrices of the chain are formed.
        backend: as in `rollout.attention_rollout`.
        readout: `"model"`: the row `get_relevance_tensor` picks. `"forward"`: the row the forward pass predicted from.
    """

    readout = "model"
    method: Method
    backend: str

    def attribute(self, target_class_idx: int | None = None, **data: Any) -> Relevance:
        sites = attention_sites(self.model)
        if sites is None:
            relevance = self._by_protocol(data, target_class_idx)
            return readout_of.to_value_shapes(self.model, relevance, data)
        keys = list(sites)
        readout_of.check_features(keys, data, type(self).__name__)
        nothing = readout_of.empty_batch(self.model, keys, data)
        if nothing is not None:
            return nothing
        runnable = readout_of.without_empty_features(keys, data)
        try:
            relevance = self._by_capture(sites, runnable, target_class_idx)
        except LayersMissingError:  # a model may attend otherwise while its own hooks are off: ask by those
            relevance = self._by_protocol(runnable, target_class_idx)
        return readout_of.to_value_shapes(self.model, relevance, data)

    @property
    def rows_sum_to_one(self) -> bool:
        """Whether the relevance of each feature, before it is copied to the codes of a visit, must sum to 1.

        So it is where it is a row of a chain whose rows do, of softmax maps: for PyHealth's own models, their attention
        and readout as they came. What another model's readout makes of its matrix is not known.
        """
        own = is_own(self.model, *READOUT_METHODS) and attention_sites(self.model) is not None
        return own and sums_to_one(self.method)

    @abstractmethod
    def _by_protocol(self, data: dict[str, Any], target_class_idx: int | None) -> Relevance:
        """Any model with the three methods: its own hooks, and the full R to its readout."""

    @abstractmethod
    def _by_capture(self, sites: Sites, data: dict[str, Any], target_class_idx: int | None) -> Relevance:
        """PyHealth's own models, watched, and one row per sample where one row is read."""

    def _rows(self, captured: ModelCapture, data: dict[str, Any]) -> Relevance | None:
        """The row read per feature, long [B]; None when the readout must be handed the full R."""
        shapes = captured.shapes()
        if self.readout == "forward":
            return captured.rows
        if not is_own(self.model, *READOUT_METHODS):
            return None
        device = next(iter(captured.rows.values())).device
        try:
            with torch.no_grad():
                return readout_of.rows_read(self.model.get_relevance_tensor, shapes, device, data)
        except Exception:
            # PyHealth's readout of a StageAttentionNet fails on flat features whatever R is; the model did read a row.
            return captured.rows if isinstance(self.model, StageAttentionNet) else None

    def _merged_blocks(self) -> Blocks:
        """The blocks of a model whose rows may be merged.

        Raises:
            CannotMergeError: they may not.
        """
        if self.readout != "forward" and not is_own(self.model, *READOUT_METHODS):
            raise CannotMergeError("the model has a readout of its own")
        with torch.inference_mode(False), torch.no_grad():  # what is made of the weights may enter autograd
            return merged_blocks(self.model, self.method, self.backend)

    def _by_merged(self, captured: MergedCapture, data: dict[str, Any]) -> Relevance | None:
        """Row 0 of each stream; None when that is not all that is read."""
        captured.run(data)
        rows = self._rows(captured, data)
        if rows is None or any(bool(row.any()) for row in rows.values()):
            return None
        return {key: captured.rollout(key) for key in captured.sites}

    def _read_matrices(self, matrices: Relevance, data: dict[str, Any]) -> Relevance:
        with torch.no_grad():
            relevance: Relevance = self.model.get_relevance_tensor(matrices, **data)
        return relevance
