"""Which methods find the planted codes: each record's own codes ranked, as areas under the ROC curve."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rollout.data.collate import pyhealth_collate
from rollout.data.quiet import quiet_pyhealth
from rollout.demo.training import Sample, auroc
from rollout.method import METHODS
from rollout_kernels import Method

Explainer = Callable[..., Mapping[str, Tensor]]
Marks = Mapping[str, Mapping[str, set[int]]]
"""What was planted: `risk` or `protective` → feature → ids of the codes in the model's vocabulary."""

STEPS = 16  # of integrated gradients
LEFT_OUT_AT_ONCE = 8192  # tokens of records that each lack one code, in one batch


def explainers(model: Any, costly: bool = True) -> dict[str, Explainer]:
    """Name → method, of a PyHealth Transformer that predicts one logit.

    Args:
        model: PyHealth's Transformer, of flat features.
        costly: Also integrated gradients and leaving one code out, which take many forward passes.
    """
    with quiet_pyhealth():
        from rollout.pyhealth import AttentionRollout, FrozenGradient, GradientRollout
    layers = len(next(iter(model.transformer.values())).transformer)
    last = Method(residual=0.0, attention=1.0, renormalize=False, start_layer=layers - 1)
    elsewhere = replace(METHODS["rollout"], own_path=False)
    found: dict[str, Explainer] = {
        "frozen_gradient": FrozenGradient(model).attribute,
        "rollout": AttentionRollout(model, method="rollout").attribute,
        "rollout, own place left out": AttentionRollout(model, method=elsewhere).attribute,
        "value_norm": AttentionRollout(model, method="value_norm").attribute,
        "kobayashi": AttentionRollout(model, method="kobayashi").attribute,
        "discard": AttentionRollout(model, method="discard").attribute,
        "chefer": GradientRollout(model, "chefer").attribute,
        "chefer_normalised": GradientRollout(model, "chefer_normalised").attribute,
        "grad_rollout": GradientRollout(model, "grad_rollout").attribute,
        "gradient × input": partial(integrated_gradients, model, 1),
        "attention of the last layer": AttentionRollout(model, method=last).attribute,
        "random": partial(random_scores, model, np.random.default_rng(0)),
    }
    if costly:
        found[f"integrated gradients, {STEPS} steps"] = partial(integrated_gradients, model, STEPS)
        found["leave one code out"] = partial(leave_one_out, model)
    return found


def integrated_gradients(model: Any, steps: int, **batch: Any) -> dict[str, Tensor]:
    """Embedding × its gradient, at `steps` points between 0 and it; of one step, at the embedding itself.

    Source: Sundararajan, Taly & Yan 2017, arXiv:1703.01365, equation 3 (the middle of each step).
    """
    embedded = {key: model.embedding_model({key: batch[key]})[key].detach() for key in model.feature_keys}
    padding = {key: value.abs().amax(-1, keepdim=True) == 0 for key, value in embedded.items()}
    total = {key: torch.zeros_like(value) for key, value in embedded.items()}
    for step in range(steps):
        share = 1.0 if steps == 1 else (step + 0.5) / steps
        points = {key: (share * value).requires_grad_() for key, value in embedded.items()}
        logits = model.forward_from_embedding(**{**batch, **points})["logit"]
        gradients = torch.autograd.grad(logits.sum(), list(points.values()))
        for key, gradient in zip(points, gradients, strict=True):
            total[key] += gradient / steps
    return {key: (total[key] * value).masked_fill(padding[key], 0.0).sum(-1) for key, value in embedded.items()}


def leave_one_out(model: Any, **batch: Any) -> dict[str, Tensor]:
    """What the logit loses when one entry of a record is taken out; a feature keeps its last entry."""
    keys = list(model.feature_keys)
    scores = {key: torch.zeros(batch[key].shape) for key in keys}
    for number in range(len(batch[keys[0]])):
        record = {key: batch[key][number][batch[key][number] != 0] for key in keys}
        lacking = [(key, place) for key in keys if len(record[key]) > 1 for place in range(len(record[key]))]
        whole = _logits(model, batch, [record])[0]
        size = max(1, LEFT_OUT_AT_ONCE // sum(map(len, record.values())))
        for first in range(0, len(lacking), size):
            part = lacking[first : first + size]
            without = [{**record, key: _without(record[key], place)} for key, place in part]
            for (key, place), logit in zip(part, _logits(model, batch, without), strict=True):
                scores[key][number, place] = whole - logit
    return scores


def _without(codes: Tensor, place: int) -> Tensor:
    return torch.cat([codes[:place], codes[place + 1 :]])


def _logits(model: Any, batch: Mapping[str, Any], records: list[dict[str, Tensor]]) -> Tensor:
    padded = {key: torch.nn.utils.rnn.pad_sequence([r[key] for r in records], batch_first=True) for key in records[0]}
    label = model.label_keys[0]
    with torch.inference_mode():
        output = model(**padded, **{label: batch[label][:1].expand(len(records), *batch[label].shape[1:])})
    return output["logit"][:, 0].cpu()


def random_scores(model: Any, rng: np.random.Generator, **batch: Any) -> dict[str, Tensor]:
    """Scores that know nothing."""
    return {key: torch.from_numpy(rng.random(tuple(batch[key].shape))) for key in model.feature_keys}


def recovery(
    model: Any, samples: Sequence[Sample], marks: Marks, methods: Mapping[str, Explainer], batch_size: int = 32
) -> pl.DataFrame:
    """How well each method ranks the planted codes of each record above its other codes.

    Position 0, which PyHealth's Transformer reads, and where attention methods put the residual's own share, is left
    out of every record.

    Returns:
        A row per record, feature and method: `patient`, `sample`, `feature`, `method`; `risk`: the area of risk codes
        over ordinary ones; `protective`: of ordinary over protective ones; null where a record lacks either.
    """
    rows = []
    lengths = [sum(len(sample[key]) for key in model.feature_keys) for sample in samples]
    order = sorted(range(len(samples)), key=lengths.__getitem__)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = pyhealth_collate([samples[number] for number in chosen])
        for name, explain in methods.items():
            scores = {key: value.detach().double().numpy() for key, value in explain(**batch).items()}
            rows += [
                {"patient": samples[number]["patient_id"], "sample": number, "method": name, **found}
                for place, number in enumerate(chosen)
                for found in _areas(samples[number], {key: value[place] for key, value in scores.items()}, marks)
            ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _areas(sample: Sample, scores: Mapping[str, np.ndarray], marks: Marks) -> Iterator[dict[str, Any]]:
    for key, value in scores.items():
        codes = np.asarray(sample[key])[1:]
        score = value[1 : 1 + len(codes)]
        planted = {kind: np.isin(codes, list(of[key])) for kind, of in marks.items()}
        ordinary = ~np.logical_or.reduce(list(planted.values()))
        risk, protective = planted["risk"], planted.get("protective", np.zeros_like(ordinary))
        found = {"risk": _area(score[risk], score[ordinary]), "protective": _area(score[ordinary], score[protective])}
        if any(area is not None for area in found.values()):
            yield {"feature": key, **found}


def _area(higher: np.ndarray, lower: np.ndarray) -> float | None:
    """The chance that one of `higher` is above one of `lower`, ties half; None where either is empty."""
    if not len(higher) or not len(lower):
        return None
    return auroc(np.repeat([1.0, 0.0], [len(higher), len(lower)]), np.concatenate([higher, lower]))


def planted_records(
    dataset: Any, samples: Sequence[Sample], index: np.ndarray, truth: Mapping[str, Any]
) -> tuple[Marks, list[Sample]]:
    """The planted codes of a `truth.json` as ids, and of the samples at `index` those with one past position 0."""
    vocabularies = {key: processor.code_vocab for key, processor in dataset.input_processors.items()}
    marks = marks_of(truth, vocabularies)
    planted = {key: list(set().union(*(of[key] for of in marks.values()))) for key in vocabularies}
    chosen = (samples[number] for number in index)
    return marks, [s for s in chosen if any(np.isin(np.asarray(s[key])[1:], planted[key]).any() for key in planted)]


def marks_of(truth: Mapping[str, Any], vocabularies: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, set[int]]]:
    """The planted codes of a `truth.json`, as the ids of the vocabularies."""
    marks: dict[str, dict[str, set[int]]] = {"risk": {}, "protective": {}}
    for feature, rows in truth["planted"].items():
        for kind, wanted in (("risk", True), ("protective", False)):
            codes = [row["code"] for row in rows if (row["log_odds"] > 0) is wanted]
            marks[kind][feature] = {vocabularies[feature][code] for code in codes if code in vocabularies[feature]}
    return marks
