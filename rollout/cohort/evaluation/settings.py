"""How attributions are scored: the settings of an evaluation, each checked before any work."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.cohort.rows import Decoder
from rollout.cohort.settings import check_count
from rollout.data.classes import did_you_mean
from rollout.evaluate import PERCENTAGES
from rollout.evaluate.removal import REMOVALS

METRICS = ("eraser", "pyhealth")
KINDS = ("binary", "multiclass", "multilabel")
"""Of predictions. Of several labels the most probable is followed."""

Planted = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Scoring:
    """How attributions are scored; see `rollout.evaluate_cohort`.

    Attributes:
        metric: `"eraser"` or `"pyhealth"`.
        shares: In percent, each in (0, 100], in order.
        replacement: What stands in place of removed codes: one of `REMOVALS`.
        threshold: Of two classes, 1 is predicted from this probability on; PyHealth's metric leaves out samples below.
        seed: Of random rankings and of what is drawn in place of codes.
        leave_one_out: Most codes of a record of which each is taken out alone; 0: none is.
        planted: Feature → the codes that drive the outcome, where that is known.
        kind: Of predictions; None: not known.
    """

    metric: str = "eraser"
    shares: tuple[float, ...] = PERCENTAGES
    replacement: str = "delete"
    threshold: float = 0.5
    seed: int = 0
    leave_one_out: int = 0
    planted: Planted | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        _check_word("metric", self.metric, METRICS)
        _check_word("replacement", self.replacement, REMOVALS)
        if not self.shares or not all(_is_number(share) and 0 < share <= 100 for share in self.shares):
            raise ValueError(
                f"evaluate_cohort: shares must be one or more numbers in (0, 100], in percent, got {list(self.shares)}"
            )
        if list(self.shares) != sorted(set(self.shares)):
            raise ValueError(f"evaluate_cohort: shares must be in order and each once, got {list(self.shares)}")
        if not _is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ValueError(f"evaluate_cohort: threshold must be a number from 0 to 1, got {self.threshold!r}")
        check_count("seed", self.seed, "evaluate_cohort: seed")
        check_count("leave_one_out", self.leave_one_out, "evaluate_cohort: leave_one_out")
        if self.metric == "pyhealth" and self.replacement != "pad":
            raise ValueError(
                "evaluate_cohort: metric='pyhealth' makes codes padding where they stand: replacement must be 'pad' or "
                f"left out, got {self.replacement!r}"
            )

    def check_features(self, decoders: Mapping[str, Decoder]) -> None:
        """Refuse what the features of a dataset cannot have.

        Raises:
            ValueError: codes are to be drawn for a feature that has none, or padded where no id is padding; planted
                codes are of features or codes there are not.
        """
        numeric = [feature for feature, decoder in decoders.items() if not decoder.has_ids]
        if self.replacement == "resample" and numeric:
            raise ValueError(
                f"evaluate_cohort: replacement='resample' draws other codes, and {numeric[0]!r} has no ids of codes; "
                "use 'pad'"
            )
        unpadded = [feature for feature, decoder in decoders.items() if decoder.has_ids and decoder.padding is None]
        if self.replacement != "resample" and unpadded:
            raise ValueError(
                f"evaluate_cohort: every id of {unpadded[0]!r} is a code (padding_ids), so none can stand for a code "
                "that is gone; use replacement='resample'"
            )
        for feature, codes in (self.planted or {}).items():
            if feature not in decoders:
                raise ValueError(
                    f"evaluate_cohort: planted names the feature {feature!r}; the dataset has {sorted(decoders)}"
                )
            known = decoders[feature].codes
            if known is None or not set(codes) & set(known.to_pylist()):
                raise ValueError(f"evaluate_cohort: none of the planted codes of {feature!r} is in its vocabulary")

    def described(self, planted: str | None) -> dict[str, Any]:
        """As it stands in a manifest; `planted` is a digest of the codes."""
        plain = {name: getattr(self, name) for name in ("metric", "replacement", "seed", "leave_one_out")}
        shares = [float(share) for share in self.shares]
        return {**plain, "threshold": float(self.threshold), "shares": shares, "planted": planted}


def prediction_kind(model: Any, dataset: Any) -> str | None:
    """What a PyHealth model predicts: one of `KINDS`; None where that is not known.

    Raises:
        ValueError: it is a number: there is no class whose probability could drop.
    """
    schema = getattr(getattr(model, "dataset", dataset), "output_schema", None) or {}
    resolve: Callable[[Any], str] | None = getattr(model, "_resolve_mode", None)
    modes = [resolve(entry) if resolve is not None else str(entry) for entry in list(schema.values())[:1]]
    if "regression" in modes:
        raise ValueError(
            "evaluate_cohort: the model predicts a number (regression): there is no class whose probability could "
            "drop, and faithfulness to a number is not defined here"
        )
    return modes[0] if modes and modes[0] in KINDS else None


def _check_word(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"evaluate_cohort: {name} must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(value, allowed)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
