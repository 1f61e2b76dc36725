"""A model's probabilities for whole records, and for versions of them of which only some entries are kept."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rollout.evaluate.removal import Removal
from rollout.evaluate.stack import Batch, both_classes, predict_kept


class Ablates(Protocol):
    """A model that can be run on what is kept alone: see `rollout.pyhealth.merged.ablation`."""

    single: bool

    def serves(self, batch: Batch, kept: Mapping[str, Tensor]) -> bool: ...

    def intact(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...

    def predict(
        self, batch: Batch, kept: Mapping[str, Tensor], removal: Removal, rows: Mapping[str, Tensor] | None = None
    ) -> Tensor: ...


class Predictor:
    """Predictions of one model, in evaluation mode.

    Args:
        ask: A batch → probabilities [B, K], or [B] or [B, 1] of the positive class of two.
        ablation: How the model is run on what is kept alone; None: it is asked for stacks of whole batches.

    Attributes:
        single: Whether the model gave one number, the probability of class 1, when it was last asked.
    """

    def __init__(self, ask: Callable[[Batch], Tensor], ablation: Ablates | None = None) -> None:
        self.single = False
        self._asked, self._ablation = ask, ablation
        self._rows: dict[str, Tensor] = {}
        self._intact: Tensor | None = None

    @torch.inference_mode()
    def intact(self, batch: Batch) -> Tensor:
        """Probabilities [B, K ≥ 2] of whole records.

        Raises:
            ValueError: what the model gives are no probabilities.
        """
        self._rows = {}
        if self._ablation is not None and self._ablation.serves(batch, {}):
            self._intact, self._rows = self._ablation.intact(batch)
            self.single = self._ablation.single
        else:
            self._intact = self._ask(batch)
        return self._intact

    @torch.inference_mode()
    def versions(self, batch: Batch, kept: Mapping[str, Tensor], removal: Removal, chosen: Tensor) -> Tensor:
        """Probabilities [V, B, K ≥ 2] of versions of some of the records that `intact` was last asked of.

        Args:
            batch: Of the records chosen.
            kept: bool [V, B, ...] per feature.
            removal: What stands in place of the rest.
            chosen: long [B], their places among those records.
        """
        assert self._intact is not None
        if self._rows and self._ablation is not None and self._ablation.serves(batch, kept):
            rows = {key: rows[chosen] for key, rows in self._rows.items()}
            return self._ablation.predict(batch, kept, removal, rows)
        return predict_kept(self._ask, batch, kept, removal, intact=self._intact[chosen])

    def _ask(self, batch: Batch) -> Tensor:
        given = torch.as_tensor(self._asked(batch)).detach().float()
        self.single = given.dim() == 1 or given.shape[1] == 1
        found = both_classes(given).cpu()
        if not bool(((found >= -1e-6) & (found <= 1 + 1e-6)).logical_or(found.isnan()).all()):
            raise ValueError(
                f"the model must give probabilities, got numbers from {float(found.min()):.3g} to "
                f"{float(found.max()):.3g}"
            )
        return found
