"""What a method is to an evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rollout.cohort.prefetch import ReadBatch

Scores = Mapping[str, Tensor]


class Explainer(ABC):
    """One method.

    Attributes:
        signed: Whether its scores speak for class 1 where positive and for class 0 where negative, for a model of one
            logit.
    """

    signed: bool = False

    @abstractmethod
    def __call__(self, model: Any, batch: ReadBatch, valid: Mapping[str, Tensor]) -> Scores:
        """Feature → scores, shaped like the feature's values."""

    def classes(self, batch: ReadBatch) -> Tensor | None:
        """The classes that the scores of a batch are for, long [B], −1 where not known; None: the class predicted."""
        return None
