"""What the other methods cost beside plain rollout: rows from queries and keys, and whole calls on PyHealth's model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rollout.api import attention_rollout_qk
from rollout.bench.chains import PRODUCTS, multiply
from rollout.bench.end_to_end import FUSED, attribute, fused_forward, make_batches, make_model
from rollout.bench.measure import OURS, PLAIN, Row, Runs, compare, does_not_fit
from rollout.bench.settings import Settings

BY_VALUES, BY_GRADIENTS = ("value_norm", "kobayashi"), ("chefer_normalised", "grad_rollout")
METHODS = (*BY_VALUES, *BY_GRADIENTS)
SEQ = 256  # of the lengths asked for the nearest to it is run
CHECKED = 2  # samples; the oracle writes every vector out
ALLOWED, ALLOWED_WHOLE = 1e-5, 1e-4  # max|err| / max|ref| against float64

Inputs = dict[str, list[Tensor]]


def nearest(settings: Settings) -> int:
    """S of the tables."""
    return min(settings.sequences, key=lambda seq: abs(seq - SEQ))


def rows_from_qk(settings: Settings) -> Iterator[Row]:
    """Row 0 by each of `METHODS` and by plain rollout from the same queries and keys, float32."""
    seq, width = nearest(settings), settings.heads * settings.size
    needed = 4 * seq * width * (6 * settings.layers * settings.batch + 4 * seq)
    skipped = does_not_fit(needed, settings.target)
    rows = [Row("methods from Q,K", f"{method}, S={seq}", PLAIN, PRODUCTS, {}, {}, {}) for method in METHODS]
    if skipped:
        yield from (replace(row, skipped=skipped) for row in rows)
        return
    given = make_inputs(settings, seq)
    few = {name: [t if name == "output_weights" else t[:CHECKED] for t in each] for name, each in given.items()}
    for method, row in zip(METHODS, rows, strict=True):
        runs: Runs = {
            PLAIN: partial(first_row, given, PLAIN),
            OURS: partial(first_row, given, method),
            PRODUCTS: partial(multiply, given["queries"], given["keys"]),
        }
        exact = first_row(few, method, "reference").double()
        yield compare(row, runs, exact, {OURS: ALLOWED}, settings.seconds, settings.target, first=CHECKED)


def first_row(given: Inputs, method: str, backend: str = "auto") -> Tensor:
    """Row 0 of a method, [B, S]."""
    read = {"queries", "keys"}
    if method in BY_VALUES:
        read |= {"values", "output_weights", "inputs"}
    elif method in BY_GRADIENTS:
        read |= {"values", "output_gradients"}
    taken: dict[str, Any] = {name: given[name] for name in read}
    return attention_rollout_qk(query=0, method=method, backend=backend, **taken)


def make_inputs(settings: Settings, seq: int) -> Inputs:
    """What the methods read of L layers, random, from one seed."""
    heads = settings.batch, settings.heads, seq, settings.size
    width = settings.heads * settings.size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("queries", "keys", "values", "output_gradients"), heads)
    shapes |= {"output_weights": (settings.heads, settings.size, width), "inputs": (settings.batch, seq, width)}
    source = torch.Generator(settings.target).manual_seed(seq)
    return {
        name: [torch.randn(shape, generator=source, device=settings.target) for _ in range(settings.layers)]
        for name, shape in shapes.items()
    }


def rows_of_whole_calls(settings: Settings) -> Iterator[Row]:
    """Samples a second of PyHealth's Transformer, from batch to attributions, by each method and by plain rollout."""
    model, case = make_model(settings.heads, settings.layers, settings.target), f"S={nearest(settings)}"
    batches = make_batches(case, settings.batch, settings.target)
    exact_model = copy.deepcopy(model).double()
    exact_batches = [{**batch, "label": batch["label"].double()} for batch in batches]
    plain, *others = _interpreters().items()
    for method, make in others:
        runs: Runs = {
            PLAIN: partial(attribute, plain[1](model), batches),
            OURS: partial(attribute, make(model), batches),
            FUSED: partial(fused_forward, model, batches),
        }
        row = Row("methods, PyHealth's Transformer", f"{method}, {case}", PLAIN, FUSED, {}, {}, {})
        row = replace(row, samples=sum(len(batch["codes"]) for batch in batches))
        exact = attribute(make(exact_model), exact_batches)
        yield compare(row, runs, exact, {OURS: ALLOWED_WHOLE}, settings.seconds, settings.target)


def _interpreters() -> dict[str, Callable[[Any], Any]]:
    from rollout.pyhealth import AttentionRollout, FrozenGradient, GradientRollout

    made: dict[str, Callable[[Any], Any]] = {PLAIN: AttentionRollout}
    made |= {method: partial(AttentionRollout, method=method) for method in BY_VALUES}
    made |= {method: partial(GradientRollout, method=method) for method in BY_GRADIENTS}
    return made | {"frozen_gradient": FrozenGradient}
