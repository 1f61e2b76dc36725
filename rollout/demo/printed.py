"""What a demo run prints."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import polars as pl

from rollout.results.ranking import planted_found
from rollout.results.told import told
from rollout.runfile.file import RUN

if TYPE_CHECKING:
    from rollout.demo.run import Demo

FEW_POSITIVES = 20


def report(demo: "Demo", top: int = 8) -> str:
    """Return the table a run prints."""
    written = [
        f"Written to {demo.output}; look at report.html there",
        f"rollout attribute {demo.output / RUN} attributes the cohort again",
    ]
    return "\n".join([*_numbers(demo), "", *_leaders(demo, top), "", *_score(demo), *written])


def _numbers(demo: "Demo") -> Iterator[str]:
    ours, stock = demo.race.rates
    cohort = demo.cohort
    pairs = [
        ("samples (patients)", f"{demo.samples:,} ({demo.patients:,}), {demo.positive:.1%} positive"),
        ("tokens", f"{cohort.tokens:,}"),
        ("test AUROC", f"{demo.test_auroc:.3f} ({demo.test_positives} positive; epoch {demo.trained.epoch} kept)"),
        ("attention rollout, ours", f"{ours:,.0f} patients/s"),
        ("PyHealth's interpreter, same batches", f"{stock:,.0f} patients/s"),
        ("ratio", f"{ours / stock:.1f}×"),
        ("largest difference between the two", f"{demo.race.difference:.1e}"),
        ("whole cohort, rows written", f"{cohort.done / cohort.elapsed:,.0f} samples/s"),
        ("seconds", ", ".join(f"{name} {spent:.0f}" for name, spent in demo.seconds.items())),
    ]
    width = max(len(name) for name, _ in pairs)
    return (f"{name:<{width}}  {value}" for name, value in pairs)


def _leaders(demo: "Demo", top: int) -> Iterator[str]:
    yield "Codes that draw the most relevance, per feature" + (" (★ planted)" if demo.planted else "")
    yield f"  {'':2}{'code':<12} {'effect ± 2 se':>15} {'lift':>6} {'records':>8}  name"
    for feature in demo.ranking["feature"].unique(maintain_order=True):
        yield f"  {feature}"
        known = set(demo.planted.get(feature, ()))
        for row in demo.ranking.filter(pl.col("feature") == feature).head(top).iter_rows(named=True):
            mark = "★ " if row["code"] in known else "  "
            name = demo.names.get(feature, {}).get(row["code"], "")
            effect = f"{row['effect']:.2f} ± {2 * row['error']:.2f}"
            yield f"  {mark}{row['code']:<12} {effect:>15} {row['lift']:>6.1f} {row['records']:>8}  {name[:60]}"


def _score(demo: "Demo") -> Iterator[str]:
    if demo.test_positives < FEW_POSITIVES:
        yield (
            f"Note: the test patients have {demo.test_positives} positive samples, too few to tell whether the model "
            "predicts anything; its relevance then says where it looks, not what matters."
        )
    if demo.planted:
        found = planted_found(demo.ranking, demo.planted)
        parts = ", ".join(f"{feature} {hit} of {k}" for feature, (hit, k) in found.items())
        total, places = (sum(column) for column in zip(*found.values(), strict=True))
        yield f"Planted codes in the top k of their feature (k = planted codes there): {total} of {places} ({parts})"
    yield ""
    tested = f"{demo.evaluated.samples:,} samples of test patients"
    yield f"Is it true? {tested}, the codes that a method ranks first taken out, or left alone"
    if demo.planted:
        yield "(recall: of a record's planted codes, those among as many top codes)"
    yield told(demo.evaluated)
    yield ""
