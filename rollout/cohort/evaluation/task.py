"""What `evaluate_cohort` does to a batch, as a task of a cohort run."""

from dataclasses import dataclass
from typing import Any

from rollout.cohort.draft import Draft
from rollout.cohort.evaluation.predictor import predictor_of
from rollout.cohort.evaluation.scoring import Evaluation, evaluate_batch
from rollout.cohort.prefetch import ReadBatch
from rollout.cohort.source import Source
from rollout.evaluate.predictor import Predictor
from rollout.results.layout import EVALUATION_SCHEMAS, EVALUATION_STAGES
from rollout.stopwatch import stopwatch


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the methods on samples."""

    evaluation: Evaluation
    done = "evaluated"

    def begin(self, source: Source) -> "EvaluationDraft":
        """A part that begins."""
        return EvaluationDraft(source, self.evaluation)


class EvaluationDraft(Draft):
    """A part of an evaluation being made."""

    stages = EVALUATION_STAGES

    def __init__(self, source: Source, evaluation: Evaluation) -> None:
        self.schemas = {kind: schema for kind, schema in EVALUATION_SCHEMAS.items() if kind != "failures"}
        super().__init__(source)
        self.evaluation = evaluation
        self._predictor: Predictor | None = None
        self._numbers = 0

    def run(self, model: Any, batch: ReadBatch) -> None:
        """Evaluate a batch and add its rows."""
        if self._predictor is None:
            self._predictor = predictor_of(model, self.evaluation.predict)
        spent: dict[str, float] = {}
        with stopwatch(spent):
            tables, wrong = evaluate_batch(self.evaluation, model, self._predictor, self.source, batch, self._numbers)
        for stage, seconds in spent.items():  # a method has stages of its own
            self.seconds[stage if stage in self.stages else "attribute"] += seconds
        self.keep(tables, wrong)
        self._numbers += 1
