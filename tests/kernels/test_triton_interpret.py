"""The Triton kernels against the float64 oracle, in Triton's interpreter.

What is not shown here: races and the wait between programs (programs run one after another and barriers do nothing;
test_triton_schedules.py has them take turns), the rounding of tensor-core products (tf32 and bf16 products run in
float32; bf16 operands are upcast before them), what the compiler makes of the code. The compile lane shows the last,
the GPU lane the others.

It must be chosen before Triton is imported, so these tests run in a process of their own, started by
test_triton_lanes.py; by hand: `TRITON_INTERPRET=1 pytest tests/kernels/test_triton_interpret.py`.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rollout_kernels import _problem, ops, reference
from rollout_kernels.method import Method
from tests.support.tensor_cores import dot_bf16x6
from tests.support.triton_cases import (
    DTYPES,
    INTERPRETING,
    MARKS,
    QUERIES,
    bounds_of_loops,
    error,
    make_query,
    pairwise,
    poison,
)

pytestmark = MARKS
__all__ = ["bounds_of_loops", "poison"]  # fixtures
if INTERPRETING:
    from triton.runtime.errors import OutOfResources

    from rollout_kernels import _triton
    from rollout_kernels._triton import inputs, launch
    from rollout_kernels._triton.prepare import CHUNK
    from rollout_kernels._triton.rows_resident import rows_resident
    from rollout_kernels._triton.rows_split import rows_split

MAPS_BOUND = 1e-6  # max|err| / max|ref|, the project's bound for maps; 16-bit maps are read exactly, so theirs too

METHODS = {
    "mean": Method(),
    "max": Method(head_fusion="max"),
    "min": Method(head_fusion="min", residual=0.3),
    "weights": Method(head_fusion=torch.tensor([0.5, 2.0, -0.25])),
    "plain": Method(renormalize=False),
    "chefer": Method(residual=1.0, attention=1.0, renormalize=False, gradients="clamp_then_fuse"),
    "grad_rollout": Method(gradients="fuse_then_clamp"),
    "grad_max": Method(head_fusion="max", gradients="clamp_then_fuse"),
    "product": Method(residual=0.0, attention=1.0, renormalize=False),
    "start_layer": Method(start_layer=1),
    # Not the mean: which of two entries is smaller must not hang on how they were summed.
    "discard": Method(head_fusion="max", discard_ratio=0.7),
    "discard_min": Method(head_fusion="min", discard_ratio=0.35, renormalize=False),
}
SHAPES = {  # B, H, S, L: one row, odd, the padded width and one less and more, several blocks a part
    "B1-H1-S1-L1": (1, 1, 1, 1),
    "B2-H3-S31-L3": (2, 3, 31, 3),
    "B3-H3-S32-L2": (3, 3, 32, 2),
    "B2-H3-S33-L2": (2, 3, 33, 2),
    "B1-H3-S64-L2": (1, 3, 64, 2),
}
LAYOUTS = ("contiguous", "transposed", "sliced", "no head axis")


def test_pairwise_covers_every_pair() -> None:
    rows = pairwise([0, 1, 2], ["a", "b"], [True, False])
    assert {(r[0], r[1]) for r in rows} == set(itertools.product([0, 1, 2], "ab"))
    assert {(r[0], r[2]) for r in rows} == set(itertools.product([0, 1, 2], [True, False]))
    assert len(rows) < 12


def softmax_maps(shape: tuple[int, ...], count: int, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.softmax(2 * torch.randn(shape), -1) for _ in range(count)]


def lay_out(maps: list[Tensor], layout: str) -> list[Tensor]:
    """The same values in another memory layout."""
    if layout == "transposed":  # the last axis is not the contiguous one
        return [m.transpose(-1, -2).contiguous().transpose(-1, -2) for m in maps]
    if layout == "sliced":  # rows that do not start on 16 bytes
        return [torch.nn.functional.pad(m, (1, 2), value=math.nan)[..., 1:-2] for m in maps]
    if layout == "no head axis":
        return [maps[0], *(m[:, 0] for m in maps[1:])]
    return maps


def poison_padding(tensors: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
    """NaN beyond each sample's length: it must not leak."""
    if lengths is None:
        return tensors
    for tensor, (b, n) in itertools.product(tensors, enumerate(lengths.tolist())):
        tensor[b, ..., n:, :] = math.nan
        tensor[b, ..., :, n:] = math.nan
    return tensors


def maps_case(
    method: str, dtype: str, shape: str, query: str, ragged: bool, layout: str = "contiguous"
) -> _problem.MapsProblem:
    batch, heads, seq, layers = SHAPES[shape]
    chosen = METHODS[method]
    if method == "weights" and heads != 3:
        chosen = Method(head_fusion=torch.ones(heads))
    if method == "start_layer":
        layers += 1
    lengths = torch.tensor([max(1, seq - 11 * b) for b in range(batch)]) if ragged else None
    maps = poison_padding(softmax_maps((batch, heads, seq, seq), layers, seed=1), lengths)
    maps = lay_out([m.to(DTYPES[dtype]) for m in maps], layout)
    grads = None
    if chosen.gradients is not None:
        grads = [torch.randn(m.shape) for m in maps]
    return ops.maps_problem(
        maps, query=make_query(query, batch, seq, lengths), lengths=lengths, gradients=grads, method=chosen
    )


def check_rows(problem: _problem.MapsProblem) -> None:
    assert _triton.refusals_maps(problem) == []
    resident = _triton.rows_from_maps(problem, split=False)
    split = _triton.rows_from_maps(problem, split=True)
    assert error(resident, problem) <= MAPS_BOUND
    assert torch.equal(resident, split)
    if problem.lengths is not None:
        for b, n in enumerate(problem.lengths.tolist()):
            assert torch.equal(resident[b, ..., n:], torch.zeros_like(resident[b, ..., n:]))


ROWS = [list(METHODS), list(DTYPES), list(SHAPES), list(QUERIES), [False, True]]


@pytest.mark.parametrize(("method", "dtype", "shape", "query", "ragged"), pairwise(*ROWS))
def test_rows_from_maps(method: str, dtype: str, shape: str, query: str, ragged: bool) -> None:
    check_rows(maps_case(method, dtype, shape, query, ragged))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("method", list(METHODS))
def test_rows_from_maps_every_combination(method: str, dtype: str) -> None:
    for shape, query, ragged in itertools.product(SHAPES, QUERIES, [False, True]):
        check_rows(maps_case(method, dtype, shape, query, ragged))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize(("method", "dtype"), [("mean", "fp32"), ("max", "bf16"), ("grad_rollout", "fp16")])
def test_rows_from_maps_in_any_layout(layout: str, method: str, dtype: str) -> None:
    check_rows(maps_case(method, dtype, "B3-H3-S32-L2", "last", True, layout))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_from_maps_of_any_shape(data: st.DataObject) -> None:
    batch, heads, seq, layers = (
        data.draw(st.integers(1, top), label) for top, label in ((3, "B"), (4, "H"), (48, "S"), (3, "L"))
    )
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, seq), min_size=batch, max_size=batch), "lengths"))
    maps = poison_padding(softmax_maps((batch, heads, seq, seq), layers, seed=seq), lengths)
    method = Method(
        head_fusion=data.draw(st.sampled_from(["mean", "max", "min"]), "fusion"),
        residual=data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]), "residual"),
        attention=1.0,
        renormalize=data.draw(st.booleans(), "renormalize"),
    )
    query = data.draw(st.one_of(st.just(-1), st.just(0), st.integers(1, 3)), "query")
    start = torch.randn(batch, query, seq) if query > 0 else query
    check_rows(ops.maps_problem(maps, query=start, lengths=lengths, method=method))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_several_row_blocks_in_a_part(parts: int) -> None:
    """The shipped tables give a part one block at these sizes; longer rows give it several."""
    config = replace(launch.rows_launch(64, torch.float32), parts=parts)
    lengths = torch.tensor([64, 33])
    maps = poison_padding(softmax_maps((2, 2, 64, 64), 3, seed=5), lengths)
    problem = ops.maps_problem(maps, query=torch.randn(2, 2, 64), lengths=lengths)
    results = []
    for kernel in (rows_resident, rows_split):
        arguments = inputs.map_inputs(problem)
        kernel(arguments, config)
        results.append(arguments.out)
        assert error(arguments.out, problem) <= MAPS_BOUND
    assert torch.equal(*results)


@pytest.mark.parametrize("split", [False, True], ids=["resident", "split"])
def test_blocks_of_zero_weight_are_left_out(split: bool) -> None:
    """NaN in blocks of rows that w does not touch stays out of the result."""
    maps = softmax_maps((1, 2, 64, 64), 2, seed=3)
    maps[1][..., 32:] = 0.0
    for m in maps:
        m[:, :, 32:] = math.nan
    start = torch.zeros(1, 64)
    start[:, :16] = torch.rand(1, 16)
    problem = ops.maps_problem(maps, query=start, validate=False)
    clean = [m.nan_to_num(0.25) for m in maps]
    wanted = reference.rollout(ops.maps_problem(clean, query=start, validate=False))
    result = _triton.rows_from_maps(problem, split=split)
    assert float((result - wanted).abs().max() / wanted.abs().max()) <= MAPS_BOUND


def test_nan_in_a_map_shows() -> None:
    maps = softmax_maps((2, 2, 17, 17), 2, seed=4)
    maps[0][1, 0, 3, 5] = math.nan
    for method in ("mean", "max", "min"):
        problem = ops.maps_problem(maps, query=0, method=METHODS[method], validate=False)
        for split in (False, True):
            result = _triton.rows_from_maps(problem, split=split)
            assert torch.isfinite(result[0]).all()
            assert torch.isnan(result[1]).any()


def test_a_sample_has_the_same_bits_in_any_batch() -> None:
    maps = softmax_maps((5, 2, 40, 40), 3, seed=6)
    whole = _triton.rows_from_maps(ops.maps_problem(maps, query=-1), split=False)
    for b in range(5):
        one = ops.maps_problem([m[b : b + 1] for m in maps], query=-1)
        assert torch.equal(_triton.rows_from_maps(one, split=True)[0], whole[b])


@pytest.mark.parametrize(("dtype", "columns"), [("fp32", 2), ("fp32", 1), ("bf16", 4), ("bf16", 2), ("bf16", 1)])
def test_the_width_of_loads_changes_no_bit(dtype: str, columns: int) -> None:
    """The same values in rows that allow 16 bytes a load, and in rows some columns longer that allow less."""
    maps = [m.to(DTYPES[dtype]) for m in softmax_maps((2, 3, 32, 32), 3, seed=9)]
    longer = [torch.nn.functional.pad(m, (columns, 0), value=math.nan)[..., columns:] for m in maps]
    results, widths = [], []
    for tensors in (maps, longer):
        problem = ops.maps_problem(tensors, query=-1)
        widths.append(inputs.map_inputs(problem).vector)
        results.append(_triton.rows_from_maps(problem))
    assert widths == [16 // DTYPES[dtype].itemsize, columns]
    assert torch.equal(*results)


def test_head_weights_and_layers_beyond_one_launch_of_tables() -> None:
    """A table of more numbers than a launch carries is filled by several."""
    maps = softmax_maps((1, 3, 5, 5), 50, seed=10)
    problem = ops.maps_problem(maps, query=-1, method=METHODS["weights"])
    assert len(inputs.map_inputs(problem).values.integers) > CHUNK
    check_rows(problem)


def test_a_regime_the_device_cannot_hold_gives_way_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_split(*arguments: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    problem = ops.maps_problem(softmax_maps((1, 2, 17, 17), 2, seed=7), query=0)
    wanted = _triton.rows_from_maps(problem, split=True)
    monkeypatch.setattr(_triton, "rows_split", rows_split)
    with pytest.warns(RuntimeWarning, match="rows_split cannot run on this device.*shared memory.*rows_resident"):
        result = _triton.rows_from_maps(problem, split=True)
    assert torch.equal(result, wanted)


def test_a_batch_is_split_when_its_chains_do_not_fill_the_device() -> None:
    assert launch.splits(chains=8, seq=512, name="default", processors=132)
    assert not launch.splits(chains=264, seq=512, name="default", processors=132)
    assert launch.splits(chains=264, seq=4096, name="default", processors=132)


def test_empty_batch() -> None:
    problem = ops.maps_problem([torch.ones(0, 2, 4, 4)], query=0)
    assert _triton.rows_from_maps(problem).shape == (0, 4)


@pytest.mark.parametrize(
    ("maps", "method", "reason"),
    [
        ([torch.ones(1, 1, 2, 2).double()], Method(), "maps are float64"),
        ([torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2).half()], Method(), "different dtypes"),
        ([torch.ones(1, 1, 2, 2)], Method(head_fusion=lambda a, g: a.mean(1)), "Python function"),
        ([torch.ones(1, 1, 1, 1).expand(1, 1, 9000, 9000)], Method(), "S = 9000"),
    ],
    ids=["float64", "mixed", "function", "long"],
)
def test_refusals_give_a_reason(maps: list[Tensor], method: Method, reason: str) -> None:
    reasons = _triton.refusals_maps(ops.maps_problem(maps, query=0, method=method, validate=False))
    assert len(reasons) == 1
    assert reason in reasons[0]


FULL = [list(METHODS), list(DTYPES), list(SHAPES), [False, True]]


@pytest.mark.parametrize(("method", "dtype", "shape", "ragged"), pairwise(*FULL))
def test_full_matrix_from_maps(method: str, dtype: str, shape: str, ragged: bool) -> None:
    problem = replace(maps_case(method, dtype, shape, "row", ragged), rows=None)
    assert problem.form == "full"
    assert _triton.refusals_maps(problem) == []
    result = _triton.full_from_maps(problem)
    assert error(result, problem) <= MAPS_BOUND
    if problem.lengths is not None:
        for b, n in enumerate(problem.lengths.tolist()):
            assert not result[b, n:].any()
            assert not result[b, :, n:].any()


def test_rows_are_rows_of_the_full_matrix() -> None:
    maps = softmax_maps((2, 3, 70, 70), 4, seed=8)
    full = _triton.full_from_maps(ops.maps_problem(maps))
    rows = _triton.rows_from_maps(ops.maps_problem(maps, query=torch.tensor([5, 69])))
    assert float((torch.stack([full[0, 5], full[1, 69]]) - rows).abs().max()) <= MAPS_BOUND


def emulated_dot(builder: object, a: Any, b: Any, d: Any, *precision: object) -> Any:
    from triton.runtime.interpreter import TensorHandle

    left, right, accumulator = (torch.from_numpy(np.ascontiguousarray(x.data)) for x in (a, b, d))
    return TensorHandle(dot_bf16x6(left, right, accumulator).numpy(), d.dtype.scalar)


def test_full_matrix_with_products_rounded_as_tensor_cores_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the identity inside the product the error here is 8e-7, and at S = 256 beyond the bound on a card."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", emulated_dot)
    problem = ops.maps_problem(softmax_maps((1, 8, 64, 64), 4, seed=8))
    assert 1e-8 < error(_triton.full_from_maps(problem), problem) <= MAPS_BOUND / 4
