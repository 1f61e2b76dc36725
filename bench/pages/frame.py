"""A record as one frame, a row a result: what every page, plot and target selects from."""

import json
from typing import Any

import polars as pl

from bench.machine.record import Record, Result, Suite
from bench.providers.chains import CHEFER, GILDENBLAT, NAIVE, PRODUCTS, READ
from bench.suites import SUITES
from rollout.bench.end_to_end import FUSED, STOCK
from rollout.bench.measure import Ceilings

# Who the others are measured against, the first that a group has; and the work that none can leave out.
BASELINES = (NAIVE, STOCK, GILDENBLAT, CHEFER, "one worker", "fused forward", "plain forward")
FLOORS = (READ, PRODUCTS, FUSED)
ALIKE = ("suite", "case", "method", "shape", "dtype")  # results that agree in these may be compared

SCHEMA: dict[str, type[pl.DataType]] = {
    **dict.fromkeys((*ALIKE, "provider", "cache", "bound"), pl.String),
    **dict.fromkeys(("S", "L", "rounds", "samples"), pl.Int64),
    **dict.fromkeys(("median", "q1", "q3", "copy", "reached", "error", "bookkeeping"), pl.Float64),
    **dict.fromkeys(("bytes", "flop", "inputs", "peak_extra_bytes", "peak_bytes"), pl.Float64),
    "stages": pl.Object,
}


def frame_of(record: Record) -> pl.DataFrame:
    """The results suite by suite: methods by name, groups as they were run, and in a group the baseline first.

    A field that a result does not have is null.
    """
    suites = {name: record["suites"][name] for name in SUITES if name in record["suites"]}
    rows = [{"suite": name} | _row(suite, each) for name, suite in suites.items() for each in suite["results"]]
    median, provider, place = pl.col("median"), pl.col("provider"), pl.col("place")
    counted = pl.col("samples").is_not_null().all().over(ALIKE)  # all to be compared say how many samples they did
    reckoned = pl.DataFrame(rows, schema=SCHEMA).with_columns(
        low=100 * (pl.col("q1") / median - 1),  # where the middle half of the rounds lies around the median, percent
        high=100 * (pl.col("q3") / median - 1),
        per_second=pl.col("samples") / median,
        cost=median / pl.when(counted).then("samples").otherwise(1),  # seconds of a sample; else of a call
    )
    compared = reckoned.with_row_index("place").with_columns(
        floor=first_of(FLOORS, "provider"),  # and what part of a result's time it takes:
        share=pl.when(first_of(FLOORS, "provider") != provider).then(ratio(*FLOORS)),
        speed_up=pl.when(first_of(BASELINES, "provider") != provider).then(ratio(*BASELINES)),
    )
    method, baseline = pl.col("method").fill_null(""), provider.is_in(BASELINES)
    return compared.sort(place.min().over("suite"), method, place.min().over(ALIKE), ~baseline, place)


def _row(suite: Suite, result: Result) -> dict[str, Any]:
    """The fields of a result, its sizes, and `bound` and `reached`: which ceiling binds it, and what part of that."""
    shape, taken = result.get("shape", {}), result["seconds"]
    own: dict[str, Any] = {"shape": json.dumps(shape, sort_keys=True)}
    if suite.get("ceilings"):
        limits = Ceilings(**suite["ceilings"])
        binding = limits.binding(result.get("bytes", 0), result.get("flop", 0), taken["median"])
        own |= {"copy": limits.copy} | dict(zip(("bound", "reached"), binding or (), strict=False))
    return shape | taken | result | own


def first_of(providers: tuple[str, ...], field: str) -> pl.Expr:
    """For each result, what the first of these providers that there is says among the results alike."""
    return pl.coalesce(pl.col(field).filter(provider=name).last().over(ALIKE) for name in providers)


def ratio(*providers: str, field: str = "cost") -> pl.Expr:
    """What the first of these providers takes over what each result takes: of `cost`, how many times as fast it is."""
    return first_of(providers, field) / pl.col(field)
