"""PyHealth's `evaluate_attribution`, with the model run on what is left of the records."""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyhealth.metrics.interpretability import Evaluator, SampleClass
from torch import Tensor

from rollout.evaluate.predictor import Predictor
from rollout.evaluate.removal import Removal, rows_of, values_of
from rollout.evaluate.sets import pyhealth_kept_entries
from rollout.evaluate.stack import Batch, inference, probabilities
from rollout.pyhealth.merged.ablation import ablation_of

METRICS = ("comprehensiveness", "sufficiency")
SampleFilter = Callable[[Tensor, str], Tensor]


def evaluate_attribution(
    model: Any,
    dataloader: Iterable[Batch],
    method: Any,
    metrics: Sequence[str] = METRICS,
    percentages: Sequence[float] = (1, 5, 10, 20, 50),
    ablation_strategy: str = "zero",
    sample_filter: SampleFilter | None = None,
    positive_threshold: float | None = None,
) -> dict[str, float]:
    """Mean comprehensiveness and sufficiency of a method over a dataloader: a drop-in for
    `pyhealth.metrics.interpretability.evaluate_attribution`.

    Given the same attributions, the means are those of PyHealth 2.1.0 to 1e-6, and so are its definitions: padding
    counts among a record's entries, so how samples are batched changes the numbers; what ties with the threshold goes
    along; a record's first code stays when all would go; a sample that the filter calls NEGATIVE has its attributions
    negated. PyHealth's Transformer, on a CPU, runs on what is left of each record, equal sets once; other models are
    run in stacks of whole batches.

    Args:
        model: a PyHealth model; it is put in evaluation mode, as PyHealth's function does.
        dataloader: batches, on any device.
        method: has `attribute(**batch)`, such as `rollout.pyhealth.AttentionRollout(model)`.
        metrics: of `"comprehensiveness"` and `"sufficiency"`.
        percentages: top shares of the entries, in percent, each in (0, 100].
        ablation_strategy: `"zero"`, `"mean"` or `"noise"`: what stands in place of measured values; the last two are
            left to PyHealth's own function where a batch has any. Codes become padding by any of them.
        sample_filter: (probability [B] of the class followed, kind of classifier) → `SampleClass` [B]; default: the
            samples of probability 0.5 on.
        positive_threshold: another number for that 0.5; deprecated, as in PyHealth.

    Returns:
        Metric → mean over the samples that the filter keeps; NaN where it keeps none.

    Raises:
        ValueError: a percentage is out of range, there is no such metric or strategy, a method gives scores that are
            not finite or of another shape than the feature's values, or the model gives no probabilities.
    """
    _check(metrics, percentages, ablation_strategy)
    with contextlib.redirect_stdout(io.StringIO()):
        stock = Evaluator(model, list(percentages), ablation_strategy, sample_filter, positive_threshold)
    kind = stock.metrics["comprehensiveness"].classifier_type
    predictor = Predictor(lambda batch: probabilities(model(**batch)), ablation_of(model))
    sums, counts = dict.fromkeys(metrics, 0.0), 0
    for given in dataloader:
        batch = {key: _moved(value, next(model.parameters()).device) for key, value in given.items()}
        attributions = {key: each for key, each in method.attribute(**batch).items() if key in batch}
        _check_scores(attributions, batch)
        if ablation_strategy != "zero" and any(values_of(batch[key]).is_floating_point() for key in attributions):
            with contextlib.redirect_stdout(io.StringIO()):
                scores = stock.evaluate(batch, attributions, list(metrics))
            found, valid = {name: score for name, (score, _) in scores.items()}, next(iter(scores.values()))[1]
        else:
            with inference(model):
                found, valid = _drops(predictor, batch, attributions, percentages, stock.sample_filter, kind)
        for name in metrics:
            sums[name] += (found[name] * valid).sum().item()
        counts += int(valid.sum())
    return {name: total / counts if counts else float("nan") for name, total in sums.items()}


def _drops(
    predictor: Predictor,
    batch: Batch,
    attributions: Mapping[str, Tensor],
    percentages: Sequence[float],
    sample_filter: SampleFilter,
    kind: str,
) -> tuple[dict[str, Tensor], Tensor]:
    """Per metric the mean drop of each sample [B], and which samples count."""
    intact = predictor.intact(batch)
    target = torch.ones(len(intact), dtype=torch.long) if predictor.single else intact.argmax(1)
    before = intact.gather(1, target[:, None])[:, 0]
    marks = sample_filter(before.clone(), kind).cpu()
    chosen = (marks != SampleClass.IGNORE).nonzero()[:, 0]
    sign = torch.where(marks == SampleClass.NEGATIVE, -1.0, 1.0)
    kept = {}
    for key, scores in attributions.items():
        signed = (scores.detach().cpu() * sign.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1)))[chosen]
        if len(chosen):
            kept[key] = pyhealth_kept_entries(signed, values_of(batch[key]).cpu()[chosen], percentages).flatten(0, 1)
    drops = before.new_zeros(2 * len(percentages), len(before))
    if kept:
        part = {key: rows_of(value, chosen) for key, value in batch.items()}
        after = predictor.versions(part, kept, Removal("pad"), chosen)
        followed = after.gather(2, target[chosen].expand(len(after), -1)[..., None])[..., 0]
        drops[:, chosen] = sign[chosen] * (before[chosen] - followed)
    without, only = drops.view(2, len(percentages), -1).mean(1)
    return dict(zip(METRICS, (without, only), strict=True)), marks != SampleClass.IGNORE


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value


def _check(metrics: Sequence[str], percentages: Sequence[float], strategy: str) -> None:
    if not metrics or not set(metrics) <= set(METRICS):
        raise ValueError(f"evaluate_attribution: metrics must be of {', '.join(METRICS)}, got {list(metrics)}")
    if not percentages or not all(0 < share <= 100 for share in percentages):
        raise ValueError(
            f"evaluate_attribution: percentages must be one or more numbers in (0, 100], got {list(percentages)}"
        )
    if strategy not in ("zero", "mean", "noise"):
        raise ValueError(f"evaluate_attribution: ablation_strategy must be zero, mean or noise, got {strategy!r}")


def _check_scores(attributions: Mapping[str, Tensor], batch: Batch) -> None:
    for key, scores in attributions.items():
        wanted = values_of(batch[key]).shape
        if scores.shape != wanted:
            raise ValueError(
                f"evaluate_attribution: scores of {key!r} must be shaped like its values, {list(wanted)}, got "
                f"{list(scores.shape)}"
            )
        if not bool(scores.isfinite().all()):
            raise ValueError(f"evaluate_attribution: scores of {key!r} must be finite, got NaN or Inf")
