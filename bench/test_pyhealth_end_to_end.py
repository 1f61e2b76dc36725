"""PyHealth's Transformer from batch to attributions: PyHealth's interpreter, ours, and the model's forward alone."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import records
from bench.machine import host
from bench.records import time_call
from rollout.bench import end_to_end
from rollout.bench.end_to_end import EMBEDDING, FUSED, STOCK
from rollout.bench.measure import OURS

pytest.importorskip("pyhealth", reason="PyHealth is not installed: pip install 'attention-rollout[pyhealth]'")

from pyhealth.interpret import methods

import rollout
from rollout.pyhealth import AttentionRollout, CheferRelevance
from rollout.pyhealth.merged import attend

BATCH, HEADS, LAYERS = 32, 8, 4
MODEL = {"H": HEADS, "L": LAYERS, "E": EMBEDDING}
CASES = ("S=64", "S=256", "S=512", "lengths 256-512", "log-normal, sorted", "log-normal, unsorted")
SIZES = {"E64 H2 L2": (64, 2, 2), "E128 H8 L4": (128, 8, 4)}
WIDTHS, QUICK_WIDTH = (64, 128, 256, 512, 1024, 2048, 4096), 64
MOST_EXACT = 1024  # wider, PyHealth's own in float64 takes gigabytes
ROWS = 1024  # in a batch of records of different codes
DIFFERENT, REPEATED = "different codes", "codes as often as 1 over their rank"
CLASS_BATCH, OFTEN = 16, 1 / torch.arange(1.0, 1001.0)
CLASS_CASES = [*((DIFFERENT, seq) for seq in (64, 128, 256, 512, 1024)), (REPEATED, 512)]
QUICK, QUICK_BATCH = ("S=64", "log-normal, unsorted"), 8
INTERPRETERS = {STOCK: methods.AttentionRollout, OURS: AttentionRollout}
FORWARDS = {FUSED: end_to_end.fused_forward, "plain forward": end_to_end.plain_forward}


@cache
def model() -> Any:
    return end_to_end.make_model(HEADS, LAYERS, host.DEVICE)


@cache
def exact(case: str, batch: int, forward: bool) -> Tensor:
    """PyHealth's attributions in float64, and of a forward the model's own logits."""
    data = end_to_end.make_batches(case, batch, host.DEVICE)
    return end_to_end.plain_forward(model(), data).double() if forward else end_to_end.exact(model(), data)


@pytest.mark.parametrize("provider", [*INTERPRETERS, *FORWARDS])
@pytest.mark.parametrize("case", CASES)
def test_attribute(case: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    if quick and case not in QUICK:
        pytest.skip("left out of the quick run")
    batch = QUICK_BATCH if quick else BATCH
    data, forward = end_to_end.make_batches(case, batch, host.DEVICE), FORWARDS.get(provider)
    call = partial(forward, model()) if forward else partial(end_to_end.attribute, INTERPRETERS[provider](model()))
    info = {"suite": "PyHealth end to end", "provider": provider, "case": case}
    time_call(measure, partial(call, data), data, MODEL, reference=exact(case, batch, forward is not None), **info)
    end_to_end.drop_maps(model())


@cache
def real(size: str) -> tuple[Any, end_to_end.Batches, Tensor]:
    """A model of a size, the drug records that EHR_ROOT holds, and PyHealth's attributions in float64."""
    found, vocabulary = records.drugs()
    embedding, heads, layers = SIZES[size]
    subject = end_to_end.make_model(heads, layers, host.DEVICE, embedding=embedding, vocabulary=vocabulary)
    data = records.batches_of(found, BATCH)
    return subject, data, end_to_end.exact(subject, data)


@pytest.mark.skipif(records.ROOT is None, reason="EHR_ROOT does not name a folder of MIMIC-IV tables")
@pytest.mark.parametrize("provider", INTERPRETERS)
@pytest.mark.parametrize("size", SIZES)
def test_real_records(size: str, provider: str, measure: Callable[..., None]) -> None:
    """Drug records repeat their codes as no drawn ones do."""
    subject, data, reference = real(size)
    run = partial(end_to_end.attribute, INTERPRETERS[provider](subject), data)
    info = {"suite": "PyHealth on real records", "provider": provider, "case": f"{records.CASE}, {size}"}
    time_call(measure, run, data, {}, reference=reference, **info)
    end_to_end.drop_maps(subject)


@cache
def wide_model() -> Any:
    """A model that reads records of up to 4096 codes, all different."""
    subject = end_to_end.make_model(HEADS, LAYERS, host.DEVICE, vocabulary=2 + max(WIDTHS))
    subject.max_seq_len = max(WIDTHS)
    return subject


def make_records(case: str, seq: int, batch: int) -> end_to_end.Batches:
    """One batch of records of S codes for `wide_model`."""
    generator = torch.Generator().manual_seed(0)
    if case == REPEATED:
        ids = 2 + torch.multinomial(OFTEN.expand(batch, -1), seq, replacement=True, generator=generator)
    else:
        ids = torch.stack([2 + torch.randperm(max(WIDTHS), generator=generator)[:seq] for _ in range(batch)])
    return records.batches_of(list(ids), batch)


@cache
def exact_class(case: str, seq: int) -> Tensor:
    """By the formula in float64, record by record, from the maps and gradients that PyHealth's hooks keep."""
    subject, found = copy.deepcopy(wide_model()).double(), []
    subject.set_attention_hooks(True)
    (data,) = make_records(case, seq, CLASS_BATCH)
    with torch.inference_mode(False), torch.enable_grad():
        for ids in data["codes"].split(1):
            subject(codes=ids, label=data["label"][:1].double())["logit"].sum().backward()
            maps, gradients = zip(*subject.get_attention_layers()["codes"], strict=True)
            call = partial(rollout.attention_rollout, maps, gradients=gradients, method="chefer", backend="reference")
            found.append(call(query=0)[0])
    return torch.cat(found)


@pytest.mark.parametrize("provider", [STOCK, OURS])
@pytest.mark.parametrize(("case", "seq"), CLASS_CASES)
def test_class_specific(case: str, seq: int, provider: str, measure: Callable[..., None], quick: bool) -> None:
    """Chefer's relevance; what PyHealth leaves on the model is dropped, or the next call would start with it."""
    if quick != (seq == CLASS_CASES[0][1]):
        pytest.skip("64 codes are for the quick run")
    interpreter = (methods.CheferRelevance if provider == STOCK else CheferRelevance)(wide_model())
    data = make_records(case, seq, CLASS_BATCH)

    def run() -> Tensor:
        result = end_to_end.attribute(interpreter, data)
        end_to_end.drop_maps(wide_model())
        return result

    info = {"suite": "class-specific relevance", "provider": provider, "case": case}
    time_call(measure, run, data, MODEL, reference=exact_class(case, seq), **info)


@pytest.mark.skipif(host.DEVICE.type != "cpu", reason="rows are merged on a CPU")
@pytest.mark.parametrize("provider", ["F kept", "F made again", "fused attention, Q and K again"])
@pytest.mark.parametrize("width", WIDTHS)
def test_visits(
    width: int, provider: str, measure: Callable[..., None], quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `KEPT_BYTES` of `rollout.pyhealth.merged.attend` comes from: is there a width at which F is not kept?"""
    if quick and width > QUICK_WIDTH:
        pytest.skip("left out of the quick run")
    data = make_records(DIFFERENT, width, max(1, ROWS // width))
    reference = end_to_end.exact(wide_model(), data) if width <= MOST_EXACT else None
    monkeypatch.setattr(attend, "KEPT_BYTES", 0 if provider == "F made again" else 1 << 40)
    run = partial(end_to_end.attribute, AttentionRollout(wide_model()), data)
    layer, whole = wide_model().transformer["codes"], provider.startswith("fused")
    with layer.register_forward_hook(lambda *args: None) if whole else nullcontext():  # a layer with a hook runs whole
        info = {"suite": "one visit to each score", "provider": provider}
        time_call(measure, run, data, MODEL, reference=reference, **info)
