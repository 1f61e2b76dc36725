"""A batch explained for PyHealth's models without readout methods, whose attention `rollout.capture` records."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout.cohort.explain import Batch, Explained, PyHealthExplain, model_outputs
from rollout.cohort.shares import TOLERANCES
from rollout.method import sums_to_one
from rollout_kernels import Method

__all__ = ["CapturedExplain", "entries_of", "explain_of", "reading_of"]


@dataclass
class CapturedExplain:
    """Explain batches of a model of `rollout.pyhealth.zoo`: one forward pass.

    Attributes:
        method: Forms its chain from attention alone.
        readout, backend, query: As in `rollout.pyhealth.AttentionRollout`.
    """

    method: Method
    readout: str
    backend: str
    query: int | None

    def check(self, model: Any) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            ValueError: As `AttentionRollout`, or a cohort of the model cannot be attributed.
        """
        why = self.captured(model).reading.no_cohort
        if why is not None:
            raise ValueError(
                f"attribute_cohort: a cohort of a {type(model).__name__} cannot be attributed: {why}; attribute its "
                f"batches by rollout.pyhealth.AttentionRollout"
            )

    def captured(self, model: Any) -> Any:
        from rollout.pyhealth import AttentionRollout

        return AttentionRollout(
            model, method=self.method, readout=self.readout, backend=self.backend, query=self.query
        ).captured

    def __call__(self, model: Any, batch: Batch) -> Explained:
        captured = self.captured(model)
        with model_outputs(model) as outputs:
            rows, call, at = captured.rows(batch)
        self._check_sums(rows)
        relevance = captured.reading.entry_rows(rows, call)
        output = outputs[-1] if outputs else {}
        prob: Any = output.get("y_prob")
        true = output.get("y_true")
        if captured.reading.predicts:  # by every position: those named, whose label may be none
            known = prob is not None and captured.reading.predicted
            prob, true = prob[torch.arange(len(at)), at] if known else None, None
        return Explained(relevance, prob, true, zero_rows=not self.method.own_path)

    def _check_sums(self, rows: dict[str, Tensor]) -> None:
        """The relevance of all positions, also those that are no entries and get no row."""
        for row in rows.values() if sums_to_one(self.method) else ():
            off = (row.sum(1) - 1).abs() > TOLERANCES.get(row.dtype, 1e-4)
            if not self.method.own_path:
                off &= row.any(1)
            if bool(off.any()):
                raise ValueError(
                    f"the relevance of all positions sums to {float(row.sum(1)[off][0]):.6g}, must be 1 by the method"
                )


def reading_of(model: Any) -> Any:
    """What is known of a model of PyHealth's without readout methods (`rollout.pyhealth.zoo`); None: nothing."""
    if not any(kind.__module__.startswith("pyhealth.models") for kind in type(model).__mro__):
        return None
    from rollout.pyhealth import zoo
    from rollout.pyhealth.watch import READOUT_METHODS

    return None if all(hasattr(model, name) for name in READOUT_METHODS) else zoo.reading_of(model)


def entries_of(model: Any, reading: Any) -> dict[str, Any]:
    """Feature → what makes its entries, for a model that makes them itself; for a thread of its own."""
    if reading is None or reading.entries is None:
        return {}
    return {model.feature_keys[0]: reading.entries(model).apart()}


def explain_of(
    reading: Any, chain: Method | None, readout: str, backend: str, target_class: int | None, query: int | None
) -> CapturedExplain | PyHealthExplain:
    """How a model of PyHealth's is explained.

    Args:
        reading: Of it, from `reading_of`.
        chain: The method; None: the frozen gradient.
        readout, backend, target_class, query: As in `attribute_cohort`.

    Raises:
        ValueError: `query` is given for a model whose row is known.
    """
    if reading is not None and chain is not None and chain.gradients is None and not chain.matrices:
        return CapturedExplain(chain, readout, backend, query)
    if query is not None:
        raise ValueError(
            "attribute_cohort: query is for models of PyHealth's whose every position predicts, and for methods of "
            f"attention alone, got {query}"
        )
    return PyHealthExplain(chain, readout, backend, target_class)
