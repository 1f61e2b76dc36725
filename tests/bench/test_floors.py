"""No target of a kernel on a GPU asks for more than the card can do at the precision that is shipped.

Floors from published peaks of an H200 (SXM, dense): a target past them is a mistake in the target, whatever a kernel
does. What is asked is turned into the time of one call; bytes and operations are those of the case it is timed on.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import test_gpu
from bench.pages.frame import frame_of
from bench.pages.targets import GPU, KERNELS, TARGETS, Target, judge
from bench.providers.chains import TABLES
from bench.providers.oracle import Problem
from rollout_kernels import _triton, ops
from rollout_kernels._triton import launch

BANDWIDTH, BF16, TF32 = 4.8e12, 989e12, 494e12  # bytes and operations a second, published
EXPONENTIALS = 3.87e12  # a second: 16 a clock on each of 132 multiprocessors, at 1.83 GHz
# How long one operation takes, by the precision it is asked for in.
SECONDS_OF_FLOP = {"": 0.0, "bf16": 1 / BF16, "bf16x3": 3 / BF16, "bf16x6": 6 / BF16, "tf32x3": 3 / TF32}
PEAKS = {"read": BANDWIDTH, "copy": BANDWIDTH, "matmul": TF32, "cache": 50 * 2**20}

FROM_CARD = [target for target in TARGETS if target.suite == KERNELS and target.device == GPU]


def work(target: Target) -> tuple[Problem, int, int]:
    """The case, and the bytes read and operations multiplied that its rates are counted in."""
    case, _ = test_gpu.CASES[target.case]
    entries, flop = TABLES[case.kind]["ours"].work(case)
    return case, entries * case.dtype.itemsize, flop


def asked_seconds(target: Target) -> float:
    """The longest time of one call with which the target is met: that at which its own judge is just content."""
    _, size, flop = work(target)

    def verdict(seconds: float) -> str:
        found = {"provider": "ours, triton", "case": target.case, "bytes": size, "flop": flop,
                 "seconds": {"median": seconds}}  # fmt: skip
        return judge(target, frame_of({"suites": {KERNELS: {"results": [found], "ceilings": PEAKS}}}))[1]

    fast, slow = 1e-9, 1e3
    assert (verdict(fast), verdict(slow)) == ("met", "missed")
    for _ in range(80):
        middle = (fast * slow) ** 0.5
        fast, slow = (middle, slow) if verdict(middle) == "met" else (fast, middle)
    return fast


def floor_seconds(target: Target) -> float:
    """What no kernel of this precision can beat, from the target's case.

    Rows read each map once; rows from Q and K take one exponential a score, which the tensor cores may overlap. The
    full matrix is made in launches that follow one another: maps fused into M_l, then M_l·R, each read and written.
    """
    case, size, flop = work(target)
    products = flop * SECONDS_OF_FLOP[target.precision]
    if case.kind == "maps":
        return size / BANDWIDTH
    if case.kind == "Q,K":
        scores = flop / (2 * case.D)
        return max(products, scores / EXPONENTIALS)
    matrix = 4 * case.B * case.S**2
    moved = size + (case.L + 3 * (case.L - 1)) * matrix
    return moved / BANDWIDTH + products


@pytest.mark.parametrize("target", FROM_CARD, ids=lambda target: target.case)
def test_a_target_is_not_below_its_floor(target: Target) -> None:
    assert asked_seconds(target) >= floor_seconds(target), (asked_seconds(target), floor_seconds(target))


def test_every_target_on_kernels_names_its_case_and_precision() -> None:
    assert FROM_CARD
    for target in FROM_CARD:
        case, _ = test_gpu.CASES[target.case]
        assert (target.precision != "") == (case.kind != "maps")


def test_a_target_below_its_floor_is_found() -> None:
    """80 % of copy bandwidth on the maps alone leaves no time for the products, at six of bfloat16 each; a float32
    product as three would be half of that, which is not what is shipped."""
    full = next(target for target in FROM_CARD if target.case == "full-fp32-c1")
    assert asked_seconds(full._replace(least=80)) < floor_seconds(full)
    products = floor_seconds(full) - floor_seconds(full._replace(precision=""))
    assert products == pytest.approx(1.25e-3, rel=0.01)
    assert products == pytest.approx(
        2 * (floor_seconds(full._replace(precision="bf16x3")) - floor_seconds(full) + products)
    )


def test_the_precision_named_is_the_one_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(_triton, "full_chain", lambda *arguments: asked.extend(arguments))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _triton.full_from_maps(ops.maps_problem([torch.ones(1, 1, 8, 8)] * 2, validate=False))
    named = next(target.precision for target in FROM_CARD if target.case == "full-fp32-c1")
    assert [each for each in asked if isinstance(each, str)] == [named]
    assert launch.scores_launch("columns", torch.float32, 64, "sm_90").precision == "bf16x6"
