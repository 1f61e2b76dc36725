"""How the model of a cohort is asked for predictions."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rollout.evaluate.predictor import Predictor
from rollout.evaluate.stack import Batch, probabilities

PredictModel = Callable[[Any, Batch], Tensor]
"""(model, batch) → probabilities [B, K], or [B] or [B, 1] of the positive class of two."""


def predictor_of(model: Any, predict: PredictModel | None = None) -> Predictor:
    """The predictions of a model in evaluation mode.

    Args:
        model: The model.
        predict: How it is asked; None: `model(**batch)` gives `y_prob` or `logit`.
    """
    if predict is not None:
        return Predictor(lambda batch: predict(model, batch))
    ablation = None
    if "pyhealth.models" in sys.modules:  # a Transformer of PyHealth's came with it
        from rollout.pyhealth.merged.ablation import ablation_of

        ablation = ablation_of(model)
    return Predictor(lambda batch: probabilities(model(**batch)), ablation)
