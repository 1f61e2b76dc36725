"""One batch evaluated: every method's scores, what is kept by them, what the model says of it, and the rows of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rollout.cohort.draft import unfinite_predictions
from rollout.cohort.evaluation.methods import Explainer
from rollout.cohort.evaluation.predictor import PredictModel
from rollout.cohort.evaluation.settings import Scoring
from rollout.cohort.evaluation.truth import agreement, recovered, versions_without_one
from rollout.cohort.prefetch import ReadBatch
from rollout.cohort.rows import Decoder, prediction_table
from rollout.cohort.source import Source
from rollout.evaluate.predictor import Predictor
from rollout.evaluate.removal import Removal, rows_of, values_of
from rollout.evaluate.scores import versions
from rollout.evaluate.sets import kept_entries, pyhealth_kept_entries
from rollout.evaluate.stack import predicted_class
from rollout.results.layout import EVALUATED_SCHEMA, FAITHFULNESS_SCHEMA, ONLY, SCORES_SCHEMA, WITHOUT
from rollout.stopwatch import timed

Scores = Mapping[str, Tensor]
_PLAIN_ERRORS = (ValueError, TypeError, RuntimeError, KeyError, IndexError, AssertionError)
"""Errors that are made of a text alone: the name of the method goes before it."""


@dataclass(frozen=True)
class Evaluation:
    """How the batches of a cohort are evaluated; it travels to the processes that do it.

    Attributes:
        scoring: How attributions are scored.
        methods: Name → method.
        predict: How the model is asked; None: as PyHealth's are.
        labels: Keys of a batch that hold the truth.
        planted: Feature → ids of planted codes.
        pool: Feature → ids to draw from in place of codes.
    """

    scoring: Scoring
    methods: Mapping[str, Explainer]
    predict: PredictModel | None = None
    labels: Sequence[str] = ()
    planted: Mapping[str, Tensor] = field(default_factory=dict)
    pool: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Looked:
    """A batch, and what the model says of it.

    Attributes:
        batch: As read.
        values: Feature → ids or numbers [B, ...].
        valid: Feature → which of them are real, bool.
        padding: Feature → the id that stands for no code.
        intact: Probabilities [B, K ≥ 2] of the whole records.
        single: Whether the model gives one number, the probability of class 1.
        target: The class followed, long [B].
        probability: Of it, [B].
        evaluated: Which samples are, bool [B].
    """

    batch: ReadBatch
    values: dict[str, Tensor]
    valid: dict[str, Tensor]
    padding: dict[str, int]
    intact: Tensor
    single: bool
    target: Tensor
    probability: Tensor
    evaluated: Tensor


def evaluate_batch(
    evaluation: Evaluation, model: Any, predictor: Predictor, source: Source, batch: ReadBatch, number: int
) -> tuple[dict[str, pa.Table], dict[int, str]]:
    """The rows of a batch by kind, and sample → reason of those that cannot be evaluated.

    Args:
        evaluation: How.
        model: In evaluation mode.
        predictor: Of the model.
        source: The samples.
        batch: Of them.
        number: Of the batch in its part; it stands in the rows.
    """
    with timed("predict"):
        looked = look(evaluation.scoring, predictor, source.decoders, batch)
    wrong = dict(unfinite_predictions(looked.intact, batch.index))
    scores: dict[str, Scores] = {}
    with timed("attribute"):
        for name, explainer in evaluation.methods.items():
            scores[name], found = _explained(name, explainer, model, looked)
            wrong |= {number: reason for number, reason in found.items() if number not in wrong}
    with timed("predict"):
        rows = _Rows(evaluation, predictor, looked, scores)
        tables = {"faithfulness": rows.faithfulness(), "scores": rows.scored()}
    tables["predictions"] = _predictions(evaluation.labels, looked, number)
    return tables, wrong


def look(scoring: Scoring, predictor: Predictor, decoders: Mapping[str, Decoder], batch: ReadBatch) -> Looked:
    """Have the model predict whole records, and follow the class it predicts."""
    ready = batch.ready
    values = {key: _values(key, ready[key], decoders[key]) for key in decoders if key in ready}
    padding = {key: decoders[key].padding or 0 for key in values}
    valid = {key: _real(each, decoders[key]) for key, each in values.items()}
    intact = predictor.intact(ready)
    single = predictor.single
    if scoring.metric == "pyhealth":
        target = torch.ones(len(intact), dtype=torch.long) if single else intact.argmax(1)
    elif scoring.kind == "multilabel" and not single:
        target = intact.argmax(1)
    else:
        target = predicted_class(intact, scoring.threshold)
    probability = intact.gather(1, target[:, None])[:, 0]
    filtered = scoring.metric == "pyhealth" and scoring.kind in ("binary", "multilabel")
    evaluated = probability >= scoring.threshold if filtered else torch.ones_like(target, dtype=torch.bool)
    return Looked(batch, values, valid, padding, intact, single, target, probability, evaluated)


def _values(key: str, feature: Any, decoder: Decoder) -> Tensor:
    values = values_of(feature)
    if not isinstance(values, Tensor) or values.dim() < 2 or (isinstance(feature, tuple) and decoder.value != 1):
        raise ValueError(f"feature {key!r} is neither a tensor [B, ...] nor (time, values), so it cannot be evaluated")
    return values.cpu()


def _real(values: Tensor, decoder: Decoder) -> Tensor:
    if decoder.has_ids:
        return torch.ones_like(values, dtype=torch.bool) if decoder.padding is None else values != decoder.padding
    return values != 0


def _explained(name: str, explainer: Explainer, model: Any, looked: Looked) -> tuple[Scores, dict[int, str]]:
    """A method's scores, and sample → reason of those that have none to go by."""
    try:
        given = explainer(model, looked.batch, looked.valid)
    except Exception as error:
        if type(error) in _PLAIN_ERRORS:
            raise type(error)(f"method {name!r}: {error}") from error
        raise
    scores, wrong = {}, dict[int, str]()
    if not isinstance(given, Mapping) or not set(looked.values).issuperset(given) or not given:
        named = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"method {name!r} must give scores of some of {sorted(looked.values)}, got {named}")
    for key, each in given.items():
        wanted = looked.values[key].shape
        if not isinstance(each, Tensor) or each.shape != wanted:
            told = type(each).__name__ if not isinstance(each, Tensor) else list(each.shape)
            raise ValueError(
                f"method {name!r}: scores of {key!r} must be shaped like its values, {list(wanted)}, got {told}"
            )
        scores[key] = each.detach().float().cpu()
        finite = (scores[key].isfinite() | ~looked.valid[key]).flatten(1).all(1)
        for number in looked.batch.index[~finite.numpy()].tolist():
            wrong[number] = f"method {name!r}: a score of {key!r} is not finite"
        scores[key] = scores[key].nan_to_num(0.0, 0.0, 0.0)
    classes = None if looked.single else explainer.classes(looked.batch)
    if classes is not None:
        for number in looked.batch.index[((classes >= 0) & (classes != looked.target)).numpy()].tolist():
            wrong[number] = f"method {name!r}: its scores are for another class than the one predicted"
    return scores, wrong


class _Rows:
    """The rows of a batch."""

    def __init__(
        self, evaluation: Evaluation, predictor: Predictor, looked: Looked, scores: Mapping[str, Scores]
    ) -> None:
        self.scoring, self.planted, self.looked, self.scores = evaluation.scoring, evaluation.planted, looked, scores
        self.names = list(scores)
        self.signed = {name for name in scores if evaluation.methods[name].signed and looked.single}
        self.chosen = looked.evaluated.nonzero()[:, 0]
        self.blocks = 2 * len(self.scoring.shares) * len(self.names)
        kept = {key: self._kept(key) for key in looked.values}
        self.left = self._codes_left(kept)
        self.alone = torch.zeros(len(self.chosen), dtype=torch.long)
        if self.scoring.leave_one_out:
            lacking, self.alone = versions_without_one(self._of(looked.valid), self.scoring.leave_one_out)
            kept = {key: torch.cat([each, lacking[key]]) for key, each in kept.items()}
        followed = self._followed(predictor, kept, evaluation.pool)
        self.after, self.after_one = followed[: self.blocks], followed[self.blocks :]

    def _followed(self, predictor: Predictor, kept: Mapping[str, Tensor], pool: Mapping[str, np.ndarray]) -> Tensor:
        """The probability [V, B] of the class followed, for every version."""
        if not len(self.chosen):
            return torch.zeros(self.blocks, 0)
        batch = {key: rows_of(value, self.chosen) for key, value in self.looked.batch.ready.items()}
        touched = {key: each for key, each in kept.items() if not bool(each.all())}
        if not touched:
            return self.looked.probability[self.chosen].repeat(len(next(iter(kept.values()))), 1)
        found = predictor.versions(batch, touched, self._removal(pool), self.chosen)
        return found.gather(2, self.looked.target[self.chosen].expand(len(found), -1)[..., None])[..., 0]

    def _of(self, each: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value[self.chosen] for key, value in each.items()}

    def _kept(self, key: str) -> Tensor:
        """What is kept of a feature: bool [M·2·Q, B, ...], methods first, then directions, then shares."""
        values, valid = self.looked.values[key][self.chosen], self.looked.valid[key][self.chosen]
        shares, parts = self.scoring.shares, []
        for name in self.names:
            if key not in self.scores[name] or not len(self.chosen):
                parts.append(torch.ones(2 * len(shares), *values.shape, dtype=torch.bool))
                continue
            scores = self._toward_target(name, key)[self.chosen]
            if self.scoring.metric == "pyhealth":
                parts.append(pyhealth_kept_entries(scores, values, shares).flatten(0, 1))
            else:
                parts.append(versions(kept_entries(scores, valid, shares), valid)[1:])
        return torch.cat(parts)

    def _toward_target(self, name: str, key: str) -> Tensor:
        """Scores as they speak for the class followed; as a method gives them, signed ones speak for class 1."""
        scores = self.scores[name][key]
        if name not in self.signed:
            return scores
        against = (self.looked.target == 0).view(-1, *[1] * (scores.dim() - 1))
        return torch.where(against, -scores, scores)

    def _codes_left(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Real codes of all features that are left, long [M·2·Q, B]."""
        left = torch.zeros(self.blocks, len(self.chosen), dtype=torch.long)
        for key, valid in self._of(self.looked.valid).items():
            left += (kept[key] & valid).flatten(2).sum(2)
        return left

    def _removal(self, pool: Mapping[str, np.ndarray]) -> Removal:
        """What stands in place of what is removed; drawn for a sample by itself, whatever batch it is in."""
        drawn = {}
        if self.scoring.replacement == "resample":
            numbers = self.looked.batch.index[self.chosen.numpy()].tolist()
            generators = [np.random.default_rng([self.scoring.seed, number, 1]) for number in numbers]
            for key, values in self._of(self.looked.values).items():
                rows = values.numpy().copy()
                for row, real, generator in zip(
                    rows, self._of(self.looked.valid)[key].numpy(), generators, strict=True
                ):
                    row[real] = generator.choice(pool[key], int(real.sum()))
                drawn[key] = torch.from_numpy(rows)
        return Removal(self.scoring.replacement, self.looked.padding, drawn)

    def faithfulness(self) -> pa.Table:
        """A row per sample, method, direction and share."""
        shares = np.array(self.scoring.shares, dtype=np.float32)
        samples = self.looked.batch.index[self.chosen.numpy()]
        count, methods = len(samples), len(self.names)
        after = self.after.T.reshape(-1).numpy()
        before = np.repeat(self.looked.probability[self.chosen].numpy(), self.blocks)
        columns = [
            pa.array(np.repeat(samples, self.blocks), pa.int64()),
            pa.array(np.tile(np.repeat(np.array(self.names), 2 * len(shares)), count), pa.string()),
            pa.array(np.tile(np.repeat(np.array([WITHOUT, ONLY]), len(shares)), count * methods), pa.string()),
            pa.array(np.tile(shares, count * 2 * methods), pa.float32()),
            pa.array(self.left.T.reshape(-1).numpy(), pa.int32()),
            pa.array(after, pa.float32()),
            pa.array(before - after, pa.float32()),
        ]
        return pa.table(columns, schema=FAITHFULNESS_SCHEMA)

    def scored(self) -> pa.Table:
        """A row per sample and method."""
        looked, size = self.looked, len(self.looked.batch.index)
        unknown = np.full(size, np.nan)
        marked = {key: torch.isin(looked.values[key], ids) for key, ids in self.planted.items() if key in looked.values}
        found = []
        for name in self.names:
            recall, area = recovered(self.scores[name], looked.valid, marked) if marked else (unknown, unknown)
            agrees = unknown.copy()
            if len(self.after_one):
                effects = looked.probability[self.chosen] - self.after_one
                mine = {key: self._toward_target(name, key)[self.chosen] for key in self.scores[name]}
                agrees[self.chosen.numpy()] = agreement(mine, self._of(looked.valid), effects, self.alone)
            found.append(np.stack([recall, area, agrees]))
        columns = np.stack(found).transpose(2, 0, 1).reshape(-1, 3).T
        numbers = [pa.array(column, pa.float32(), mask=np.isnan(column)) for column in columns]
        samples = pa.array(np.repeat(looked.batch.index, len(self.names)), pa.int64())
        return pa.table([samples, pa.array(self.names * size, pa.string()), *numbers], schema=SCORES_SCHEMA)


def _predictions(labels: Sequence[str], looked: Looked, number: int) -> pa.Table:
    batch = looked.batch
    y_true = next((batch.ready[key] for key in labels if isinstance(batch.ready.get(key), Tensor)), None)
    y_prob = looked.intact[:, 1:] if looked.single else looked.intact
    size = len(batch.index)
    table = prediction_table(batch.samples, batch.index, y_prob, y_true, np.zeros((size, 0)))
    codes = torch.stack([real.flatten(1).sum(1) for real in looked.valid.values()]).sum(0)
    added = {
        "target": looked.target,
        "probability": looked.probability,
        "codes": codes,
        "evaluated": looked.evaluated,
        "batch": torch.full((size,), number),
    }
    columns = {name: table[name] for name in EVALUATED_SCHEMA.names if name not in added}
    for name, column in added.items():
        columns[name] = pa.array(column.numpy(), EVALUATED_SCHEMA.field(name).type)
    return pa.table([columns[name] for name in EVALUATED_SCHEMA.names], schema=EVALUATED_SCHEMA)
