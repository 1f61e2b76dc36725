"""Every shipped launch configuration compiled ahead of time, with no device: nothing spills, loads are wide, products
run on tensor cores. The table of registers and shared memory is printed (`pytest -s`).

Each kernel is compiled for the architecture's own table in its heaviest form; the lighter forms a few times over.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rollout_kernels._triton import HEAD_DIMENSIONS, inputs, launch
from rollout_kernels._triton.fuse_heads import fuse_heads_kernel
from rollout_kernels._triton.matrix_product import matrix_product_kernel
from rollout_kernels._triton.qk_columns import columns_kernel
from rollout_kernels._triton.qk_logsumexp import logsumexp_kernel
from rollout_kernels._triton.rows_resident import rows_resident_kernel
from rollout_kernels._triton.rows_split import rows_split_kernel
from tests.support.triton_aot import Compiled, compile_amd, compile_kernel, tool

pytestmark = pytest.mark.skipif(
    tool("cuobjdump") is None or tool("nvdisasm") is None, reason="cuobjdump and nvdisasm are not at hand"
)
ARCHITECTURES = (80, 90, 100)
TABLES = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MAP_KERNELS = {"resident": rows_resident_kernel, "split": rows_split_kernel}
MAP_FORMS = {  # the heaviest: max fusion, renormalised, ragged, a free top layer; then gradients, then the lightest
    "max": {"ONE_HOT": True, "HAS_LENGTHS": True, "RENORMALIZE": True, "FUSION": 1, "GRADIENTS": 0},
    "gradients": {"ONE_HOT": False, "HAS_LENGTHS": True, "RENORMALIZE": False, "FUSION": 0, "GRADIENTS": 1},
    "weights": {"ONE_HOT": False, "HAS_LENGTHS": True, "RENORMALIZE": True, "FUSION": 3, "GRADIENTS": 0},
    "plain": {"ONE_HOT": True, "HAS_LENGTHS": False, "RENORMALIZE": False, "FUSION": 0, "GRADIENTS": 0},
}
_rows: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print(
        "\nkernel | form | sm | registers | stack | shared bytes | 16-byte loads | HGMMA | SHFL in the inner loop | s"
    )
    for row in _rows:
        print(row)


def compiled(
    name: str, form: str, capability: int, kernel: object, constants: dict, config: object, loop: str
) -> Compiled:
    begun = time.monotonic()
    found = compile_kernel(kernel, constants, capability, config.options)
    inner = found.inner_loop(loop)
    _rows.append(
        f"{name} | {form} | {capability} | {found.registers} | {found.stack} | {found.shared} | {found.wide_loads} | "
        f"{found.count('HGMMA')} | {len(re.findall('SHFL', inner))} | {time.monotonic() - begun:.1f}"
    )
    assert found.stack == 0, _rows[-1]
    assert found.local == 0, _rows[-1]
    assert found.count(r"\bLDL|\bSTL") == 0, _rows[-1]
    return found


def map_constants(form: str, dtype: torch.dtype, config: launch.RowsLaunch) -> dict[str, object]:
    triton_type = inputs.DTYPES[dtype]
    vector = 16 // dtype.itemsize
    layout = {"DTYPE": triton_type, "GRAD_DTYPE": triton_type, "VEC": vector, "ALIGNED": True, "UNIT_COLUMN": True}
    return {**MAP_FORMS[form], **layout, **config.blocks}


MAP_CASES = [
    (kernel, form, dtype, seq, capability)
    for kernel in MAP_KERNELS
    for form in MAP_FORMS
    for dtype in DTYPES
    for seq in LENGTHS
    for capability in ARCHITECTURES
    if not (kernel == "resident" and seq > launch.tables(TABLES[capability])["resident_longest"])
]


def sampled(case: tuple[str, str, str, int, int]) -> bool:
    """What the default run compiles: the heaviest form of every configuration on sm_90, and some of the rest."""
    _, form, _, seq, capability = case
    if capability == 90:
        return form == "max" or seq in (128, 2048, 8192)
    return form == "max" and seq in (128, 512, 2048, 8192)


def as_parameters(cases: list[tuple]) -> list:
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if sampled(case) else [pytest.mark.slow])
        for case in cases
    ]


@pytest.mark.parametrize(("kernel", "form", "dtype", "seq", "capability"), as_parameters(MAP_CASES))
def test_rows_from_maps(kernel: str, form: str, dtype: str, seq: int, capability: int) -> None:
    config = launch.rows_launch(seq, DTYPES[dtype], form == "gradients", True, TABLES[capability])
    constants = map_constants(form, DTYPES[dtype], config)
    name = f"rows_{kernel} {dtype} {config.rows}x{config.padded} w{config.num_warps}"
    found = compiled(name, form, capability, MAP_KERNELS[kernel], constants, config, "LDGSTS")
    assert found.wide_loads > 0
    assert found.registers <= config.maxnreg


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kernel", list(MAP_KERNELS))
def test_odd_lengths_compile_without_wide_loads(kernel: str, dtype: str) -> None:
    """S = 197: rows do not start on 16 bytes, so loads are one element wide; still nothing spills."""
    config = launch.rows_launch(197, DTYPES[dtype], False, False, "sm_90")
    constants = {**map_constants("max", DTYPES[dtype], config), "VEC": 1}
    compiled(f"rows_{kernel} {dtype} S197", "max", 90, MAP_KERNELS[kernel], constants, config, "LDG")


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("seq", [64, 512, 1024])
@pytest.mark.parametrize("form", ["max", "gradients"])
def test_both_regimes_reduce_in_the_same_layouts(form: str, seq: int, dtype: str) -> None:
    """A sum's order follows from the layout it is taken in: equal layouts are half of why both give the same bits."""
    config = launch.rows_launch(seq, DTYPES[dtype], form == "gradients", True, "sm_90")
    constants = map_constants(form, DTYPES[dtype], config)
    found = [
        compile_kernel(kernel, constants, 90, config.options).reductions("f32", f"{config.rows}x{config.padded}")
        for kernel in MAP_KERNELS.values()
    ]
    assert found[0]
    assert found[0] == found[1]


def test_more_registers_are_asked_for_than_a_program_may_have() -> None:
    """The check of spills can fail: a cap far too low does spill."""
    config = replace(launch.rows_launch(512, torch.float32, False, True, "sm_90"), maxnreg=32)
    with pytest.raises(AssertionError, match="rows_split"):
        compiled(
            "rows_split capped",
            "max",
            90,
            rows_split_kernel,
            map_constants("max", torch.float32, config),
            config,
            "LDG",
        )
    _rows.pop()


QK_FORMS = {
    "plain": {"HAS_LENGTHS": False, "HAS_KEY_MASK": False, "HAS_LEFT": False, "HAS_RIGHT": False},
    "causal": {"HAS_LENGTHS": True, "HAS_KEY_MASK": False, "HAS_LEFT": False, "HAS_RIGHT": True},
    "all masks": {"HAS_LENGTHS": True, "HAS_KEY_MASK": True, "HAS_LEFT": True, "HAS_RIGHT": True},
}
QK_CASES = [
    (kernel, form, dtype, size, capability)
    for kernel in ("logsumexp", "columns")
    for form in QK_FORMS
    for dtype in DTYPES
    for size in HEAD_DIMENSIONS
    for capability in ARCHITECTURES
]


def qk_sampled(case: tuple[str, str, str, int, int]) -> bool:
    _, form, dtype, size, capability = case
    if capability == 90:
        return form == "all masks" or (size == 64 and dtype == "bf16")
    return form == "all masks" and size in (64, 128)


@pytest.mark.parametrize(
    ("kernel", "form", "dtype", "size", "capability"),
    [
        pytest.param(*case, id="-".join(map(str, case)), marks=[] if qk_sampled(case) else [pytest.mark.slow])
        for case in QK_CASES
    ],
)
def test_rows_from_qk(kernel: str, form: str, dtype: str, size: int, capability: int) -> None:
    config = launch.scores_launch(kernel, DTYPES[dtype], size, TABLES[capability])
    chosen = (
        {"ONE_HOT": True} if kernel == "logsumexp" else dict.fromkeys(("HAS_WEIGHTS", "HAS_DEAD"), form == "all masks")
    )
    constants = {
        **QK_FORMS[form], **chosen, **config.blocks,
        "DTYPE": inputs.DTYPES[DTYPES[dtype]], "VEC": 16 // DTYPES[dtype].itemsize, "ALIGNED": True,
        "PRECISION": config.precision if dtype == "fp32" else "ieee", "UPCAST": False, "D": size,
    }  # fmt: skip
    name = f"{kernel} {dtype} D{size} {config.block_m}x{config.block_n} w{config.num_warps}"
    jit = logsumexp_kernel if kernel == "logsumexp" else columns_kernel
    found = compiled(name, form, capability, jit, constants, config, "HGMMA|HMMA|UTC")
    assert found.wide_loads > 0
    if capability == 90:
        assert found.count("HGMMA") > 0
        if kernel == "columns":  # one reduction over rows, after the loop
            assert len(re.findall("SHFL", found.inner_loop("HGMMA"))) == 0


def column_constants(config: launch.ScoresLaunch) -> dict[str, object]:
    """The lightest form of the columns: bf16, D = 64, no mask."""
    flags = dict.fromkeys(("HAS_WEIGHTS", "HAS_DEAD", "UPCAST"), False)
    layout = {"DTYPE": inputs.DTYPES[torch.bfloat16], "VEC": 8, "ALIGNED": True, "PRECISION": "ieee", "D": 64}
    return {**QK_FORMS["plain"], **flags, **layout, **config.blocks}


def test_the_bf16_inner_loop_is_bound_by_the_exponential_unit() -> None:
    """D = 64 on Hopper: a warp instruction issues per clock, an exponential takes 8; the loop has few others."""
    config = launch.scores_launch("columns", torch.bfloat16, 64, "sm_90")
    inner = compile_kernel(columns_kernel, column_constants(config), 90, config.options).inner_loop("HGMMA")
    instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/ +[@A-Z]", inner))
    exponentials = len(re.findall(r"MUFU\.EX2", inner))
    assert exponentials == config.block_m * config.block_n // (32 * config.num_warps)
    assert instructions <= 9 * exponentials


@pytest.mark.parametrize("kernel", ["rows_split", "columns"])
def test_programs_wait_with_acquire_and_signal_with_release(kernel: str) -> None:
    """The loop that waits reads the counter at device scope and drops the first-level cache after it; a fence stands
    before the counter goes up. Compilers have lost the first before."""
    if kernel == "rows_split":
        config = launch.rows_launch(512, torch.float32, False, True, "sm_90")
        found = compile_kernel(rows_split_kernel, map_constants("plain", torch.float32, config), 90, config.options)
    else:
        scores = launch.scores_launch("columns", torch.bfloat16, 64, "sm_90")
        found = compile_kernel(columns_kernel, column_constants(scores), 90, scores.options)
    wait = found.inner_loop(r"CCTL\.IVALL")
    assert re.search(r"(LDG|LD|ATOMG?)[.A-Z0-9]*\.STRONG\.GPU", wait)
    assert len(wait.splitlines()) < 30
    assert found.count(r"MEMBAR\.\w+\.GPU") >= 1


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_product_of_the_full_chain(capability: int) -> None:
    config = launch.product_launch(TABLES[capability])
    constants = {"HAS_LENGTHS": True, "PRECISION": "bf16x6", "OUT_VEC": 4, **config.blocks}
    name = f"product fp32 {config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps}"
    found = compiled(name, "ragged", capability, matrix_product_kernel, constants, config, "HGMMA|HMMA|UTC")
    assert found.wide_loads > 0
    assert (found.count("HGMMA") > 0) == (capability == 90)


@pytest.mark.parametrize(
    "seq", [pytest.param(s, marks=[] if s in (128, 512, 8192) else pytest.mark.slow) for s in LENGTHS]
)
@pytest.mark.parametrize("form", ["max", "gradients"])
def test_fused_heads_of_the_full_chain(form: str, seq: int) -> None:
    config = launch.rows_launch(seq, torch.float32, form == "gradients", True, "sm_90")
    constants = {**map_constants(form, torch.float32, config), "OUT_VEC": 4}
    del constants["ONE_HOT"], constants["PARTS"]
    name = f"fuse_heads fp32 {config.rows}x{config.padded} w{config.num_warps}"
    assert compiled(name, form, 90, fuse_heads_kernel, constants, config, "LDGSTS").wide_loads > 0


@pytest.mark.parametrize("kernel", list(MAP_KERNELS))
def test_rows_from_maps_compile_for_gfx942(kernel: str) -> None:
    config = launch.rows_launch(512, torch.float32)
    assert compile_amd(MAP_KERNELS[kernel], map_constants("max", torch.float32, config), config.num_warps) > 0
