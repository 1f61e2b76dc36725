"""The Triton kernels on a GPU, case by case: ours and the peers on the same inputs, between CUDA events.

Checked against float64: the first sample where S ≤ 1024, the sums of the rows beyond. Without a GPU every case runs
tiny in Triton's interpreter, and nothing is timed (`make gpu-dry-run`).
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from bench.machine import host
from bench.providers.chains import COMPILED, KERNELS, NAIVE, QK, TABLES
from bench.providers.kernels import COLUMNS, FLEX
from bench.providers.oracle import Problem, Shape, make_inputs

ON_CARD = host.DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are timed with --device cuda"
)

BF16, FP32 = torch.bfloat16, torch.float32
OURS = "ours, triton"
LONGEST_CHECKED = 1024  # S that the oracle is for
CHAINS = (NAIVE, COMPILED)  # where their maps fit
MAPS_PEERS = (*CHAINS, "PyHealth's arithmetic")
SUBJECTS = TABLES | {"Q,K": QK | KERNELS, "chefer": {"ours": replace(QK["ours"], method="chefer")}}


C1, C1_QK = Shape(256, 8, 512, 4), Shape(256, 8, 512, 4, 64)
C3, C4 = Shape(8, 16, 4096, 24, 64), Shape(1, 32, 65536, 32, 128)
# What is to be computed, and who is timed beside ours; "given" is the log-sum-exp of a model's own forward.
CASES = {
    "maps-fp32-c1": (Problem("maps", C1, FP32), MAPS_PEERS),
    "maps-bf16-c1": (Problem("maps", C1, BF16), MAPS_PEERS),
    "maps-fp32-c2": (Problem("maps", Shape(64, 12, 512, 12), FP32), MAPS_PEERS),
    "maps-fp32-S197": (Problem("maps", Shape(256, 12, 197, 12), FP32), MAPS_PEERS),
    "maps-fp32-small": (Problem("maps", Shape(8, 12, 197, 12), FP32), MAPS_PEERS),
    "full-fp32-c1": (Problem("full", C1, FP32), MAPS_PEERS),
    "qk-bf16-c1-given": (Problem("Q,K", C1_QK, BF16), (*CHAINS, FLEX)),
    "qk-bf16-c1": (Problem("Q,K", C1_QK, BF16), (*CHAINS, FLEX, COLUMNS)),
    "qk-fp32-c1-given": (Problem("Q,K", C1_QK, FP32), (*CHAINS, FLEX)),
    "qk-bf16-c3-given": (Problem("Q,K", C3, BF16), (FLEX,)),
    "qk-bf16-c3": (Problem("Q,K", C3, BF16), (FLEX, COLUMNS)),
    "qk-bf16-c4-given": (Problem("Q,K", C4, BF16), ()),
    "chefer-bf16-c1": (Problem("chefer", C1_QK, BF16), ()),
}
RUNS = [(name, provider) for name, (_, peers) in CASES.items() for provider in (OURS, *peers)]


def logsumexp(q: Tensor, k: Tensor) -> Tensor:
    """What a model's own fused attention hands over: the natural log-sum-exp of every row, float32 [B, H, S]."""
    attend = torch.ops.aten
    if not ON_CARD:
        return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).logsumexp(-1)
    if q.dtype == BF16:
        return attend._scaled_dot_product_flash_attention(q, k, k)[1]
    return attend._scaled_dot_product_efficient_attention(q, k, k, None, True)[1][..., : q.shape[2]].contiguous()


def ours(problem: Problem, lse: list[Tensor] | None) -> Callable[[], Tensor]:
    """The kernels without the checks of their inputs, the rows asked for on the device already."""
    inputs = make_inputs(problem)
    options: dict[str, Any] = {"backend": "triton", "validate": False}
    if problem.kind != "full":
        options["query"] = torch.zeros(problem.shape.B, dtype=torch.long, device=host.DEVICE)
    if not problem.shape.D:
        return partial(rollout.attention_rollout, inputs["maps"], **options)
    options["method"] = "chefer" if problem.kind == "chefer" else "rollout"
    return partial(rollout.attention_rollout_qk, **inputs, logsumexp=lse, **options)


@pytest.mark.parametrize(("name", "provider"), RUNS)
def test_kernel(name: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    problem, given = CASES[name][0], name.endswith("given")
    shape, whole = problem.shape, problem.shape.S <= LONGEST_CHECKED
    if quick:
        shape = Shape(4, 4, min(shape.S, 200), 3, shape.D) if ON_CARD else Shape(2, 2, 20, 2, min(shape.D, 16))
    problem = replace(problem, shape=shape, compared=int(whole))
    info = SUBJECTS[problem.kind]["ours" if provider == OURS else provider].on(problem)
    inputs = make_inputs(problem)
    lse = [logsumexp(q, k) for q, k in zip(inputs["queries"], inputs["keys"], strict=True)] if given else None
    if provider == OURS:
        info["run"] = ours(problem, lse)
    elif provider == FLEX:
        info["run"] = partial(info["run"], lse)
    if provider in (OURS, FLEX) and shape.D and not given:
        info["flop"] *= 3 if problem.kind == "chefer" else 2  # without the log-sum-exp every score is made twice
    if not whole:
        info["tolerance"] = max(info["tolerance"], 1e-3)
    measure(**info, suite="kernels on a GPU", provider=provider, case=name)
