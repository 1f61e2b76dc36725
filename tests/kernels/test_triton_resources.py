"""What a multiprocessor holds of every shipped launch, and what is left of the order that programs rely on.

Compiled ahead of time with no device, like test_triton_compile.py, and run with it over releases of Triton: minimums
here hold on each of them. How programs wait for one another is tested in test_triton_schedules.py; here, that the
compiler keeps it: a barrier before each release, a barrier after each acquire, what others write read past the
first-level cache.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rollout_kernels._triton import HEAD_DIMENSIONS, launch
from rollout_kernels._triton.qk_columns import columns_kernel
from rollout_kernels._triton.rows_split import rows_split_kernel
from tests.support.mutants import mutated
from tests.support.ptx_order import operations, out_of_order, shared_loads
from tests.support.triton_aot import Compiled, compile_kernel, tool
from tests.support.triton_launches import (
    DTYPES,
    MAP_FORMS,
    QK_FORMS,
    SCORE_KERNELS,
    TABLES,
    map_constants,
    score_constants,
)

pytestmark = pytest.mark.skipif(
    tool("cuobjdump") is None or tool("nvdisasm") is None, reason="cuobjdump and nvdisasm are not at hand"
)
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Programs that a multiprocessor of sm_90 holds at least, by kernel, dtype and head dimension, in the heaviest form.
PROGRAMS = {
    ("columns", "bf16"): (4, 4, 3, 2),
    ("columns", "fp32"): (1, 1, 1, 1),
    ("gradients", "bf16"): (3, 3, 2, 2),
    ("gradients", "fp32"): (1, 1, 1),
    ("logsumexp", "bf16"): (1, 1, 1, 1),
    ("logsumexp", "fp32"): (5, 5, 3, 2),
}
# Bytes that must be on their way to a multiprocessor to keep the memory of an H200 busy: 4.8 TB/s over 132
# multiprocessors, times some 0.8 µs.
BYTES_IN_FLIGHT = 28 * 1024


def sampled(cases: list[tuple], fast: set[int]) -> list:
    """Cases as parameters, slow unless their last entry, the capability, is one of `fast`."""
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if case[-1] in fast else [pytest.mark.slow])
        for case in cases
    ]


def rows(form: str, dtype: str, seq: int, capability: int) -> Compiled:
    config = launch.rows_launch(seq, DTYPES[dtype], form == "gradients", name=TABLES[capability])
    return compile_kernel(rows_split_kernel, map_constants(form, DTYPES[dtype], config), capability, config.options)


def scores(kernel: str, form: str, dtype: str, size: int, capability: int) -> Compiled:
    config = launch.scores_launch(kernel, DTYPES[dtype], size, TABLES[capability])
    constants = score_constants(kernel, form, DTYPES[dtype], size, config)
    return compile_kernel(SCORE_KERNELS[kernel], constants, capability, config.options)


@pytest.mark.parametrize(
    ("kernel", "dtype", "size", "wanted"),
    [
        (kernel, dtype, size, programs)
        for (kernel, dtype), each in PROGRAMS.items()
        for size, programs in zip(HEAD_DIMENSIONS, each, strict=False)
    ],
)
def test_programs_that_a_multiprocessor_holds(kernel: str, dtype: str, size: int, wanted: int) -> None:
    found = scores(kernel, "all masks", dtype, size, 90)
    assert not found.spills
    assert found.resident_warps // found.warps >= wanted, f"{found.registers} registers, {found.shared} bytes"


@pytest.mark.parametrize(
    ("dtype", "seq", "capability"), sampled([(d, s, c) for d in DTYPES for s in LENGTHS for c in TABLES], {90})
)
def test_loads_on_their_way_keep_the_memory_busy(dtype: str, seq: int, capability: int) -> None:
    """Of rows from maps: a program asks for `stages` − 1 tiles ahead of the one it adds."""
    config = launch.rows_launch(seq, DTYPES[dtype], name=TABLES[capability])
    found = rows("max", dtype, seq, capability)
    ahead = (config.stages - 1) * config.rows * config.padded * DTYPES[dtype].itemsize
    assert found.shared >= ahead, "the loads are not asynchronous"
    assert found.resident_warps // found.warps * ahead >= BYTES_IN_FLIGHT


def in_order(found: Compiled, written: tuple[str, ...]) -> None:
    """`written`: the arguments whose memory programs write for one another."""
    kinds = [kind for kind, _ in operations(found.ptx)]
    assert "release" in kinds
    assert "acquire" in kinds
    assert out_of_order(found.ptx) == []
    loads = shared_loads(found.ttir, written)
    assert loads
    uncached = re.compile(r"cache_?[mM]odifier = cg\b")  # Triton 3.9 spells it with an underscore
    assert [line for line in loads if not uncached.search(line)] == []


@pytest.mark.parametrize(
    ("form", "dtype", "capability"), sampled([(f, d, c) for f in MAP_FORMS for d in DTYPES for c in TABLES], {90})
)
def test_rows_keep_the_order_of_waits_and_arrivals(form: str, dtype: str, capability: int) -> None:
    in_order(rows(form, dtype, 512, capability), ("partials_ptr",))


@pytest.mark.parametrize(
    ("form", "dtype", "kernel", "capability"),
    sampled([(f, d, k, c) for f in QK_FORMS for d in DTYPES for k in ("columns", "gradients") for c in TABLES], {90}),
)
def test_columns_keep_the_order_of_waits_and_arrivals(form: str, dtype: str, kernel: str, capability: int) -> None:
    in_order(scores(kernel, form, dtype, 64, capability), ("w_ptr",))


def test_the_check_of_order_can_fail() -> None:
    """Without barriers every release and acquire of a kernel is out of order; with them, none."""
    found = rows("max", "fp32", 512, 90)
    without = re.sub(r".*\bbar\.sync\b.*\n", "", found.ptx)
    wrong = out_of_order(without)
    assert any(line.startswith("no barrier before") for line in wrong)
    assert any(line.startswith("no barrier after") for line in wrong)
    moved = "st.global.b32 [%rd1], %r1;\natom.global.gpu.acq_rel.add.u32 %r2, [%rd2], 1;\nbar.sync 0;"
    assert out_of_order(moved) == ["no barrier before atom.global.gpu.acq_rel.add.u32 %r2, [%rd2], 1;"]


@pytest.mark.parametrize("kernel", ["rows_split", "columns"])
def test_the_check_of_cached_reads_can_fail(kernel: str, tmp_path: Path) -> None:
    function = {"rows_split": rows_split_kernel, "columns": columns_kernel}[kernel]
    module = mutated(sys.modules[function.fn.__module__], {', cache_modifier=".cg"': ""}, tmp_path)
    broken = getattr(module, function.fn.__name__)
    if kernel == "rows_split":
        rows_config = launch.rows_launch(512, torch.float32, name="sm_90")
        found = compile_kernel(broken, map_constants("max", torch.float32, rows_config), 90, rows_config.options)
    else:
        config = launch.scores_launch("columns", torch.bfloat16, 64, "sm_90")
        constants = score_constants("columns", "plain", torch.bfloat16, 64, config)
        found = compile_kernel(broken, constants, 90, config.options)
    with pytest.raises(AssertionError):
        in_order(found, ("partials_ptr", "w_ptr"))
    assert out_of_order(found.ptx) == []


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_row_sums_are_taken_before_the_wait_and_partials_asked_for_at_once(dtype: str) -> None:
    """S = 512 on sm_90: sums across a warp stand before the loop that waits; after it, 8 loads in a row before one
    of them is added."""
    listing = rows("max", dtype, 512, 90).sass.splitlines()
    wait = next(i for i, line in enumerate(listing) if "CCTL.IVALL" in line)
    after = [line for line in listing[wait:] if re.search(r"\bFADD\b|LDG[.A-Z0-9]*\.STRONG\.GPU|\bSHFL\b", line)]
    assert len([line for line in listing[:wait] if "SHFL" in line]) >= 8
    assert all("STRONG.GPU" in line for line in after[:8]), after[:9]
    assert "STRONG.GPU" not in after[8]
