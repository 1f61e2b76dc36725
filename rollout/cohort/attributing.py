"""What `attribute_cohort` does to a batch: it is explained, and its relevance becomes rows."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.cohort.draft import Draft, unfinite_predictions
from rollout.cohort.explain import Explain, Explained
from rollout.cohort.prefetch import ReadBatch
from rollout.cohort.rows import measured_rows, prediction_table
from rollout.cohort.shares import Measured, wrong_sums
from rollout.cohort.source import Source
from rollout.results.layout import STAGES, TARGET, schemas
from rollout.results.padding import count_padding
from rollout.stopwatch import stopwatch, timed


@dataclass(frozen=True)
class Attribute:
    """Attribute samples.

    Attributes:
        explain: (model, batch) → `Explained`.
        class_specific: Whether predictions have a column for the class explained.
    """

    explain: Explain
    class_specific: bool = False
    done = "attributed"

    def begin(self, source: Source) -> "AttributionDraft":
        """A part that begins."""
        return AttributionDraft(source, self.explain, self.class_specific)


class AttributionDraft(Draft):
    """A part of attributions being made."""

    stages = STAGES

    def __init__(self, source: Source, explain: Explain, class_specific: bool) -> None:
        self.explain, self.class_specific = explain, class_specific
        self.schemas = {kind: schema for kind, schema in schemas(class_specific).items() if kind != "failures"}
        super().__init__(source)

    def run(self, model: Any, batch: ReadBatch) -> None:
        """Explain a batch and add its rows.

        A sample with a number among them that is not finite is a failure, and so is one with a row that does not sum to
        1 where `Explained` says that rows do.
        """
        with stopwatch(self.seconds), timed("forward"):
            explained = self.explain(model, batch.ready)
        begun = time.perf_counter()
        known = set(self.source.decoders)
        if not explained.relevance or not known.issuperset(explained.relevance):
            raise ValueError(f"explain must give relevance of {sorted(known)}, got {sorted(explained.relevance)}")
        attributions, rows = measured_rows(batch.samples, batch.index, explained.relevance, self.source.decoders)
        predictions = self._predicted(batch, explained, rows)
        wrong = wrong_sums(rows, batch.index, zero_rows=explained.zero_rows) if explained.row_sums else {}
        wrong |= dict(unfinite_predictions(explained.y_prob, batch.index)) | _unfinite_rows(attributions)
        self.keep({"attributions": attributions, "predictions": predictions}, wrong)
        self.seconds["write"] += time.perf_counter() - begun

    def padding(self, predictions: pa.Table) -> dict[str, Any]:
        return count_padding(predictions, list(self.source.decoders))

    def _predicted(self, batch: ReadBatch, explained: Explained, rows: Mapping[str, Measured]) -> pa.Table:
        size = len(batch.samples)
        unknown = np.full(size, np.nan)
        shares = [rows[feature].share if feature in rows else unknown for feature in self.source.decoders]
        table = prediction_table(
            batch.samples, batch.index, explained.y_prob, explained.y_true, np.stack(shares, axis=1)
        )
        if not self.class_specific:
            return table
        target = None if explained.target is None else explained.target.cpu().numpy()
        column = pa.nulls(size, pa.int32()) if target is None else pa.array(target, pa.int32())
        return table.append_column(TARGET, column)


def _unfinite_rows(attributions: pa.Table) -> dict[int, str]:
    """Sample → reason, of the samples that have a NaN or an infinity in a row."""
    rows = attributions.filter(~np.isfinite(attributions["attribution"].to_numpy()))
    wrong: dict[int, str] = {}
    for number, feature in zip(rows["sample"].to_pylist(), rows["feature"].to_pylist(), strict=True):
        wrong.setdefault(number, f"the attribution of feature {feature!r} is not finite")
    return wrong
