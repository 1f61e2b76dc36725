"""The Triton kernels on a card: against the oracle, bit for bit from run to run, in any batch and in both regimes.

`pytest -m gpu`. The interpreter lane shows the mathematics; this one shows what it cannot: tensor-core rounding, the
wait between programs, offsets beyond 2³¹ elements, memory, streams and graphs. With TRITON_INTERPRET=1 and no card the
same tests run tiny on the CPU, so that a slip in one of them is found before there is a card.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from rollout_kernels import _problem, ops, reference
from rollout_kernels.method import Method
from tests.support import card
from tests.support.card import DEVICE, ON_CARD
from tests.support.cases import poisoned_memory
from tests.support.triton_cases import handed_on

RUNNABLE = ON_CARD or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNNABLE, reason="no CUDA device is available")]
if RUNNABLE:
    from rollout_kernels import _triton

on_card = pytest.mark.skipif(not ON_CARD, reason="no CUDA device is available")
ROOT = Path(__file__).parents[2]
MAPS_BOUND, QK_BOUND = 1e-6, 3e-6  # max|err| / max|ref|
METHODS = {
    "mean": Method(),
    "max": Method(head_fusion="max"),
    "weights": Method(head_fusion=torch.tensor([0.5, 2.0, -0.25])),
    "chefer": Method(residual=1.0, attention=1.0, renormalize=False, gradients="clamp_then_fuse"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRIED = list(DTYPES) if ON_CARD else ["bf16"]
LENGTHS = (1, 31, 64, 197, 512, 1025) if ON_CARD else (9,)
QK_LENGTHS, QK_SIZES = ((1, 65, 197, 513), (16, 32, 64, 128)) if ON_CARD else ((9,), (16,))
SHORT = 19 if ON_CARD else 9
FEW = 3 if ON_CARD else 2  # layers, and samples


def maps_problem(
    batch: int, seq: int, dtype: torch.dtype, method: Method, query: object = -1, ragged: bool = False
) -> _problem.MapsProblem:
    torch.manual_seed(0)
    maps = [torch.randn(batch, 3, seq, seq, device=DEVICE).mul(2).softmax(-1).to(dtype) for _ in range(FEW)]
    grads = [torch.randn(m.shape, device=DEVICE) for m in maps] if method.gradients else None
    lengths = torch.arange(batch, device=DEVICE).mul(-13).add(seq).clamp(min=1) if ragged else None
    return ops.maps_problem(maps, query=query, lengths=lengths, gradients=grads, method=method)


def qk_problem(batch: int, seq: int, size: int, dtype: torch.dtype, **options: object) -> _problem.QKProblem:
    torch.manual_seed(0)
    queries = [torch.randn(batch, 4, seq, size, device=DEVICE).to(dtype) for _ in range(FEW)]
    keys = [torch.randn(batch, 2, seq, size, device=DEVICE).to(dtype) for _ in range(FEW)]
    return ops.qk_problem(queries, keys, query=-1, **options)


def error(result: Tensor, problem: _problem.Problem) -> float:
    wanted = reference.rollout(problem)
    return float((result.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("method", list(METHODS))
def test_rows_from_maps(method: str, dtype: str, seq: int, ragged: bool) -> None:
    problem = maps_problem(FEW, seq, DTYPES[dtype], METHODS[method], ragged=ragged)
    split = _triton.rows_from_maps(problem, split=True)
    assert error(split, problem) <= MAPS_BOUND
    if seq <= 1024:
        assert torch.equal(_triton.rows_from_maps(problem, split=False), split)


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("dtype", TRIED)
def test_full_matrix_from_maps(dtype: str, seq: int) -> None:
    problem = replace(maps_problem(2, seq, DTYPES[dtype], Method(), ragged=True), rows=None)
    assert error(_triton.full_from_maps(problem), problem) <= MAPS_BOUND


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 7)}], ids=["none", "causal", "window"])
@pytest.mark.parametrize("size", QK_SIZES)
@pytest.mark.parametrize("seq", QK_LENGTHS)
@pytest.mark.parametrize("dtype", TRIED)
def test_rows_from_qk(dtype: str, seq: int, size: int, options: dict) -> None:
    lengths = torch.tensor([seq, max(1, seq // 2)], device=DEVICE)
    mask = torch.arange(seq, device=DEVICE).remainder(3).ne(1).expand(2, seq).contiguous()
    problem = qk_problem(2, seq, size, DTYPES[dtype], lengths=lengths, key_mask=mask, **options)
    assert error(_triton.rows_from_qk(problem), problem) <= QK_BOUND


@pytest.mark.parametrize("seq", QK_LENGTHS)
@pytest.mark.parametrize("size", QK_SIZES)
@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_bias_slopes_and_the_full_matrix_from_qk(fusion: str, dtype: str, size: int, seq: int) -> None:
    lengths = torch.tensor([seq, max(1, seq // 2)], device=DEVICE)
    bias = torch.randn(4, seq, seq, device=DEVICE).transpose(-1, -2)
    bias[1, seq // 3] = -torch.inf  # a row of one head that nothing is left of
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=DEVICE)
    for options in ({}, {"bias": bias, "causal": True}, {"alibi_slopes": slopes, "window": (40, 7)}):
        problem = qk_problem(
            2, seq, size, DTYPES[dtype], lengths=lengths, method=Method(head_fusion=fusion), **options
        )  # fmt: skip
        assert error(_triton.rows_from_qk(problem), problem) <= QK_BOUND
        whole = replace(problem, rows=None)
        assert error(_triton.full_from_qk(whole), whole) <= QK_BOUND


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["none", "causal"])
@pytest.mark.parametrize("seq", QK_LENGTHS)
@pytest.mark.parametrize("size", QK_SIZES)
@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("method", ["chefer", "chefer_normalised", "grad_rollout"])
def test_gradient_weighted_from_qk(method: str, dtype: str, size: int, seq: int, options: dict) -> None:
    lengths = torch.tensor([seq, max(1, seq // 2)], device=DEVICE)
    mask = torch.arange(seq, device=DEVICE).remainder(3).ne(1).expand(2, seq).contiguous()
    for masks in ({"lengths": lengths}, {"key_mask": mask, "query_mask": mask}):
        problem = qk_problem(2, seq, size, DTYPES[dtype], **masks, **options)
        problem = replace(problem, method=rollout.METHODS[method], handed_on=handed_on(problem, 2, size))
        assert error(_triton.rows_from_qk(problem), problem) <= QK_BOUND
        whole = replace(problem, rows=None)
        assert error(_triton.full_from_qk(whole), whole) <= QK_BOUND


@on_card
@pytest.mark.parametrize("split", [True, False], ids=["split", "resident"])
@pytest.mark.parametrize(("dtype", "columns"), [("fp32", 2), ("fp32", 1), ("bf16", 4), ("bf16", 2), ("bf16", 1)])
def test_the_width_of_loads_changes_no_bit(dtype: str, columns: int, split: bool) -> None:
    problem = maps_problem(3, 512, DTYPES[dtype], Method())
    longer = [torch.nn.functional.pad(m, (columns, 0))[..., columns:] for m in problem.maps]
    other = ops.maps_problem(longer, query=-1)
    assert torch.equal(_triton.rows_from_maps(other, split), _triton.rows_from_maps(problem, split))


Form = Callable[[Tensor, Tensor], Tensor]


def rows(scores: Tensor, lengths: Tensor | None, **options: Any) -> Tensor:
    options = {"query": -1, "lengths": lengths, "backend": "triton", "validate": False} | options
    return rollout.attention_rollout(scores.softmax(-1).unbind(), **options)


def qk_rows(source: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    options = {"query": -1, "lengths": lengths, "backend": "triton", "validate": False} | options
    return rollout.attention_rollout_qk(source.unbind(), source[..., :1, :, :].mul(0.5).unbind(), **options)


def gradient_rows(source: Tensor, lengths: Tensor) -> Tensor:
    values, slopes = source.flip(-1)[:, :, :1].unbind(), source.mul(-2).unbind()
    return qk_rows(source, lengths, values=values, output_gradients=slopes, method="chefer_normalised")


# Public calls as a model makes them, after what makes their maps, or queries and keys, of [L, B, H, S, S or D].
FORMS: dict[str, tuple[int, Form]] = {
    "rows": (0, rows),
    "rows-bf16": (0, lambda scores, lengths: rows(scores.bfloat16(), None, query=3)),
    "rows-weights": (
        0,
        lambda scores, lengths: rows(scores, lengths, query=scores[0, :, :2, 0], method=METHODS["weights"]),
    ),
    "rows-discard": (0, lambda scores, lengths: rows(scores, lengths, method="discard")),
    "full": (0, lambda scores, lengths: rows(scores, lengths, query=None)),
    "qk": (16, qk_rows),
    "qk-mask": (16, lambda source, lengths: qk_rows(source, lengths, key_mask=source[0, :, 0, :, 0] < 1, causal=True)),
    "qk-gradients": (16, gradient_rows),
}

SOME = list(FORMS) if ON_CARD else ["rows-weights", "full", "qk-mask", "qk-gradients"]


def inputs_of(name: str, batch: int, seq: int, layers: int = FEW, seed: int = 0) -> tuple[Form, Tensor, Tensor]:
    size, form = FORMS[name]
    torch.manual_seed(seed)
    heads = 3 if ON_CARD or not size else 1
    source = torch.randn(layers, batch, heads, seq, size or seq, device=DEVICE)
    return form, source, torch.arange(batch, device=DEVICE).mul(-13).add(seq).clamp(min=5)


@pytest.mark.parametrize("seq", [64, 197, 512] if ON_CARD else LENGTHS)
@pytest.mark.parametrize("name", FORMS)
def test_a_sample_has_the_same_bits_in_any_batch_and_run(name: str, seq: int) -> None:
    """In a batch that fills the card the chain of a sample is one program's; in a small one it is split over many."""
    batch = 600 if ON_CARD and name != "full" else 3
    form, source, lengths = inputs_of(name, batch, seq)
    whole = form(source, lengths)
    for _ in range(20 if ON_CARD else 1):
        assert torch.equal(form(source[:, 1:3], lengths[1:3]), whole[1:3])
        assert torch.equal(form(source, lengths), whole)


@pytest.mark.parametrize("name", SOME)
def test_memory_that_nobody_wrote_is_not_read(name: str) -> None:
    given = inputs_of(name, FEW, LENGTHS[-1])
    wanted = given[0](*given[1:])
    with poisoned_memory():
        assert torch.equal(given[0](*given[1:]), wanted)


@pytest.mark.parametrize("name", SOME)
def test_a_call_that_checks_no_values_never_waits_for_the_card(name: str) -> None:
    form, source, lengths = inputs_of(name, FEW, SHORT)
    wanted = form(source, lengths)
    other = inputs_of(name, FEW + 1, SHORT + 2)  # nothing that is kept of a shape helps the first call of another
    with card.no_waiting():
        results = [form(source, lengths), other[0](*other[1:])]
    assert torch.equal(results[0], wanted)
    assert results[1].isfinite().all()


@pytest.mark.parametrize("batch", [FEW, 600] if ON_CARD else [FEW])
@pytest.mark.parametrize("name", SOME)
def test_a_captured_call_replays_whatever_ran_in_between(name: str, batch: int) -> None:
    """The graph holds the model that makes the maps, and all that it points to: tables, counters, scratch memory."""
    form, source, lengths = inputs_of(name, batch, SHORT)
    replay = card.capture(lambda: form(source, lengths))
    for seed in range(1, 4 if ON_CARD else 2):
        _, fresh, _ = inputs_of(name, batch, SHORT, seed=seed)
        wanted = form(fresh, lengths)
        source.copy_(fresh)
        run_others(20 if ON_CARD else 1)
        assert torch.equal(replay(), wanted)


def run_others(times: int) -> None:
    """Calls of other shapes, whose memory is given back."""
    for number in range(times):
        for name in SOME:
            form, source, lengths = inputs_of(name, 1 + number % 5, 7 + number, layers=2)
            form(source, lengths)
    if ON_CARD:
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", SOME)
def test_calls_on_side_streams(name: str) -> None:
    """At once, each on a stream of its own, while the memory of those before is used again."""
    given = [inputs_of(name, 2, SHORT, seed=seed) for seed in range(4 if ON_CARD else 2)]
    wanted = [form(source, lengths) for form, source, lengths in given]
    for _ in range(10 if ON_CARD else 1):
        results = []
        for form, source, lengths in given:
            with card.side_stream():
                results.append(form(source.clone(), lengths.clone()))
        card.finish()
        assert all(map(torch.equal, results, wanted))


@pytest.mark.parametrize("name", SOME)
def test_a_compiled_call_has_the_bits_of_a_plain_one(name: str) -> None:
    form, source, lengths = inputs_of(name, FEW, SHORT)
    run = torch.compile(form, fullgraph=True, backend="inductor" if ON_CARD else "aot_eager")
    # What the compiler makes of the softmax before it may round in another way.
    torch.testing.assert_close(run(source, lengths), form(source, lengths), atol=1e-6, rtol=1e-5)


def test_the_wait_between_programs_under_load() -> None:
    """Many chains, many layers, many runs, another stream busy meanwhile: the same bits every time."""
    batch, layers, seq, side = (64, 16, 256, 2048) if ON_CARD else (2, 2, SHORT, 8)
    torch.manual_seed(0)
    maps = [torch.rand(batch, 2, seq, seq, device=DEVICE) for _ in range(layers)]
    problem = ops.maps_problem(maps, query=-1, validate=False)
    wanted = _triton.rows_from_maps(problem, split=False)
    noise = torch.randn(side, side, device=DEVICE)
    for _ in range(300 if ON_CARD else 2):
        with card.side_stream():
            noise @ noise
        assert torch.equal(_triton.rows_from_maps(problem, split=True), wanted)


def test_more_than_two_to_the_31_elements() -> None:
    """The last sample of a map of 2³¹ elements and more gives what it gives alone."""
    card.needs_memory(12)
    maps = [torch.rand(129, 16, 1024, 1024, device=DEVICE, dtype=torch.float16) for _ in range(2)]
    assert maps[0].numel() > 2**31
    whole = rollout.attention_rollout(maps, query=-1, backend="triton", validate=False)
    problem = ops.maps_problem([m[-1:] for m in maps], query=-1, validate=False)
    assert torch.equal(whole[-1:], _triton.rows_from_maps(problem))
    assert error(whole[-1:], problem) <= MAPS_BOUND


def test_a_full_matrix_of_more_than_two_to_the_31_elements() -> None:
    card.needs_memory(56)
    maps = [torch.rand(33, 1, 8192, 8192, device=DEVICE, dtype=torch.float16)] * 2
    whole = rollout.attention_rollout(maps, backend="triton", validate=False)
    assert whole.numel() > 2**31
    alone = rollout.attention_rollout([m[-1:] for m in maps], backend="triton", validate=False)
    assert torch.equal(whole[-1], alone[0])
    torch.testing.assert_close(alone.sum(-1), torch.ones_like(alone[..., 0]), atol=1e-4, rtol=0)


def test_queries_and_keys_of_more_than_two_to_the_31_elements() -> None:
    card.needs_memory(24)
    queries, keys = ([torch.randn(65, 32, 8192, 128, device=DEVICE, dtype=torch.bfloat16)] * 2 for _ in "qk")
    assert queries[0].numel() > 2**31
    whole = rollout.attention_rollout_qk(queries, keys, query=-1, backend="triton", validate=False)
    last = [[layer[-1:] for layer in layers] for layers in (queries, keys)]
    alone = rollout.attention_rollout_qk(*last, query=-1, backend="triton", validate=False)
    assert torch.equal(whole[-1:], alone)
    torch.testing.assert_close(alone.sum(-1), torch.ones_like(alone[..., 0]), atol=1e-3, rtol=0)


@on_card
@pytest.mark.parametrize("layers", [3, 12])
def test_extra_memory_does_not_grow_with_layers(layers: int) -> None:
    """From maps: one w and up to PARTS partial sums of it a sample, O(B·H·S), not O(B·H·S²)."""
    maps = [torch.rand(8, 12, 512, 512, device=DEVICE)] * layers
    rows = torch.zeros(8, dtype=torch.long, device=DEVICE)
    rollout.attention_rollout(maps, query=rows, backend="triton", validate=False)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    rollout.attention_rollout(maps, query=rows, backend="triton", validate=False)
    assert torch.cuda.max_memory_allocated() - held <= 2 * 4 * 8 * 16 * 512


@on_card
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
