"""The Triton kernels on a card: against the oracle, bit for bit from run to run, in any batch and in both regimes.

`pytest -m gpu`. The interpreter lane shows the mathematics; this one shows what it cannot: tensor-core rounding, the
wait between programs, offsets beyond 2³¹ elements, memory.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rollout
from rollout_kernels import _problem, ops, reference
from rollout_kernels.method import Method

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
if torch.cuda.is_available():
    from rollout_kernels import _triton

ROOT = Path(__file__).parents[2]
MAPS_BOUND, QK_BOUND = 1e-6, 3e-6  # max|err| / max|ref|
METHODS = {
    "mean": Method(),
    "max": Method(head_fusion="max"),
    "weights": Method(head_fusion=torch.tensor([0.5, 2.0, -0.25])),
    "chefer": Method(residual=1.0, attention=1.0, renormalize=False, gradients="clamp_then_fuse"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (1, 31, 64, 197, 512, 1025)


def maps_problem(
    batch: int, seq: int, dtype: torch.dtype, method: Method, query: object = -1, ragged: bool = False
) -> _problem.MapsProblem:
    torch.manual_seed(0)
    maps = [torch.randn(batch, 3, seq, seq, device="cuda").mul(2).softmax(-1).to(dtype) for _ in range(3)]
    grads = [torch.randn(m.shape, device="cuda") for m in maps] if method.gradients else None
    lengths = torch.arange(batch, device="cuda").mul(-13).add(seq).clamp(min=1) if ragged else None
    return ops.maps_problem(maps, query=query, lengths=lengths, gradients=grads, method=method)


def qk_problem(batch: int, seq: int, size: int, dtype: torch.dtype, **options: object) -> _problem.QKProblem:
    torch.manual_seed(0)
    queries = [torch.randn(batch, 4, seq, size, device="cuda").to(dtype) for _ in range(3)]
    keys = [torch.randn(batch, 2, seq, size, device="cuda").to(dtype) for _ in range(3)]
    return ops.qk_problem(queries, keys, query=-1, **options)


def error(result: Tensor, problem: _problem.Problem) -> float:
    wanted = reference.rollout(problem)
    return float((result.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("method", list(METHODS))
def test_rows_from_maps(method: str, dtype: str, seq: int, ragged: bool) -> None:
    problem = maps_problem(3, seq, DTYPES[dtype], METHODS[method], ragged=ragged)
    split = _triton.rows_from_maps(problem, split=True)
    assert error(split, problem) <= MAPS_BOUND
    if seq <= 1024:
        assert torch.equal(_triton.rows_from_maps(problem, split=False), split)


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_full_matrix_from_maps(dtype: str, seq: int) -> None:
    problem = replace(maps_problem(2, seq, DTYPES[dtype], Method(), ragged=True), rows=None)
    assert error(_triton.full_from_maps(problem), problem) <= MAPS_BOUND


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 7)}], ids=["none", "causal", "window"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("seq", [1, 65, 197, 513])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_rows_from_qk(dtype: str, seq: int, size: int, options: dict) -> None:
    lengths = torch.tensor([seq, max(1, seq // 2)], device="cuda")
    mask = torch.arange(seq, device="cuda").remainder(3).ne(1).expand(2, seq).contiguous()
    problem = qk_problem(2, seq, size, DTYPES[dtype], lengths=lengths, key_mask=mask, **options)
    assert error(_triton.rows_from_qk(problem), problem) <= QK_BOUND


@pytest.mark.parametrize("seq", [1, 65, 197, 512])
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_bias_slopes_and_the_full_matrix_from_qk(fusion: str, dtype: str, size: int, seq: int) -> None:
    lengths = torch.tensor([seq, max(1, seq // 2)], device="cuda")
    bias = torch.randn(4, seq, seq, device="cuda").transpose(-1, -2)
    bias[1, seq // 3] = -torch.inf  # a row of one head that nothing is left of
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device="cuda")
    for options in ({}, {"bias": bias, "causal": True}, {"alibi_slopes": slopes, "window": (40, 7)}):
        problem = qk_problem(
            2, seq, size, DTYPES[dtype], lengths=lengths, method=Method(head_fusion=fusion), **options
        )  # fmt: skip
        assert error(_triton.rows_from_qk(problem), problem) <= QK_BOUND
        whole = replace(problem, rows=None)
        assert error(_triton.full_from_qk(whole), whole) <= QK_BOUND


@pytest.mark.parametrize("seq", [64, 197, 512])
def test_a_sample_has_the_same_bits_in_any_batch_and_run(seq: int) -> None:
    problem = maps_problem(600, seq, torch.bfloat16, Method())
    whole = _triton.rows_from_maps(problem)
    few = ops.maps_problem([m[7:9] for m in problem.maps], query=problem.rows[7:9])
    for _ in range(50):
        assert torch.equal(_triton.rows_from_maps(few), whole[7:9])
        assert torch.equal(_triton.rows_from_maps(problem), whole)


def test_the_wait_between_programs_under_load() -> None:
    """Many chains, many layers, many runs, another stream busy meanwhile: the same bits every time."""
    torch.manual_seed(0)
    maps = [torch.rand(64, 2, 256, 256, device="cuda") for _ in range(16)]
    problem = ops.maps_problem(maps, query=-1, validate=False)
    wanted = _triton.rows_from_maps(problem, split=False)
    busy, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(300):
        with torch.cuda.stream(busy):
            noise @ noise
        assert torch.equal(_triton.rows_from_maps(problem, split=True), wanted)


def test_more_than_two_to_the_31_elements() -> None:
    """The last sample of a map of 2³¹ elements and more gives what it gives alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    maps = [torch.rand(129, 16, 1024, 1024, device="cuda", dtype=torch.float16) for _ in range(2)]
    assert maps[0].numel() > 2**31
    whole = rollout.attention_rollout(maps, query=-1, backend="triton", validate=False)
    problem = ops.maps_problem([m[-1:] for m in maps], query=-1, validate=False)
    assert torch.equal(whole[-1:], _triton.rows_from_maps(problem))
    assert error(whole[-1:], problem) <= MAPS_BOUND


@pytest.mark.parametrize("layers", [3, 12])
def test_extra_memory_does_not_grow_with_layers(layers: int) -> None:
    """From maps: one w and up to PARTS partial sums of it a sample, O(B·H·S), not O(B·H·S²)."""
    maps = [torch.rand(8, 12, 512, 512, device="cuda")] * layers
    rows = torch.zeros(8, dtype=torch.long, device="cuda")
    rollout.attention_rollout(maps, query=rows, backend="triton", validate=False)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    rollout.attention_rollout(maps, query=rows, backend="triton", validate=False)
    assert torch.cuda.max_memory_allocated() - held <= 2 * 4 * 8 * 16 * 512


@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_compute_sanitizer(check: str) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    code = (
        "import torch, rollout\n"
        "maps = [torch.rand(3, 2, 70, 70, device='cuda') for _ in range(3)]\n"
        "lengths = torch.tensor([70, 33, 1], device='cuda')\n"
        "rollout.attention_rollout(maps, query=-1, lengths=lengths, backend='triton')\n"
        "rollout.attention_rollout(maps, lengths=lengths, backend='triton')\n"
        "q = [torch.randn(2, 2, 70, 64, device='cuda', dtype=torch.bfloat16) for _ in range(3)]\n"
        "rollout.attention_rollout_qk(q, q, query=-1, causal=True, backend='triton')\n"
        "rollout.attention_rollout_qk(q, q, method='rollout', backend='triton')\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    run = subprocess.run(
        [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
