"""The Triton kernels on a GPU, case by case: ours and the peers on the same maps, between CUDA events.

Checked against float64: the first sample where S ≤ 1024, the sums of the rows beyond. Without a GPU every case runs
tiny in Triton's interpreter, and nothing is timed (`make gpu-dry-run`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from bench.machine import host
from bench.providers import oracle
from bench.providers.chains import COMPILED, FULL, KERNELS, MAPS, NAIVE, QK, Shape
from bench.providers.kernels import COLUMNS, FLEX

ON_CARD = host.DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are timed with --device cuda"
)

BF16, FP32 = torch.bfloat16, torch.float32
OURS = "ours, triton"
PEERS = (NAIVE, COMPILED, "PyHealth's arithmetic")
# Of max|err|/max|ref|; 16-bit Q,K products are exact too.
BOUNDS = {"maps": 1e-6, "full": 1e-6, "qk": 3e-6, "chefer": 3e-6}
LONGEST_CHECKED = 1024  # S that the oracle is for


@dataclass(frozen=True)
class Case:
    """`kind` is maps, full, qk, or chefer; `given` hands the log-sum-exp over."""

    kind: str
    shape: Shape
    dtype: torch.dtype
    given: bool = False


CASES = {
    "maps-fp32-c1": Case("maps", Shape(256, 8, 512, 4), FP32),
    "maps-bf16-c1": Case("maps", Shape(256, 8, 512, 4), BF16),
    "maps-fp32-c2": Case("maps", Shape(64, 12, 512, 12), FP32),
    "maps-fp32-S197": Case("maps", Shape(256, 12, 197, 12), FP32),
    "maps-fp32-small": Case("maps", Shape(8, 12, 197, 12), FP32),
    "full-fp32-c1": Case("full", Shape(256, 8, 512, 4), FP32),
    "qk-bf16-c1-given": Case("qk", Shape(256, 8, 512, 4, 64), BF16, given=True),
    "qk-bf16-c1": Case("qk", Shape(256, 8, 512, 4, 64), BF16),
    "qk-fp32-c1-given": Case("qk", Shape(256, 8, 512, 4, 64), FP32, given=True),
    "qk-bf16-c3-given": Case("qk", Shape(8, 16, 4096, 24, 64), BF16, given=True),
    "qk-bf16-c3": Case("qk", Shape(8, 16, 4096, 24, 64), BF16),
    "qk-bf16-c4-given": Case("qk", Shape(1, 32, 65536, 32, 128), BF16, given=True),
    "chefer-bf16-c1": Case("chefer", Shape(256, 8, 512, 4, 64), BF16),
}
SUBJECTS = {  # ours does the work of ours on any device
    "maps": MAPS | {OURS: MAPS["ours"]}, "full": FULL | {OURS: FULL["ours"]}, "qk": QK | KERNELS | {OURS: QK["ours"]},
    "chefer": {OURS: replace(QK["ours"], method="chefer")},
}  # fmt: skip


def peers(case: Case) -> tuple[str, ...]:
    """Who is timed beside ours: of the longest rows nobody, and no naive chain where its maps would not fit."""
    if case.kind == "chefer":
        return ()
    if case.kind != "qk":
        return PEERS
    if case.shape.S > 2**15:
        return ()
    naive = (NAIVE, COMPILED) if case.shape.S <= LONGEST_CHECKED else ()
    return (*naive, FLEX, *([COLUMNS] if case.dtype == BF16 and not case.given else []))


RUNS = [(name, provider) for name, case in CASES.items() for provider in (OURS, *peers(case))]


@lru_cache(1)
def inputs(case: Case) -> list[list[Tensor]]:
    """L layers of maps, or of queries and of keys; of values and of gradients at the attention's output beside them."""
    torch.manual_seed(0)
    b, h, s, layers, d = case.shape.B, case.shape.H, case.shape.S, case.shape.L, case.shape.D
    if case.kind in ("maps", "full"):
        scores = (torch.randn(b, h, s, s, device=host.DEVICE) for _ in range(layers))
        return [[each.mul_(2).softmax(-1).to(case.dtype) for each in scores]]
    kinds = 4 if case.kind == "chefer" else 2
    return [
        [torch.randn(b, h, s, d, device=host.DEVICE, dtype=case.dtype) for _ in range(layers)] for _ in range(kinds)
    ]


def logsumexp(q: Tensor, k: Tensor) -> Tensor:
    """What a model's own fused attention hands over: the natural log-sum-exp of every row, float32 [B, H, S]."""
    attend = torch.ops.aten
    if not ON_CARD:
        return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).logsumexp(-1)
    if q.dtype == BF16:
        return attend._scaled_dot_product_flash_attention(q, k, k)[1]
    return attend._scaled_dot_product_efficient_attention(q, k, k, None, True)[1][..., : q.shape[2]].contiguous()


def ours(case: Case, given: list[list[Tensor]], lse: list[Tensor] | None) -> Callable[[], Tensor]:
    if case.kind == "full":
        return lambda: rollout.attention_rollout(*given, backend="triton", validate=False)
    rows = torch.zeros(len(given[0][0]), dtype=torch.long, device=host.DEVICE)
    if case.kind == "maps":
        return lambda: rollout.attention_rollout(*given, query=rows, backend="triton", validate=False)
    options = {"query": rows, "logsumexp": lse, "backend": "triton", "validate": False} | by_gradients(case, given[2:])
    return lambda: rollout.attention_rollout_qk(*given[:2], **options)


def by_gradients(case: Case, handed_on: list[list[Tensor]]) -> dict[str, Any]:
    """The arguments of `attention_rollout_qk` for a gradient-weighted method."""
    if case.kind != "chefer":
        return {}
    return {"values": handed_on[0], "output_gradients": handed_on[1], "method": case.kind}


def reference(case: Case, method: str, long: bool) -> tuple[Tensor, Callable[[Tensor], Tensor], float]:
    """What is checked, of what part of the result, and how closely."""
    if long:
        ones = torch.ones(case.shape.B, dtype=torch.float64, device=host.DEVICE)
        return ones, lambda row: row.double().sum(-1), 1e-3
    first = [[layer[:1] for layer in layers] for layers in inputs(case)]
    query = None if case.kind == "full" else 0
    if case.kind == "chefer":
        options = by_gradients(case, first[2:])
        exact = rollout.attention_rollout_qk(*first[:2], query=0, backend="reference", **options).double()
    else:
        exact = oracle.from_qk(*first, method) if case.kind == "qk" else oracle.from_maps(*first, method, query)
    return exact, lambda result: result[:1], BOUNDS[case.kind]


@pytest.mark.parametrize(("name", "provider"), RUNS)
def test_kernel(name: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    case = CASES[name]
    long = case.shape.S > LONGEST_CHECKED
    if quick:
        small = Shape(4, 4, min(case.shape.S, 200), 3, case.shape.D) if ON_CARD else Shape(2, 2, 20, 2, 16)
        case = replace(case, shape=small)
    given = inputs(case)
    subject = SUBJECTS[case.kind][provider]
    exact, part, allowed = reference(case, str(subject.method), long)
    lse = [logsumexp(q, k) for q, k in zip(*given, strict=True)] if case.given else None
    info = subject.on(case.shape, *given)
    if provider == OURS:
        info |= {"run": ours(case, given, lse), "tolerance": allowed}
    elif case.dtype == BF16:
        info["tolerance"] = 5e-2  # the peers add in the maps' own dtype
    if provider == FLEX:
        info["run"] = partial(info["run"], lse)
    if provider in (OURS, FLEX) and case.kind in ("qk", "chefer") and not case.given:
        info["flop"] *= 2 if case.kind == "qk" else 3  # without the log-sum-exp every score is made twice
    measure(**info, reference=exact, part=part, suite="kernels on a GPU", provider=provider, case=name)
