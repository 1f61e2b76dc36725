"""The codes that draw the most relevance, per feature, and per label."""

from typing import Any

import polars as pl

from rollout.report.bounds import CODES, FEATURES, LABEL_CODES, LABELS
from rollout.results.attributions import CohortAttributions


def codes(cohort: CohortAttributions) -> dict[str, Any]:
    """Tables of the leading codes by lift; codes in few records left out, the least number of records being shown."""
    least = minimum_records(cohort.samples)
    table = cohort.top_codes(by="lift", minimum_records=least, k=CODES)
    features = cohort.features[:FEATURES]
    highest = max(table["lift"].max() or 0.0, 1.0)
    return {
        "minimum_records": least,
        "shown": CODES,
        "read_position": cohort.read_position,
        "highest": highest,
        "coded": any(cohort.granularity[feature] != "step" for feature in features),
        "features": [
            {"name": feature, "rows": rows, "granularity": cohort.granularity[feature]}
            for feature in features
            if (rows := table.filter(pl.col("feature") == feature).rows(named=True))
        ],
        "without": [
            feature
            for feature in features
            if cohort.granularity[feature] in ("code", "visit") and feature not in set(table["feature"])
        ],
        "whole": [feature for feature in features if cohort.granularity[feature] == "feature"],
        "by_label": _by_label(cohort, features),
        "label_word": "class" if cohort.label_kind == "multiclass" else "label",
        "label_shown": LABEL_CODES,
    }


def minimum_records(samples: int) -> int:
    """1 % of the samples, but 5 at least; fewer in a cohort too small for that."""
    return min(max(5, round(0.01 * samples)), max(1, samples // 4))


def _by_label(cohort: CohortAttributions, features: list[str]) -> list[dict[str, Any]]:
    """Feature → label → its leading codes, for the commonest labels."""
    known = cohort.labels().head(LABELS)
    if known.height < 2:
        return []
    chosen = sorted(known["label"].to_list())
    sizes, names = (dict(known.select("label", value).rows()) for value in ("samples", "name"))
    least = minimum_records(int(known["samples"].min()))  # type: ignore[arg-type]
    table = cohort.top_codes(by="lift", label=chosen, per_label=True, minimum_records=least, k=LABEL_CODES)
    found = []
    for feature in features:
        part = table.filter(pl.col("feature") == feature)
        labels = [
            {
                "label": label,
                "name": names[label],
                "samples": sizes[label],
                "rows": part.filter(pl.col("label") == label).rows(named=True),
            }
            for label in chosen
        ]
        if part.height:
            found.append({"name": feature, "labels": labels, "minimum_records": least})
    return found
