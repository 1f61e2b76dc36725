"""Attributions of an earlier cohort run as one of the methods that are evaluated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rollout.cohort.evaluation.explainer import Explainer
from rollout.cohort.prefetch import ReadBatch
from rollout.cohort.rows import Decoder
from rollout.cohort.source import Source
from rollout.evaluate.removal import values_of
from rollout.results.folder import RunFolder
from rollout.results.layout import ATTRIBUTER, TARGET
from rollout.results.manifest import CONTENT

_KEY = ["sample", "feature", "visit", "position"]


class StoredScores(Explainer):
    """The rows of a folder of attributions, batch by batch.

    Args:
        path: The folder.
        source: The samples that are evaluated: they must be those that were attributed.

    Attributes:
        description: What stands in a manifest of it.

    Raises:
        ValueError: It holds no attributions, or those of another dataset.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self._decoders = path, dict(source.decoders)
        self._folder: RunFolder | None = None
        self._held: tuple[list[int], pl.DataFrame, dict[int, int]] | None = None
        folder = self._opened()
        if folder.manifest.written_by != ATTRIBUTER:
            raise ValueError(
                f"evaluate_cohort: {path} must hold attributions, got what {folder.manifest.written_by} wrote"
            )
        there: Mapping[str, Any] = folder.manifest.identity["dataset"]
        for field in ("samples", "features", "fingerprint"):
            if there[field] != source.description[field]:
                raise ValueError(f"evaluate_cohort: {path} holds attributions of another dataset: its {field} differ")
        known, now = there.get(CONTENT, {}), source.description[CONTENT]
        differ = [
            number
            for number, digest in now.items()
            if None not in (digest, known.get(number)) and known[number] != digest
        ]
        if differ:
            raise ValueError(
                f"evaluate_cohort: {path} holds attributions of another dataset: sample {differ[0]} held other values"
            )
        method: Mapping[str, Any] = folder.manifest.identity["method"]
        self.description = {"stored": folder.manifest.run, "method": method.get("name")}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_folder": None, "_held": None}

    def __call__(self, model: Any, batch: ReadBatch, valid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scores of a batch.

        Raises:
            ValueError: a sample has no attributions there, or not of the entries it has.
        """
        rows, _ = self._rows(batch)
        found = {}
        for feature in rows["feature"].unique(maintain_order=True).to_list():
            mine = rows.filter(pl.col("feature") == feature)
            values = values_of(batch.ready[feature])
            found[feature] = self._scores(feature, mine, values, valid[feature].cpu().numpy(), batch.index)
        return found

    def classes(self, batch: ReadBatch) -> Tensor | None:
        """The classes that were explained; as `Explainer.classes`."""
        _, targets = self._rows(batch)
        return torch.tensor([targets.get(number, -1) for number in batch.index.tolist()])

    def _scores(self, feature: str, rows: pl.DataFrame, values: Tensor, real: np.ndarray, index: np.ndarray) -> Tensor:
        place_of = {number: place for place, number in enumerate(index.tolist())}
        owner = np.array([place_of[number] for number in rows["sample"].to_list()], dtype=np.int64)
        at = (owner, *self._place(feature, rows, values.dim()))
        scores, there = np.zeros(tuple(values.shape), dtype=np.float32), np.zeros(tuple(values.shape), dtype=bool)
        if any(
            len(place) and (place.min() < 0 or place.max() >= size)
            for place, size in zip(at, values.shape, strict=False)
        ):
            raise ValueError(f"the attributions of {feature!r} in {self.path} are of longer records")
        scores[at] = rows["attribution"].to_numpy()
        there[at] = True
        decoder = self._decoders[feature]
        if decoder.has_ids and decoder.codes is not None:
            codes = decoder.codes.take(values.cpu().numpy()[at]).to_pylist()
            if not np.array_equal(there, real) or codes != rows["code"].to_list():
                raise ValueError(
                    f"the attributions of {feature!r} in {self.path} are of other codes than the records hold"
                )
        return torch.from_numpy(scores)

    def _place(self, feature: str, rows: pl.DataFrame, dims: int) -> tuple[np.ndarray, ...]:
        """Where the rows of a feature lie in its values [B, ...]."""
        position, decoder = rows["position"].to_numpy(), self._decoders[feature]
        if _multi_hot(decoder):
            raise ValueError(f"stored attributions of {feature!r}, which is multi-hot, cannot be evaluated")
        return (rows["visit"].to_numpy(), position) if decoder.nested else (position,)

    def _rows(self, batch: ReadBatch) -> tuple[pl.DataFrame, dict[int, int]]:
        numbers = batch.index.tolist()
        folder = self._opened()
        held = folder.holding(numbers)
        parts = [record.part for record in held]
        if self._held is None or self._held[0] != parts:
            rows = folder.scan("attributions", held).select(*_KEY, "code", "attribution").collect()
            self._held = parts, rows, self._targets(folder, held)
        rows = self._held[1].filter(pl.col("sample").is_in(numbers))
        lacking = set(numbers).difference(rows["sample"].unique().to_list())
        if lacking:
            raise ValueError(f"sample {min(lacking)} has no attributions in {self.path}")
        return rows, self._held[2]

    def _targets(self, folder: RunFolder, held: Any) -> dict[int, int]:
        if not folder.manifest.class_specific:
            return {}
        table = folder.scan("predictions", held).select("sample", TARGET.name).drop_nulls().collect()
        return dict(zip(table["sample"].to_list(), table[TARGET.name].to_list(), strict=True))

    def _opened(self) -> RunFolder:
        if self._folder is None:
            self._folder = RunFolder(self.path)
        return self._folder


def _multi_hot(decoder: Decoder) -> bool:
    return decoder.multi_hot or decoder.whole
