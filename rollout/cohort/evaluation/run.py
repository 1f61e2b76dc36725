"""`evaluate_cohort`: every sample of a dataset, several methods side by side, going on where an earlier run stopped."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollout.cohort.code import python_version
from rollout.cohort.digest import digest_of
from rollout.cohort.evaluation.methods import RANDOM, Explainer, Function, Random, explainer_of, named_methods
from rollout.cohort.evaluation.predictor import PredictModel
from rollout.cohort.evaluation.scoring import Evaluation
from rollout.cohort.evaluation.settings import Planted, Scoring, prediction_kind
from rollout.cohort.evaluation.task import Evaluate
from rollout.cohort.evaluation.truth import planted_ids, pool_of
from rollout.cohort.identity import function_identity, model_identity, read_state
from rollout.cohort.plan import Plan
from rollout.cohort.run import check_where
from rollout.cohort.session import Session, settled
from rollout.cohort.source import Source, open_source
from rollout.cohort.store import Store
from rollout.cohort.summary import CohortRun
from rollout.cohort.work import Work
from rollout.data.collate import Collate, pyhealth_collate
from rollout.errors import CohortError, require
from rollout.evaluate import PERCENTAGES
from rollout.results.manifest import EvaluationManifest


def evaluate_cohort(
    model: nn.Module,
    dataset: Any,
    out: str | Path,
    *,
    methods: Any = ("rollout",),
    metric: str = "eraser",
    shares: tuple[float, ...] = PERCENTAGES,
    replacement: str | None = None,
    threshold: float = 0.5,
    seed: int = 0,
    leave_one_out: int = 0,
    planted: Planted | None = None,
    predict: PredictModel | None = None,
    batch_tokens: int = 8192,
    device: str | torch.device | None = None,
    workers: int = 1,
    client: Any = None,
    resume: bool = True,
    retry_failures: bool = False,
    batch_samples: int = 256,
    part_samples: int = 2048,
    equal_lengths: bool | None = None,
    collate: Collate | None = None,
    vocabularies: Mapping[str, Mapping[str, int] | None] | None = None,
    padding_ids: Mapping[str, int | None] | None = None,
    progress: bool | None = None,
) -> CohortRun:
    """Score attribution methods by what the model predicts without the codes they rank first, for every sample.

    Of each record the top share of codes is taken out ("without": comprehensiveness, a large drop is good), and nothing
    but the top share is kept ("only": sufficiency, a small drop is good); the drop is that of the probability of the
    class the model predicts for the whole record, of several labels the most probable one. A ranking by chance always
    stands beside the methods, as "random".

    The folder gets `faithfulness/` (a row per sample, method, direction and share), `scores/` (a row per sample and
    method), `predictions/`, `failures/` where there are any, and `manifest.json`; `rollout.open_faithfulness` reads
    it. It keeps every promise of `attribute_cohort`: killed at any moment, the same call goes on and ends with the rows
    of an unbroken run; another model, method or dataset is refused by name of what differs; at most two parts' samples
    are held. A sample on which one method fails is a failure of that sample, for all methods: what is compared is
    compared on the same samples.

    PyHealth's Transformer, on a CPU, runs on what is kept alone, equal sets once and the rest in stacks; any other
    model is asked for whole batches of versions, equal ones once. A model whose numbers depend on padding gives other
    ones beside other records; `equal_lengths` gives each sample those of a batch without padding.

    Args:
        model: A PyHealth model, or any module with `predict`. It is put back as it was.
        dataset: As in `attribute_cohort`.
        out: New folder, or that of the same evaluation.
        methods: Names, or a mapping of your names to: a name in `rollout.METHODS` or "frozen_gradient", a
            `rollout.Method`, an interpreter with `attribute(**batch)`, a function (model, batch) → {feature: scores
            shaped like its values}, or a folder of `attribute_cohort` of the same dataset.
        metric: `"eraser"`: real codes only; of the n codes of a feature the top q % are ⌈q/100 · n⌉, and the last code
            stays. `"pyhealth"`: the numbers of PyHealth 2.1.0's `evaluate_attribution`: padding is counted, ties go
            along, samples below `threshold` are left out; they depend on which samples share a batch, so the batch of
            each is in its prediction, and the plan in the manifest.
        shares: In percent, each in (0, 100], ascending.
        replacement: `"delete"`: codes are taken out and the rest moves up; entries of features that are no lists of
            codes become 0. `"pad"`: they become padding where they stand. `"resample"`: codes drawn from the cohort
            stand in their place, the same for every method. None: `"delete"`, with PyHealth's metric `"pad"`.
        threshold: Of two classes, 1 is predicted from this probability on.
        seed: Of the random ranking and of what is drawn, together with the number of the sample.
        leave_one_out: For records of at most so many codes, each code is taken out alone, and the rank correlation of
            each method with what that does is in `scores/` (`leave_one_out`); 0: not done.
        planted: Feature → codes that are known to drive the outcome: `scores/` then has their `recall` among as many
            top codes, and `planted_auc`, the chance that one is ranked above another code of its feature.
        predict: (model, batch) → probabilities [B, K], or [B] of the positive class; None: `model(**batch)` gives
            `y_prob` or `logit`.
        batch_tokens, device, workers, client, resume, retry_failures, batch_samples, part_samples, equal_lengths,
        collate, vocabularies, padding_ids, progress: As in `attribute_cohort`.

    Returns:
        Counts, seconds and memory.

    Raises:
        ValueError, TypeError: If an argument is wrong, before any work; the model predicts a number; or `out` holds
            something else.
        CohortError: As `attribute_cohort`.

    Source: DeYoung et al. 2020, ERASER, arXiv:1911.03429, section 4.
    """
    with _speaking_as("evaluate_cohort"):
        for module in ("pyarrow", "tqdm"):
            require(module, "cohort")
        shares = tuple(shares)
        replacement = replacement or ("pad" if metric == "pyhealth" else "delete")
        kind = prediction_kind(model, dataset)
        scoring = Scoring(metric, shares, replacement, threshold, seed, leave_one_out, planted, kind)
        plan = Plan(batch_tokens, batch_samples, part_samples, bool(equal_lengths))
        where = check_where(model, device, client, workers)
        source = open_source(dataset, collate, vocabularies, padding_ids)
        scoring.check_features(source.decoders)
        with settled(model, None):
            explainers, described = _explainers(methods, model, source, scoring.seed)
        evaluation = _evaluation(scoring, explainers, source, predict)
        functions = _functions_of_the_caller(source, explainers, predict)
        identity = {
            "model": model_identity(model),
            "dataset": source.description,
            "evaluation": scoring.described(_digest(planted)),
            "methods": described,
            "plan": vars(plan).copy(),
            **{name: function_identity(function, [model, dataset]) for name, function in functions.items()},
            "python": python_version(),
        }
        state = partial(read_state, model, functions, [model, dataset])
        begun = EvaluationManifest.of(identity, state=state(), labels=source.labels)
        parts = len(plan.parts(len(source)))
        store = Store(out, begun, parts, dataset, resume=resume, retry_failures=retry_failures)
        try:
            work = Work(model, source, Evaluate(evaluation), plan)
            return Session(store, work, state, workers, client, where, progress).run()
        finally:
            store.close()


def _explainers(
    methods: Any, model: Any, source: Source, seed: int
) -> tuple[dict[str, Explainer], dict[str, dict[str, Any]]]:
    """The methods by name, the random ranking last, and what a manifest says of each."""
    found = {name: explainer_of(name, given, model, source) for name, given in named_methods(methods).items()}
    found[RANDOM] = Random(seed), {"random": seed}
    return {name: one for name, (one, _) in found.items()}, {name: said for name, (_, said) in found.items()}


def _evaluation(
    scoring: Scoring, explainers: Mapping[str, Explainer], source: Source, predict: PredictModel | None
) -> Evaluation:
    pool = pool_of(source.dataset, source.decoders) if scoring.replacement == "resample" else {}
    lacking = [feature for feature, codes in pool.items() if not len(codes)]
    if lacking:
        raise ValueError(f"evaluate_cohort: replacement='resample' found no code of {lacking[0]!r} to draw from")
    labels = list(getattr(source.dataset, "output_schema", None) or {})
    planted = planted_ids(scoring.planted or {}, source.decoders)
    return Evaluation(scoring, explainers, predict, labels, planted, pool)


def _functions_of_the_caller(
    source: Source, explainers: Mapping[str, Explainer], predict: PredictModel | None
) -> dict[str, Any]:
    functions = {f"methods.{name}": one.function for name, one in explainers.items() if isinstance(one, Function)}
    collate = None if source.collate is pyhealth_collate else source.collate
    given: dict[str, Any] = {**functions, "predict": predict, "collate": collate}
    return {name: function for name, function in given.items() if function is not None}


def _digest(planted: Planted | None) -> str | None:
    return None if planted is None else digest_of({feature: sorted(codes) for feature, codes in planted.items()})


@contextmanager
def _speaking_as(name: str) -> Iterator[None]:
    """What cohort runs share says `attribute_cohort` of itself: here it is called by this name."""
    try:
        yield
    except (ValueError, TypeError, CohortError) as error:
        if not str(error).startswith("attribute_cohort: "):
            raise
        raise type(error)(f"{name}: {str(error).removeprefix('attribute_cohort: ')}") from error
