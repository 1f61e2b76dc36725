"""Is an attribution faithful to the model? Comprehensiveness and sufficiency, by deleting the codes a sample has.

Delete the most relevant codes and the model should lose its confidence (comprehensiveness, high is good); keep nothing
else and it should not (sufficiency, low is good). Only real codes are counted, ranked and deleted, so a score does not
depend on how far a sample was padded, and the drop is that of the class the model predicts, whichever it is.

    scores = evaluate(model, loader, {"rollout": AttentionRollout(model), "random": RandomBaseline(model)})
    difference = scores["rollout"].comprehensiveness - scores["random"].comprehensiveness
    print(bootstrap_mean(difference, patients))         # rollout.intervals: the interval is by patient
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rollout.evaluate.removal import Removal, values_of
from rollout.evaluate.sets import kept_entries
from rollout.evaluate.stack import Batch, class_probabilities, inference, predict_kept, predicted_class

PERCENTAGES = (1.0, 5.0, 10.0, 20.0, 50.0)
REMOVALS = ("delete", "pad")

Explainer = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True)
class Faithfulness:
    """What deletion did to the predictions of N samples, at P percentages.

    Attributes:
        target: long [N], the class whose probability is followed.
        probability: float32 [N], its probability given the whole input.
        drop_without: float32 [N, P], probability minus that without the most relevant codes.
        drop_with_only: float32 [N, P], probability minus that with nothing but the most relevant codes.
    """

    target: Tensor
    probability: Tensor
    drop_without: Tensor
    drop_with_only: Tensor

    @property
    def comprehensiveness(self) -> Tensor:
        """float32 [N]: the mean of `drop_without` over the percentages; higher is more faithful."""
        return self.drop_without.mean(1)

    @property
    def sufficiency(self) -> Tensor:
        """float32 [N]: the mean of `drop_with_only` over the percentages; lower is more faithful."""
        return self.drop_with_only.mean(1)


def faithfulness(
    model: nn.Module,
    batch: Batch,
    attributions: Mapping[str, Tensor],
    *,
    percentages: Sequence[float] = PERCENTAGES,
    removal: str = "delete",
    threshold: float = 0.5,
    target: Tensor | None = None,
    valid: Mapping[str, Tensor] | None = None,
) -> Faithfulness:
    """Comprehensiveness and sufficiency of one batch of attributions.

    comprehensiveness = 1/|Q| · Σ_q p_c(x) − p_c(x without its top q %),
    sufficiency       = 1/|Q| · Σ_q p_c(x) − p_c(the top q % of x alone),

    where c is the predicted class and the top q % are ⌈q/100 · n⌉ of the n codes of each feature, by descending
    attribution; scores equal to rounding (`TIE`) go by position. A feature never loses its last code: many models
    cannot run without one. Attributions are ranked as they are for either class; one that is evidence for class 1 has
    to be negated by the caller.

    Args:
        model: called as `model(**batch)`; returns a dict with `y_prob` [B, 1] (binary) or [B, C], or with `logit`.
        batch: what the model takes. A feature is a tensor of codes [B, S] or [B, V, C] with 0 for padding, or a tuple
            whose second member is that tensor (PyHealth's `(time, value)`).
        attributions: float, per feature, shaped like its codes; features left out are never touched.
        percentages: Q, each in (0, 100].
        removal: `"delete"`: codes are taken out and the rest moves up, as in the paper; codes [B, S] only. `"pad"`:
            they become padding where they stand, as PyHealth's metrics do; a model that reads one position then
            may find padding there.
        threshold: a binary model predicts class 1 from this probability on.
        target: long [B], the class to follow instead of the predicted one.
        valid: bool per feature, True = real code, shaped like the codes; default: codes that are not 0.

    Returns:
        One row per sample, on the model's device. Padding has no influence on it, as far as it has none on the model.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, an attribution is not finite, or the model's
            output holds no probabilities.

    Source: DeYoung et al. 2020, ERASER, arXiv:1911.03429, section 4 (equations 1 and 2, and their mean over bins).
    """
    _check(batch, attributions, percentages, removal)
    _check_target(target, next(iter(attributions.values())).shape[0])
    masks = {key: _valid(key, batch, valid) for key in attributions}
    kept = {key: versions(kept_entries(scores.to(masks[key].device), masks[key], percentages), masks[key])
            for key, scores in attributions.items()}  # fmt: skip
    with inference(model):
        found = predict_kept(lambda stack: class_probabilities(model(**stack)), batch, kept, Removal(removal))
    if target is None:
        target = predicted_class(found[0], threshold)
    index = target.to(found.device, torch.long)
    followed = found.gather(2, index.expand(len(found), -1)[..., None])[..., 0]
    without, only = (followed[0] - followed[1:]).view(2, len(percentages), -1).transpose(1, 2)
    return Faithfulness(index.clone(), followed[0].clone(), without.contiguous(), only.contiguous())


def versions(kept: Tensor, valid: Tensor) -> Tensor:
    """The intact record, then kept entries [2, Q, B, ...] one after the other: bool [1 + 2Q, B, ...].

    A record that nothing was removed from is the intact one, what is not valid included.
    """
    flat = kept.flatten(0, 1)
    whole = (flat | ~valid).flatten(2).all(2).view(*flat.shape[:2], *[1] * (flat.dim() - 2))
    return torch.cat([torch.ones_like(flat[:1]), flat | whole])


def evaluate(
    model: nn.Module, batches: Iterable[Batch], methods: Mapping[str, Explainer], **options: Any
) -> dict[str, Faithfulness]:
    """The faithfulness of several methods on the same batches.

    Args:
        model, options: as in `faithfulness`.
        batches: dict batches, on the model's device; a PyHealth dataloader, for example.
        methods: name → explainer, called as `explainer(**batch)`; a PyHealth interpreter, for example.

    Returns:
        Per method one row per sample, in the order of the batches.

    Raises:
        ValueError: there is no batch; also as `faithfulness`.
    """
    parts: dict[str, list[Faithfulness]] = {name: [] for name in methods}
    for batch in batches:
        for name, explain in methods.items():
            parts[name].append(faithfulness(model, batch, explain(**batch), **options))
    if not all(parts.values()):
        raise ValueError("evaluate: batches must hold at least one batch, got none")
    return {name: _concatenate(rows) for name, rows in parts.items()}


def _valid(key: str, batch: Batch, valid: Mapping[str, Tensor] | None) -> Tensor:
    codes = values_of(batch[key])
    if valid is None or key not in valid:
        return codes != 0
    if valid[key].shape != codes.shape:
        raise ValueError(
            f"faithfulness: valid[{key!r}] must be shaped like the codes, {list(codes.shape)}, "
            f"got {list(valid[key].shape)}"
        )
    return valid[key].to(codes.device, torch.bool)


def _concatenate(rows: list[Faithfulness]) -> Faithfulness:
    return Faithfulness(
        torch.cat([row.target for row in rows]),
        torch.cat([row.probability for row in rows]),
        torch.cat([row.drop_without for row in rows]),
        torch.cat([row.drop_with_only for row in rows]),
    )


def _check(batch: Batch, attributions: Mapping[str, Tensor], percentages: Sequence[float], removal: str) -> None:
    if removal not in REMOVALS:
        raise ValueError(f"faithfulness: removal must be one of {REMOVALS}, got {removal!r}")
    if not percentages or not all(0 < q <= 100 for q in percentages):
        raise ValueError(f"faithfulness: percentages must be one or more numbers in (0, 100], got {list(percentages)}")
    if not attributions:
        raise ValueError("faithfulness: attributions must name at least one feature of the batch, got none")
    for key, scores in attributions.items():
        if key not in batch:
            raise ValueError(f"faithfulness: attributions name the feature {key!r}; the batch has {sorted(batch)}")
        codes = values_of(batch[key])
        if not isinstance(codes, Tensor) or codes.dim() < 2 or scores.shape != codes.shape:
            wanted = list(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
            raise ValueError(
                f"faithfulness: attributions[{key!r}] must be shaped like the codes, [B, S] or [B, V, C], here "
                f"{wanted}; got {list(scores.shape)}"
            )
        if removal == "delete" and codes.dim() != 2:
            raise ValueError(
                f"faithfulness: removal='delete' needs codes [B, S], got {list(codes.shape)} for {key!r}; "
                "use removal='pad'"
            )
        if not bool(scores.isfinite().all()):
            raise ValueError(f"faithfulness: attributions[{key!r}] must be finite, got NaN or Inf")


def _check_target(target: Tensor | None, batch: int) -> None:
    if target is not None and (target.shape != (batch,) or target.is_floating_point()):
        raise ValueError(f"faithfulness: target must be long [B] = [{batch}], got {target.dtype} {list(target.shape)}")
