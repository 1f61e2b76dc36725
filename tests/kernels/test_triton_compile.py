"""Promises of every shipped launch configuration on any Triton, compiled ahead of time with no device.

Nothing spills, loads are wide, products run on tensor cores, a multiprocessor holds enough warps. What is known of one
release of Triton alone stands in test_triton_known.py. The table of registers and shared memory is printed
(`pytest -s`).

Each kernel is compiled for the architecture's own table in its heaviest form; the lighter forms a few times over.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from rollout_kernels._triton import HEAD_DIMENSIONS, inputs, launch
from rollout_kernels._triton.fuse_heads import fuse_heads_kernel
from rollout_kernels._triton.matrix_product import matrix_product_kernel
from rollout_kernels._triton.qk_columns import columns_kernel
from rollout_kernels._triton.rows_split import rows_split_kernel
from tests.support.triton_aot import TENSOR_COLUMNS, Compiled, compile_amd, compile_kernel, tool
from tests.support.triton_launches import (
    DTYPES,
    FUSED_KERNELS,
    MAP_FORMS,
    MAP_KERNELS,
    QK_FORMS,
    SCORE_KERNELS,
    TABLES,
    fused_constants,
    map_constants,
    product_constants,
    score_constants,
)

pytestmark = pytest.mark.skipif(
    tool("cuobjdump") is None or tool("nvdisasm") is None, reason="cuobjdump and nvdisasm are not at hand"
)
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WARPS = 8  # every launch: two for each scheduler
WARPS_OF_FULL_TENSOR_MEMORY = 4  # sm_100: a Triton that keeps six accumulators for float32 leaves room for one program
WARPS_TO_HIDE_LOADS = 16  # rows from maps: one program loads while another adds
WARPS_TO_HIDE_PRODUCTS = 12  # a program's products, exponentials and loads take turns: three programs of 4 warps
# Bytes that a release is known to set aside in a few launches whatever is done, and never to touch in the inner loop.
STACK = {"3.7.1": 16}
_rows: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print(f"\nTriton {triton.__version__}")
    print(
        "kernel | form | sm | registers | stack | shared bytes | warps resident | 16-byte loads | HGMMA | "
        "SHFL in the inner loop | s"
    )
    for row in _rows:
        print(row)


def compiled(
    name: str, form: str, capability: int, kernel: object, constants: dict, config: object, loop: str
) -> Compiled:
    """A kernel under one launch, with what is promised of every launch."""
    begun = time.monotonic()
    found = compile_kernel(kernel, constants, capability, config.options)
    inner = found.inner_loop(loop)
    _rows.append(
        f"{name} | {form} | {capability} | {found.registers} | {found.stack} | {found.shared} | "
        f"{found.resident_warps} | {found.wide_loads} | "
        f"{found.count('HGMMA')} | {len(re.findall('SHFL', inner))} | {time.monotonic() - begun:.1f}"
    )
    aside = 0 < found.stack <= STACK.get(triton.__version__, 0) and not re.search(r"\bLDL|\bSTL", inner)
    assert aside or not found.spills, _rows[-1]
    full = found.tensor_columns == TENSOR_COLUMNS
    assert found.resident_warps >= (WARPS_OF_FULL_TENSOR_MEMORY if full else WARPS), _rows[-1]
    return found


def as_parameters(cases: list[tuple], sampled: dict[tuple, bool]) -> list:
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if sampled[case] else [pytest.mark.slow])
        for case in cases
    ]


MAP_CASES = [
    (kernel, form, dtype, seq, capability)
    for kernel in MAP_KERNELS
    for form in MAP_FORMS
    for dtype in DTYPES
    for seq in LENGTHS
    for capability in TABLES
    if not (kernel == "resident" and seq > launch.tables(TABLES[capability])["resident_longest"])
]


def map_sampled(case: tuple[str, str, str, int, int]) -> bool:
    """What the default run compiles: the heaviest form of every configuration on sm_90, and some of the rest."""
    _, form, _, seq, capability = case
    if capability == 90:
        return form == "max" or seq in (128, 2048, 8192)
    return form == "max" and seq in ((128, 512, 2048, 8192) if TABLES[capability] != "default" else (512,))


@pytest.mark.parametrize(
    ("kernel", "form", "dtype", "seq", "capability"),
    as_parameters(MAP_CASES, {case: map_sampled(case) for case in MAP_CASES}),
)
def test_rows_from_maps(kernel: str, form: str, dtype: str, seq: int, capability: int) -> None:
    config = launch.rows_launch(seq, DTYPES[dtype], form == "gradients", name=TABLES[capability])
    constants = map_constants(form, DTYPES[dtype], config)
    name = f"rows_{kernel} {dtype} {config.rows}x{config.padded} w{config.num_warps}"
    found = compiled(name, form, capability, MAP_KERNELS[kernel], constants, config, "LDGSTS")
    assert found.wide_loads > 0
    assert found.registers <= config.maxnreg
    assert found.resident_warps >= WARPS_TO_HIDE_LOADS, _rows[-1]


# Elements of one load where 16 bytes are too many: words of 4 bytes where S is odd and they are of 16 bits.
NARROW = [("fp32", 2), ("fp32", 1), ("bf16", 4), ("bf16", 2), ("bf16", 1)]
NARROW_CASES = [
    (kernel, form, dtype, vector, seq - odd, capability)
    for kernel in MAP_KERNELS
    for form in MAP_FORMS
    for dtype, vector in NARROW
    for odd in ((0, 1) if vector == 1 else (0,))
    for seq in LENGTHS
    for capability in (80, 90, 100)
    if not (kernel == "resident" and seq > launch.tables(TABLES[capability])["resident_longest"])
]


def narrow_sampled(case: tuple[str, str, str, int, int, int]) -> bool:
    """Rows as wide as those of S = 197 and 577, one kernel in the heaviest forms, on sm_90."""
    kernel, form, _, _, seq, capability = case
    wide = launch.padded(seq) in (256, 1024)
    return kernel == "split" and form in ("max", "gradients") and wide and capability == 90


@pytest.mark.parametrize(
    ("kernel", "form", "dtype", "vector", "seq", "capability"),
    as_parameters(NARROW_CASES, {case: narrow_sampled(case) for case in NARROW_CASES}),
)
def test_narrow_loads(kernel: str, form: str, dtype: str, vector: int, seq: int, capability: int) -> None:
    """Rows that do not start on 16 bytes: as many warps are resident, and copies are asynchronous from 4 bytes on, as
    wide as the rows allow."""
    gradients, load = form == "gradients", vector * DTYPES[dtype].itemsize
    config = launch.rows_launch(seq, DTYPES[dtype], gradients, load, TABLES[capability])
    pairs = load == 2 and seq % 2 == 1 and not gradients and seq <= inputs.LONGEST_IN_PAIRS
    constants = map_constants(form, DTYPES[dtype], config, vector, pairs)
    name = f"rows_{kernel} {dtype} {config.rows}x{config.padded} w{config.num_warps} in {vector} S {seq}"
    found = compiled(name, form, capability, MAP_KERNELS[kernel], constants, config, "LDG")
    assert found.resident_warps >= WARPS_TO_HIDE_LOADS, _rows[-1]
    if load == 8:
        assert found.count(r"LDGSTS[.A-Z0-9]*\.64") > 0
    elif load == 4 or pairs:
        assert found.count("LDGSTS") > 0


@pytest.mark.parametrize(("dtype", "vector"), [("fp32", 4), ("bf16", 8), *NARROW])
@pytest.mark.parametrize("form", ["max", "gradients"])
def test_sums_are_of_two(form: str, dtype: str, vector: int) -> None:
    """However wide the loads and many the warps, and in both regimes, a sample's sums are taken in one order: each adds
    two numbers, so that no layout has a part in it."""
    pairs = vector == 1 and dtype == "bf16" and form == "max"
    load = vector * DTYPES[dtype].itemsize
    config = launch.rows_launch(511 if pairs else 512, DTYPES[dtype], form == "gradients", load, "sm_90")
    constants = map_constants(form, DTYPES[dtype], config, vector, pairs)
    found = compile_kernel(rows_split_kernel, constants, 90, config.options).summed("f32")
    assert len(found) >= config.rows.bit_length() - 1
    assert set(found) <= {1, 2}


def test_more_registers_are_asked_for_than_a_program_may_have() -> None:
    """The check of spills can fail: a cap far too low does spill."""
    config = replace(launch.rows_launch(512, torch.float32, name="sm_90"), maxnreg=32)
    constants = map_constants("max", torch.float32, config)
    with pytest.raises(AssertionError, match="rows_split"):
        compiled("rows_split capped", "max", 90, rows_split_kernel, constants, config, "LDG")
    _rows.pop()


@pytest.mark.parametrize(
    ("registers", "shared", "columns", "warps", "capability", "wanted"),
    [
        (128, 0, 0, 8, 90, 16),  # two programs of 8 warps take every register
        (129, 0, 0, 8, 90, 8),  # a warp takes 136: three on each scheduler, so one program of 8
        (168, 0, 0, 4, 90, 12),
        (169, 0, 0, 4, 90, 8),
        (255, 0, 0, 16, 90, 0),  # a launch that cannot be
        (32, 114688, 0, 4, 90, 8),  # 113 KiB each, of 228
        (32, 49152, 0, 4, 120, 8),  # 49 KiB each, of 100
        (32, 0, 0, 4, 89, 48),  # 1536 threads
        (32, 0, 128, 4, 100, 16),  # tensor memory
    ],
)
def test_the_count_of_resident_warps(
    registers: int, shared: int, columns: int, warps: int, capability: int, wanted: int
) -> None:
    found = Compiled(registers=registers, shared=shared, tensor_columns=columns, warps=warps, capability=capability)
    assert found.resident_warps == wanted


QK_CASES = [
    (kernel, form, dtype, size, capability)
    for kernel in SCORE_KERNELS
    for form in QK_FORMS
    for dtype in DTYPES
    for size in HEAD_DIMENSIONS
    for capability in TABLES
    if (kernel, dtype, size) != ("gradients", "fp32", 128)  # which is fused first
]


def qk_sampled(case: tuple[str, str, str, int, int]) -> bool:
    """The heaviest form; of the others one on sm_90, and the widest heads, which leave the fewest registers."""
    _, form, dtype, size, capability = case
    if capability == 90:
        return form == "all masks" or (size, dtype) in ((64, "bf16"), (128, "fp32"))
    if TABLES[capability] == "default":
        return form == "all masks" and (size, dtype) in ((64, "bf16"), (128, "fp32"))
    return form == "all masks" and size in (64, 128)


@pytest.mark.parametrize(
    ("kernel", "form", "dtype", "size", "capability"),
    as_parameters(QK_CASES, {case: qk_sampled(case) for case in QK_CASES}),
)
def test_rows_from_qk(kernel: str, form: str, dtype: str, size: int, capability: int) -> None:
    config = launch.scores_launch(kernel, DTYPES[dtype], size, TABLES[capability])
    constants = score_constants(kernel, form, DTYPES[dtype], size, config)
    name = f"{kernel} {dtype} D{size} {config.block_m}x{config.block_n} w{config.num_warps}"
    found = compiled(name, form, capability, SCORE_KERNELS[kernel], constants, config, "HGMMA|HMMA|UTC")
    assert found.wide_loads > 0
    if capability == 90:
        assert found.count("HGMMA") > 0
        if kernel != "logsumexp":  # one reduction over rows, after the loop
            assert len(re.findall("SHFL", found.inner_loop("HGMMA"))) == 0
        narrow = size <= 64 if kernel == "columns" and form == "plain" else kernel == "gradients" and size <= 32
        if narrow and dtype == "bf16":
            assert found.resident_warps >= WARPS_TO_HIDE_PRODUCTS, _rows[-1]


@pytest.mark.parametrize(
    ("kernel", "form", "dtype", "size", "capability"),
    as_parameters(QK_CASES, {case: case[1] == "all masks" and case[3:] == (128, 90) for case in QK_CASES}),
)
def test_soft_caps_and_sinks_from_qk(kernel: str, form: str, dtype: str, size: int, capability: int) -> None:
    sums = {} if kernel == "logsumexp" else {"HAS_SUMS": True}
    for cap in (0.0, 50.0):
        config = launch.scores_launch(kernel, DTYPES[dtype], size, TABLES[capability], capped=True)
        constants = score_constants(kernel, form, DTYPES[dtype], size, config)
        constants |= {"SOFTCAP": cap, "HAS_SINKS": True, **sums}
        name = f"{kernel} {dtype} D{size} {config.block_m}x{config.block_n} w{config.num_warps} cap {cap}, sinks"
        found = compiled(name, form, capability, SCORE_KERNELS[kernel], constants, config, "HGMMA|HMMA|UTC")
        assert found.wide_loads > 0


FUSED_CASES = [
    (kernel, dtype, size, capability)
    for kernel in FUSED_KERNELS
    for dtype in DTYPES
    for size in HEAD_DIMENSIONS
    for capability in TABLES
]


def fused_sampled(case: tuple[str, str, int, int]) -> bool:
    """The maximum over the widest heads, which leaves the fewest registers, and on sm_90 every other kernel of them."""
    kernel, dtype, size, capability = case
    return size == 128 and (capability == 90 or (kernel == "columns" and dtype == "fp32"))


@pytest.mark.parametrize(
    ("kernel", "dtype", "size", "capability"),
    as_parameters(FUSED_CASES, {case: fused_sampled(case) for case in FUSED_CASES}),
)
def test_fused_tiles_and_biases_from_qk(kernel: str, dtype: str, size: int, capability: int) -> None:
    part = "logsumexp" if kernel == "logsumexp" else "fused"
    config = launch.scores_launch(part, DTYPES[dtype], size, TABLES[capability], biased=True, capped=True)
    constants = fused_constants(kernel, DTYPES[dtype], size, config)
    name = f"fused {kernel} {dtype} D{size} {config.block_m}x{config.block_n} w{config.num_warps}"
    found = compiled(name, "everything", capability, FUSED_KERNELS[kernel][0], constants, config, "HGMMA|HMMA|UTC")
    whole = size * DTYPES[dtype].itemsize * max(config.block_m, config.block_n) // (32 * config.num_warps)
    assert found.wide_loads > 0 or whole < 16  # bytes of a tile for each thread
    assert (found.count("HGMMA") > 0) == (capability == 90)


def plain_columns() -> tuple[dict[str, object], launch.ScoresLaunch]:
    """The lightest form of the columns: bf16, D = 64, no mask."""
    config = launch.scores_launch("columns", torch.bfloat16, 64, "sm_90")
    return score_constants("columns", "plain", torch.bfloat16, 64, config), config


def test_the_bf16_inner_loop_is_bound_by_the_exponential_unit() -> None:
    """D = 64 on Hopper: a warp instruction issues per clock, an exponential takes 8; the loop has few others."""
    constants, config = plain_columns()
    inner = compile_kernel(columns_kernel, constants, 90, config.options).inner_loop("HGMMA")
    instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/ +[@A-Z]", inner))
    exponentials = len(re.findall(r"MUFU\.EX2", inner))
    assert exponentials == config.block_m * config.block_n // (32 * config.num_warps)
    assert instructions <= 9 * exponentials


@pytest.mark.parametrize("kernel", ["rows_split", "columns"])
def test_programs_wait_with_acquire_and_signal_with_release(kernel: str) -> None:
    """The loop that waits reads the counter at device scope and drops the first-level cache after it; a fence stands
    before the counter goes up. Compilers have lost the first before."""
    if kernel == "rows_split":
        config = launch.rows_launch(512, torch.float32, name="sm_90")
        found = compile_kernel(rows_split_kernel, map_constants("plain", torch.float32, config), 90, config.options)
    else:
        constants, scores = plain_columns()
        found = compile_kernel(columns_kernel, constants, 90, scores.options)
    wait = found.inner_loop(r"CCTL\.IVALL")
    assert re.search(r"(LDG|LD|ATOMG?)[.A-Z0-9]*\.STRONG\.GPU", wait)
    assert len(wait.splitlines()) < 30
    assert found.count(r"MEMBAR\.\w+\.GPU") >= 1


@pytest.mark.parametrize("capability", TABLES)
def test_product_of_the_full_chain(capability: int) -> None:
    config = launch.product_launch(TABLES[capability])
    name = f"product fp32 {config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps}"
    constants = product_constants(config)
    found = compiled(name, "ragged", capability, matrix_product_kernel, constants, config, "HGMMA|HMMA|UTC")
    assert found.wide_loads > 0
    assert (found.count("HGMMA") > 0) == (capability == 90)
    if capability not in (90, 100):  # there products run beside the warps that ask for them
        assert found.resident_warps >= WARPS_TO_HIDE_PRODUCTS, _rows[-1]


@pytest.mark.parametrize(
    "seq", [pytest.param(s, marks=[] if s in (128, 512, 8192) else pytest.mark.slow) for s in LENGTHS]
)
@pytest.mark.parametrize("form", ["max", "gradients"])
def test_fused_heads_of_the_full_chain(form: str, seq: int) -> None:
    config = launch.rows_launch(seq, torch.float32, form == "gradients", name="sm_90")
    constants = {**map_constants(form, torch.float32, config), "OUT_VEC": 4, "IDENTITY": False}
    del constants["ONE_HOT"], constants["PARTS"]
    name = f"fuse_heads fp32 {config.rows}x{config.padded} w{config.num_warps}"
    assert compiled(name, form, 90, fuse_heads_kernel, constants, config, "LDGSTS").wide_loads > 0


@pytest.mark.parametrize("kernel", list(MAP_KERNELS))
def test_rows_from_maps_compile_for_gfx942(kernel: str) -> None:
    config = launch.rows_launch(512, torch.float32)
    assert compile_amd(MAP_KERNELS[kernel], map_constants("max", torch.float32, config), config.num_warps) > 0
