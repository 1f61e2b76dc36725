"""The value-aware methods on every backend: by hand, against every mixed vector written out, padding, tiles, memory."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from rollout import Method
from rollout_kernels._torch import maps as stored
from rollout_kernels._torch import qk, values
from tests.support.cases import (
    BACKENDS,
    assert_refused,
    generator,
    peak_bytes,
    poison,
    poisoned_memory,
    random_qk,
    random_weights,
)
from tests.support.oracles import softmax_maps, take_rows

B, H, S, D, E, L = 3, 4, 11, 5, 7, 3
LENGTHS = [11, 4, 7]
NAMES = ("value_norm", "kobayashi")
QUERIES = {
    "full": None, "row": 0, "last": -1, "rows": torch.tensor([3, 0, -2]),
    "weights": random_weights(B, S), "weightings": random_weights(B, 2, S),
}  # fmt: skip


def random_values(groups: int = H, dtype: torch.dtype = torch.float64, layers: int = L) -> dict[str, list[Tensor]]:
    """Values [B, groups, S, D], output weights [H, D, E] and inputs [B, S, E] of every layer."""
    source = generator(7)
    shapes = {"values": (B, groups, S, D), "output_weights": (H, D, E), "inputs": (B, S, E)}
    return {
        name: [torch.randn(shape, generator=source).to(dtype) for _ in range(layers)] for name, shape in shapes.items()
    }


def matrices(
    maps: Sequence[Any], given: dict[str, list[Tensor]], method: Method, lengths: list[int] | None = None
) -> Tensor:
    """The product of M_l [B, S, S], float64, every vector of every pair of positions written out."""
    full = torch.zeros(B, S, S, dtype=torch.float64)
    for b in range(B):
        n = S if lengths is None else lengths[b]
        product = torch.eye(n, dtype=torch.float64)
        for layer in range(len(maps)):
            a = torch.as_tensor(maps[layer])[b, :, :n, :n].double()
            v, w, x = (given[name][layer].double() for name in ("values", "output_weights", "inputs"))
            heads = [v[b, h // (H // v.shape[1]), :n] @ w[h] for h in range(H)]
            rows = torch.zeros(n, n, dtype=torch.float64)
            for i in range(n):
                for j in range(n):
                    vectors = [a[h, i, j] * heads[h][j] * method.attention_weight for h in range(H)]
                    own = [method.residual * x[b, i]] if i == j else []
                    if method.values == "norm_then_sum":
                        rows[i, j] = sum(float(vector.norm()) for vector in vectors + own)
                    else:
                        rows[i, j] = sum(vectors + own).norm()
            product = (rows / rows.sum(1, keepdim=True) if method.renormalize else rows) @ product
        full[b, :n, :n] = product
    return full


def worst(result: Tensor, full: Tensor, query: Any, lengths: list[int] | None = None) -> float:
    wanted = torch.as_tensor(take_rows(full.numpy(), query, lengths))
    assert result.shape == wanted.shape
    return float((result.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Two positions, two heads, one layer; the vectors are (3, 4) and (0, 2) of head 0, (−3, −4) and (2, 0) of head 1,
    the inputs (0, 1) and (5, 12)."""
    maps = [torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]]], dtype=torch.float64)]
    given = {
        "values": [torch.tensor([[[[3.0, 4.0], [0.0, 2.0]], [[3.0, 4.0], [-2.0, 0.0]]]], dtype=torch.float64)],
        "output_weights": [torch.stack([torch.eye(2), -torch.eye(2)]).double()],
        "inputs": [torch.tensor([[[0.0, 1.0], [5.0, 12.0]]], dtype=torch.float64)],
    }
    # Row 0: ½·5 + ½·5 + 1, and ½·2 + ½·2. Row 1: 1·5 + ½·5, and ½·2 + 13.
    by_heads = [[6 / 8, 2 / 8], [7.5 / 21.5, 14 / 21.5]]
    # Row 0: the heads cancel, (0, 1) is left; ½(0, 2) + ½(2, 0). Row 1: ½(3, 4); ½(2, 0) + (5, 12).
    mixed = [1.0, math.sqrt(2), 2.5, math.sqrt(180)]
    summed = [
        [mixed[0] / sum(mixed[:2]), mixed[1] / sum(mixed[:2])],
        [mixed[2] / sum(mixed[2:]), mixed[3] / sum(mixed[2:])],
    ]
    for name, wanted in (("value_norm", by_heads), ("kobayashi", summed)):
        result = rollout.attention_rollout(maps, method=name, backend=backend, **given)
        assert float((result[0] - torch.tensor(wanted, dtype=torch.float64)).abs().max()) <= 1e-15


MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "lengths": {"lengths": LENGTHS},
    "masks": {
        "lengths": LENGTHS,
        "key_mask": torch.rand(B, S, generator=generator(1)) < 0.6,
        "query_mask": torch.rand(B, S, generator=generator(2)) < 0.8,
        "window": (4, 2),
    },
    "sinks": {"sinks": [random_weights(H, seed=layer) for layer in range(L)], "softcap": 2.0},
}
METHODS = {
    **{name: rollout.METHODS[name] for name in NAMES},
    "value_norm-plain": Method(residual=0.5, attention=0.25, renormalize=False, values="norm_then_sum"),
    "kobayashi-weighted": Method(residual=-0.5, attention=2.0, values="sum_then_norm"),
    "start": Method(residual=1.0, attention=1.0, values="norm_then_sum", start_layer=1),
}


@pytest.mark.parametrize("groups", [4, 2, 1], ids=lambda g: f"Hv{g}")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", METHODS)
def test_stored_maps_and_queries_give_what_every_vector_written_out_gives(name: str, mask: str, groups: int) -> None:
    queries, keys = random_qk(B, H, S, groups=2, dtype=torch.float64)
    maps, _ = softmax_maps(queries, keys, **MASKS[mask])
    given, method = random_values(groups), METHODS[name]
    rest = {argument: value for argument, value in MASKS[mask].items() if argument != "lengths"}
    lengths = MASKS[mask].get("lengths")
    ends = None if lengths is None else torch.tensor(lengths)
    kept = {argument: tensors[method.start_layer :] for argument, tensors in given.items()}
    full = matrices(maps[method.start_layer :], kept, method, lengths)
    layers = [torch.from_numpy(layer) for layer in maps]
    for backend in BACKENDS:
        for query in QUERIES.values():
            options = {"query": query, "lengths": ends, "method": method, "backend": backend, **given}
            with poisoned_memory():
                assert worst(rollout.attention_rollout(layers, **options), full, query, lengths) <= 1e-12
                result = rollout.attention_rollout_qk(queries, keys, **rest, **options)
                assert worst(result, full, query, lengths) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    queries, keys = random_qk(B, H, S, dtype=dtype)
    maps, _ = softmax_maps(queries, keys, LENGTHS)
    narrow, given = [torch.from_numpy(layer).to(dtype) for layer in maps], random_values(2, dtype)
    for query in (None, 0, QUERIES["weightings"]):
        options = {"query": query, "lengths": torch.tensor(LENGTHS), "method": name, "backend": "torch", **given}
        result = rollout.attention_rollout_qk(queries, keys, **options)
        assert result.dtype == torch.float32
        assert worst(result, matrices(maps, given, METHODS[name], LENGTHS), query, LENGTHS) <= 3e-6
        result = rollout.attention_rollout(narrow, **options)
        assert worst(result, matrices(narrow, given, METHODS[name], LENGTHS), query, LENGTHS) <= 1e-6


@pytest.mark.parametrize("tile_bytes", [1, 4 * 11 * 4 * 5, 4 * 11 * 11 * 4, 4 << 20], ids=lambda n: f"tile{n}")
@pytest.mark.parametrize("name", NAMES)
def test_any_tiling_gives_the_same(monkeypatch: pytest.MonkeyPatch, name: str, tile_bytes: int) -> None:
    monkeypatch.setattr(qk, "CPU_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(stored, "CPU_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(values, "KEYS", 3)
    queries, keys = random_qk(B, H, S, dtype=torch.float64)
    maps, _ = softmax_maps(queries, keys, LENGTHS, causal=True)
    given = random_values()
    full, layers = matrices(maps, given, METHODS[name], LENGTHS), [torch.from_numpy(layer) for layer in maps]
    for query in QUERIES.values():
        options = {"query": query, "lengths": torch.tensor(LENGTHS), "method": name, "backend": "torch", **given}
        with poisoned_memory():
            result = rollout.attention_rollout_qk(queries, keys, causal=True, **options)
            assert worst(result, full, query, LENGTHS) <= 1e-12
            assert worst(rollout.attention_rollout(layers, **options), full, query, LENGTHS) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_zero_and_never_read(name: str) -> None:
    queries, keys = random_qk(B, H, S, dtype=torch.float64)
    maps, _ = softmax_maps(queries, keys, LENGTHS)
    given = random_values()
    full = matrices(maps, given, METHODS[name], LENGTHS)
    layers = poison([torch.from_numpy(layer) for layer in maps], LENGTHS, (-1, -2))
    given["values"] = poison(given["values"], LENGTHS, (-2,))
    given["inputs"] = poison(given["inputs"], LENGTHS, (-2,))
    for backend in BACKENDS:
        for query in (None, 0, -1, QUERIES["weights"]):
            options = {"query": query, "lengths": torch.tensor(LENGTHS), "method": name, "backend": backend, **given}
            for result in (
                rollout.attention_rollout(layers, **options), rollout.attention_rollout_qk(queries, keys, **options)
            ):  # fmt: skip
                assert worst(result, full, query, LENGTHS) <= 1e-12
                for b, n in enumerate(LENGTHS):
                    assert not result[b, ..., n:].any()


def test_heads_that_cancel_keep_their_digits() -> None:
    """Two heads that hand on opposite vectors but for a hundred-thousandth: a Gram matrix in float32 says 0 or NaN."""
    given = random_values(dtype=torch.float32, layers=1)
    for name in ("values", "output_weights"):
        given[name][0] = given[name][0].clone()
    given["values"][0][:, 1:] = given["values"][0][:, :1]
    given["output_weights"][0][1] = -given["output_weights"][0][0] * (1 + 1e-5)
    given["output_weights"][0][2:] = 0.0
    maps = [torch.full((B, H, S, S), 1 / S)]
    method = Method(residual=0.0, attention=1.0, renormalize=False, values="sum_then_norm")
    result = rollout.attention_rollout(maps, query=0, method=method, backend="torch", **given)
    wanted = matrices(maps, given, method)[:, 0]
    scale = float(given["values"][0].norm(dim=-1).max() * given["output_weights"][0].norm(dim=(1, 2)).max()) / S
    assert float((result - wanted).abs().max()) <= 1e-6 * scale
    assert float(((result - wanted) / wanted).abs().max()) <= 0.05


@pytest.mark.parametrize("shape", [(5, 3), (3, 8), (1, 1)], ids=["D5-E3", "D3-E8", "D1-E1"])
@pytest.mark.parametrize("name", NAMES)
def test_any_width(name: str, shape: tuple[int, int]) -> None:
    """Fewer outputs than heads or than D_v: the triangles are not square, or singular."""
    dim, width = shape
    given = random_values()
    given = {
        "values": [v[..., :1].expand(-1, -1, -1, dim) if dim > D else v[..., :dim] for v in given["values"]],
        "output_weights": [random_weights(H, dim, width, seed=i).double() for i in range(L)],
        "inputs": [random_weights(B, S, width, seed=9 + i).double() for i in range(L)],
    }
    maps = [random_weights(B, H, S, S, seed=i).double().softmax(-1) for i in range(L)]
    full = matrices(maps, given, METHODS[name])
    for query in (None, 0):
        assert worst(rollout.attention_rollout(maps, query=query, method=name, **given), full, query) <= 1e-12


def test_value_norm_from_queries_needs_a_tile_and_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside plain rollout's: nothing per layer, nothing of S² or of B·S·E."""
    tile, batch, heads, seq, dim = 1 << 16, 24, 4, 128, 32
    monkeypatch.setattr(qk, "CPU_TILE_BYTES", tile)
    weights, inputs = torch.randn(heads, dim, 96), torch.randn(batch, seq, 96)

    def peak(layers: int, method: str) -> int:
        queries, keys = random_qk(batch, heads, seq, dim, layers=1)
        vectors = {"values": keys * layers, "output_weights": [weights] * layers, "inputs": [inputs] * layers}
        return peak_bytes(
            lambda: rollout.attention_rollout_qk(
                queries * layers, keys * layers, query=0, backend="torch", method=method, **vectors
            )
        )

    shallow, deep = peak(2, "value_norm"), peak(6, "value_norm")
    assert deep - shallow <= 4 * heads * dim * dim * 4  # the triangles of a layer
    assert deep <= peak(6, "rollout") + 4 * heads * seq * dim * 4 + 4 * batch * heads * seq * 4 + 2 * tile


@pytest.mark.parametrize("name", NAMES)
def test_not_finite_is_named(name: str) -> None:
    queries, keys = random_qk(B, H, S)
    for argument in ("values", "output_weights", "inputs"):
        given = random_values(dtype=torch.float32)
        given[argument][1].view(-1)[0] = math.nan
        assert_refused(
            ValueError, (f"{argument}[1] must be finite",),
            lambda given=given: rollout.attention_rollout_qk(queries, keys, method=name, **given),
        )  # fmt: skip


ZEROS = {name: torch.zeros(shape) for name, shape in {"v": (B, H, S, D), "x": (B, S, E)}.items()}
WRONG = {
    "missing-values": (ValueError, "values must be given", {"values": None}),
    "missing-weights": (ValueError, "output_weights must be given", {"output_weights": None}),
    "missing-inputs": (ValueError, "inputs must be given", {"inputs": None}),
    "one-tensor": (TypeError, "inputs must be a sequence", {"inputs": ZEROS["x"]}),
    "layers": (ValueError, "values must have one tensor per layer, 3, got 2", {"values": [ZEROS["v"]] * 2}),
    "dtype": (TypeError, "values[0] must be float32", {"values": [ZEROS["v"].long()] * 3}),
    "groups": (ValueError, "H = 4 a multiple of H_v, got [3, 3, 11, 5]", {"values": [ZEROS["v"][:, :3]] * 3}),
    "seq": (
        ValueError,
        "values[0] must be [B, H_v, S, D_v] = [3, H_v, 11, D_v]",
        {"values": [ZEROS["v"][:, :, :9]] * 3},
    ),
    "weights": (
        ValueError,
        "output_weights[0] must be [H, D_v, E] = [4, 5, E], got [7, 20]",
        {"output_weights": [torch.zeros(E, H * D)] * 3},
    ),
    "inputs": (
        ValueError,
        "inputs[0] must be [B, S, E] = [3, 11, 7], got [3, 11, 6]",
        {"inputs": [ZEROS["x"][..., :6]] * 3},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_before_any_work(case: str) -> None:
    error, said, change = WRONG[case]
    queries, keys = random_qk(B, H, S)
    given = {**random_values(dtype=torch.float32), **change}
    maps = [torch.full((B, H, S, S), math.nan)] * L  # any work on which would be refused otherwise
    for call in (
        lambda: rollout.attention_rollout_qk(queries, keys, method="value_norm", **given),
        lambda: rollout.attention_rollout(maps, method="kobayashi", **given),
    ):
        assert_refused(error, (said,), call)


def test_other_methods_read_no_values() -> None:
    maps = [torch.rand(B, H, S, S) for _ in range(L)]
    assert torch.equal(rollout.attention_rollout(maps, values="nothing"), rollout.attention_rollout(maps))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"values": "norm"}, "values must be None or one of"),
        ({"head_fusion": "max"}, "head_fusion must be left at 'mean'"),
        ({"head_fusion": torch.ones(2)}, "head_fusion must be left at 'mean'"),
        ({"gradients": "clamp_then_fuse"}, "gradients must be None with values"),
        ({"discard_ratio": 0.5}, "discard_ratio must be 0.0 with values"),
        ({"matrices": True}, "matrices must be False with values"),
        ({"values": "sum_then_norm", "residual": 1.0}, "attention must be more than 0"),
        ({"values": "sum_then_norm", "own_path": False}, "the residual has no share of its own"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], said: str) -> None:
    assert_refused(ValueError, ("Method: ", said), lambda: Method(**{"values": "norm_then_sum", **fields}))
