"""The Triton kernels on a GPU, case by case: ours and the peers on the same maps, between CUDA events.

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

from bench.machine import host
from bench.providers.chains import COMPILED, KERNELS, NAIVE, QK, TABLES
from bench.providers.kernels import COLUMNS, FLEX
from bench.providers.oracle import Problem, make_inputs

ON_CARD = host.DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are timed with --device cuda"
)

BF16 = torch.bfloat16
OURS = "ours, triton"
LONGEST_CHECKED = 1024  # S that the oracle is for
CHAINS = (NAIVE, COMPILED)  # where their maps fit
MAPS_PEERS = (*CHAINS, "PyHealth's arithmetic")
CHEFER = replace(QK["ours"], run=partial(QK["ours"].run, method="chefer"), method="chefer")
SUBJECTS = TABLES | {"Q,K": QK | KERNELS, "chefer": {"ours": CHEFER}}
C1, C3, C4 = (256, 8, 512, 4), (8, 16, 4096, 24), (1, 32, 65536, 32)  # B, H, S, L
# What is to be computed, and who is timed beside ours; "given" is the log-sum-exp of a model's own forward.
CASES = {
    "maps-fp32-c1": (Problem("maps", *C1), MAPS_PEERS),
    "maps-bf16-c1": (Problem("maps", *C1, dtype=BF16), MAPS_PEERS),
    "maps-fp32-c2": (Problem("maps", 64, 12, 512, 12), MAPS_PEERS),
    "maps-fp32-S197": (Problem("maps", 256, 12, 197, 12), MAPS_PEERS),
    "maps-fp32-small": (Problem("maps", 8, 12, 197, 12), MAPS_PEERS),
    "full-fp32-c1": (Problem("full", *C1), MAPS_PEERS),
    "qk-bf16-c1-given": (Problem("Q,K", *C1, D=64, dtype=BF16), (*CHAINS, FLEX)),
    "qk-bf16-c1": (Problem("Q,K", *C1, D=64, dtype=BF16), (*CHAINS, FLEX, COLUMNS)),
    "qk-fp32-c1-given": (Problem("Q,K", *C1, D=64), (*CHAINS, FLEX)),
    "qk-bf16-c3-given": (Problem("Q,K", *C3, D=64, dtype=BF16), (FLEX,)),
    "qk-bf16-c3": (Problem("Q,K", *C3, D=64, dtype=BF16), (FLEX, COLUMNS)),
    "qk-bf16-c4-given": (Problem("Q,K", *C4, D=128, dtype=BF16), ()),
    "chefer-bf16-c1": (Problem("chefer", *C1, D=64, dtype=BF16), ()),
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


@pytest.mark.parametrize(("name", "provider"), RUNS)
def test_kernel(name: str, provider: str, measure: Callable[..., None], quick: bool) -> None:
    problem, given = CASES[name][0], name.endswith("given")
    problem = replace(problem, compared=int(problem.S <= LONGEST_CHECKED), drawn_on=host.DEVICE.type)
    if quick and ON_CARD:
        problem = replace(problem, B=4, H=4, S=min(problem.S, 200), L=3)
    elif quick:
        problem = replace(problem, B=2, H=2, S=20, L=2, D=min(problem.D, 16))
    info = SUBJECTS[problem.kind]["ours" if provider == OURS else provider].on(problem)
    options: dict[str, Any] = {}
    if given and provider in (OURS, FLEX):
        inputs = make_inputs(problem)
        options["logsumexp"] = [logsumexp(q, k) for q, k in zip(inputs["queries"], inputs["keys"], strict=True)]
    if provider == OURS:
        options |= {"backend": "triton", "validate": False}
        if problem.kind != "full":
            options["query"] = torch.zeros(problem.B, dtype=torch.long, device=host.DEVICE)
    info["run"] = partial(info["run"], **options)
    if provider in (OURS, FLEX) and problem.D and not given:
        info["flop"] *= 3 if problem.kind == "chefer" else 2  # without the log-sum-exp every score is made twice
    if problem.compared == 0:
        info["tolerance"] = max(info["tolerance"], 1e-3)
    measure(**info, suite="kernels on a GPU", provider=provider, case=name)
