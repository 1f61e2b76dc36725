"""The compiled rows from stored maps: what they serve, in which bits, what they refuse, and that nothing needs them.

The tests that every backend has run on it too, as `MAP_BACKENDS`.
"""

import ctypes
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from rollout import Method
from rollout_kernels import BackendError, _native
from rollout_kernels._native import library, rows
from tests.support.cases import (
    DTYPES,
    NEEDS_NATIVE,
    assert_refused,
    peak_bytes,
    random_gradients,
    random_maps,
    random_qk,
    random_weights,
    same_bits,
)
from tests.support.oracles import assert_close, rollout_matrices, take_rows

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SERVED = {
    "rollout": Method(),
    "plain": Method(renormalize=False),
    "residual": Method(residual=0.25, attention=2.0),
    "max": Method(head_fusion="max"),
    "min": Method(head_fusion="min", renormalize=False),
    "weights": Method(head_fusion=torch.tensor([1.0, -2.0, 3.0])),
    "start": Method(start_layer=1),
}


def native(maps: list[Tensor], query: Any = 0, **options: Any) -> Tensor:
    return rollout.attention_rollout(maps, query=query, backend="native", **options)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=lambda dtype: DTYPES[dtype])
@pytest.mark.parametrize("name", SERVED)
def test_serves(name: str, dtype: torch.dtype):
    """By its own name, so by no other: two samples of several chunks of rows, one of one, and of a whole map."""
    lengths, method = [150, 97, 3], SERVED[name]
    maps = random_maps(3, 3, 150, dtype=dtype)
    full = rollout_matrices(maps, method, lengths)
    for query in (0, -1, torch.tensor([149, 50, -2]), random_weights(3, 150), random_weights(3, 4, 150)):
        result = native(maps, query, lengths=torch.tensor(lengths), method=method)
        assert_close(result, take_rows(full, query, lengths))


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", HALVES, ids=HALVES.get)
@pytest.mark.parametrize("seq", [256, 15], ids=lambda seq: f"S{seq}")
def test_every_half_is_read_as_it_is(dtype: torch.dtype, seq: int):
    """All 65,536 of them as maps, their rows as the result: whole lanes, and a rest that is less than those."""
    count = -(-(1 << 16) // seq**2)
    bits = torch.arange(count * seq**2, dtype=torch.int32).bitwise_and(0xFFFF).to(torch.uint16)
    maps = bits.view(dtype).view(count, seq, seq)
    for first in range(0, seq, 64):
        chosen = torch.arange(first, min(first + 64, seq))
        wide = maps.repeat_interleave(len(chosen), 0)
        result = native([wide], chosen.repeat(count), method="product", validate=False)
        expected = maps[:, chosen].reshape(-1, seq).float()
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.fixture
def threads():
    """Sets the number of threads, which is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@NEEDS_NATIVE
@pytest.mark.parametrize("seq", [40, 300])
@pytest.mark.parametrize("method", [Method(), Method(head_fusion="max", renormalize=False)], ids=["mean", "max"])
def test_bits_hang_on_the_sample_alone(threads: Any, seq: int, method: Method):
    """Not on threads, on who else is in the batch, or on padding: by samples, and by chunks of few long ones."""
    lengths = torch.tensor([seq, seq - 1, seq // 2, 1] * 9)
    maps = random_maps(36, 2, seq, layers=3)
    for query in (-1, random_weights(36, 3, seq)):
        threads(1)
        expected = native(maps, query, lengths=lengths, method=method)
        assert_close(
            expected[:4],
            take_rows(
                rollout_matrices([m[:4] for m in maps], method, lengths[:4].tolist()),
                query if isinstance(query, int) else query[:4],
                lengths[:4].tolist(),
            ),
        )
        for count in (2, 3, 7):
            threads(count)
            assert same_bits(native(maps, query, lengths=lengths, method=method), expected)
        for b, n in enumerate(lengths[:4].tolist()):
            alone = [m[b : b + 1, :, :n, :n] for m in maps]
            start = query if isinstance(query, int) else query[b : b + 1, :, :n]
            assert same_bits(native(alone, start, method=method), expected[b : b + 1, ..., :n])


@NEEDS_NATIVE
def test_calls_from_several_threads_at_once():
    maps = random_maps(4, 3, 130)
    expected = native(maps)
    with ThreadPoolExecutor(4) as pool:
        assert all(same_bits(each, expected) for each in pool.map(lambda _: native(maps), range(40)))
    assert_close(expected, rollout_matrices(maps, Method())[:, 0])


@NEEDS_NATIVE
@pytest.mark.skipif(sys.platform != "linux", reason="no page is locked here")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=lambda dtype: DTYPES[dtype])
def test_nothing_is_read_past_the_maps(dtype: torch.dtype):
    """Maps that fill a page to its end, with no page after it that may be read; else this ends with the process."""
    page, seq = mmap.PAGESIZE, 8
    heads = page // (seq * seq * dtype.itemsize)
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
    maps = torch.frombuffer(memory, dtype=dtype, count=page // dtype.itemsize).view(1, heads, seq, seq)
    maps.copy_(random_maps(1, heads, seq, layers=1, dtype=dtype)[0])
    assert_close(
        native([maps] * 2, random_weights(1, seq)),
        take_rows(rollout_matrices([maps] * 2, Method()), random_weights(1, seq)),
    )


@NEEDS_NATIVE
def test_rows_that_nobody_starts_from_are_not_read():
    """Causal maps below a start row: what lies there has weight 0, and may hold anything."""
    maps = [m.tril() / m.tril().sum(-1, keepdim=True) for m in random_maps(2, 2, 20)]
    expected = rollout_matrices(maps, Method())[:, 7]
    for m in maps:
        m[:, :, 8:] = torch.nan
    assert_close(native(maps, 7), expected)


@NEEDS_NATIVE
@pytest.mark.parametrize("batch", [2, 40], ids=["chunks", "samples"])
def test_memory_beyond_the_maps_does_not_grow_with_layers(batch: int):
    """Two layers' results of each chunk of rows, [B, 8, R, S] at most, whatever the depth."""
    one = random_maps(batch, 2, 256, layers=1)
    shallow, deep = (peak_bytes(lambda maps=one * layers: native(maps)) for layers in (2, 8))
    assert deep == shallow <= 2 * (4 + 1 + 1) * batch * 256 * 4 + (1 << 16)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"query": None}, "query=None asks for the full matrix, and it computes rows"),
    "starts": ({"query": torch.ones(2, 33, 6)}, "33 start rows a sample are more than 32"),
    "discard": ({"method": "discard"}, "discard_ratio=0.9 needs whole maps"),
    "gradients": ({"method": "chefer"}, "the method is weighted by gradients"),
    "values": (
        {
            "method": "value_norm",
            "values": [torch.ones(2, 3, 6, 4)] * 3,
            "output_weights": [torch.ones(3, 4, 5)] * 3,
            "inputs": [torch.ones(2, 6, 5)] * 3,
        },
        "it reads no values",
    ),
    "function": ({"method": Method(head_fusion=lambda a, g: a.mean(1))}, "head_fusion is a function"),
    "float64": ({"dtype": torch.float64}, "maps are torch.float64, not float32, bfloat16 or float16"),
    "columns": ({"turned": True}, "the columns of a map do not lie next to each other"),
}


@NEEDS_NATIVE
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_reason_and_auto_serves(name: str):
    given, reason = REFUSED[name]
    given = {"query": 0} | given
    maps = random_maps(2, 3, 6, dtype=given.pop("dtype", torch.float32))
    if given.pop("turned", False):
        maps = [m.mT.contiguous().mT for m in maps]
    slopes = random_gradients(maps)
    call = lambda backend: rollout.attention_rollout(maps, gradients=slopes, backend=backend, **given)  # noqa: E731
    assert_refused(
        BackendError, ("attention_rollout: backend='native' cannot serve", f"native: {reason}"), lambda: call("native")
    )
    assert same_bits(call("auto"), call("torch"))


@NEEDS_NATIVE
def test_tensors_that_are_not_what_lies_in_memory():
    class Marked(Tensor):
        """A subclass may give its data any meaning."""

    maps = [m.as_subclass(Marked) for m in random_maps(1, 2, 5, layers=2)]
    assert_refused(BackendError, ("maps are no plain dense tensors",), lambda: native(maps))
    negated = torch.imag(torch.complex(torch.zeros(1, 2, 5, 10), -torch.rand(1, 2, 5, 10)).conj())[..., :5]
    negated = negated.as_strided(negated.shape, (*negated.stride()[:-1], 1))
    assert negated.is_neg()
    assert_refused(BackendError, ("a map is a view of negated memory",), lambda: native([negated]))


def test_refuses_queries_and_keys():
    call = lambda: rollout.attention_rollout_qk(*random_qk(1, 2, 5), query=0, backend="native")  # noqa: E731
    assert_refused(BackendError, ("attention_rollout_qk: ", "native: it computes from stored maps only"), call)


@pytest.fixture
def loaded_anew():
    """Whatever a test makes of the library is found by itself and forgotten afterwards."""
    library._load.cache_clear()
    yield
    library._load.cache_clear()


BROKEN = {
    "not built": ("EXTENSION_SUFFIXES", [], "it was not compiled when this package was installed"),
    "no library": ("EXTENSION_SUFFIXES", [".text"], "its library cannot be loaded"),
    "another version": ("Job", library.Layer, "compiled from another version of this package: install it again"),
    "no pool": ("_POOL", "torch_serial_for", f"torch {torch.__version__} exports no torch_serial_for"),
}


@pytest.mark.usefixtures("loaded_anew")
@pytest.mark.parametrize("case", BROKEN)
def test_without_the_library_auto_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, case: str):
    """And its refusal says what is missing."""
    name, value, reason = BROKEN[case]
    if case in ("another version", "no pool") and _native.unusable() is not None:
        pytest.skip(f"no native kernel: {_native.unusable()}")
    library._load.cache_clear()
    if case == "no library":
        (tmp_path / "_rows.text").write_text("no library")
        monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(library, name, value)
    maps = random_maps(2, 3, 8)
    assert_refused(BackendError, ("native: ", reason), lambda: native(maps))
    auto = rollout.attention_rollout(maps, query=0)
    assert same_bits(auto, rollout.attention_rollout(maps, query=0, backend="torch"))
    assert_close(auto, rollout_matrices(maps, Method())[:, 0])


@NEEDS_NATIVE
def test_the_layout_of_scratch_memory_is_the_kernels():
    """The sizes that Python allocates by are those in the C file."""
    text = (library.Path(library.__file__).with_name("rows.c")).read_text(encoding="utf-8")
    for name in ("LANES", "BLOCK", "BLOCK_FLOATS", "CHUNKS", "SHORTEST_CHUNK"):
        assert f" {name} = {getattr(rows, name)}" in text
