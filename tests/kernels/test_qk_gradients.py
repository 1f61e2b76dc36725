"""Gradient-weighted rows from queries, keys, values and the gradient at the attention's output: no map, no gradient of
one. Beside stored maps whose gradients are written out, ∂y/∂A_hij = ⟨∂y/∂O_hi, v_hj⟩."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from rollout import METHODS, Method
from rollout_kernels import BackendError
from tests.support.cases import random_qk, random_weights
from tests.support.oracles import assert_close, rollout_matrices, take_rows

B, H, S, D, L = 3, 4, 11, 5, 3
LENGTHS = [11, 1, 7]
CHOSEN: dict[str, Method] = {
    **{name: method for name, method in METHODS.items() if method.gradients is not None},
    "max": Method(head_fusion="max", gradients="clamp_then_fuse"),
    "min, as it is": Method(head_fusion="min", gradients="fuse_then_clamp", renormalize=False),
    "weights": Method(head_fusion=torch.tensor([1.0, 2.0, 3.0, 0.5]), gradients="fuse_then_clamp", start_layer=1),
    "discard": Method(gradients="clamp_then_fuse", discard_ratio=0.4),
    "function": Method(head_fusion=lambda maps, slopes: (maps * slopes).amax(1).abs(), gradients="clamp_then_fuse"),
}


def drawn(groups: int = H, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], ...]:
    """Queries, keys, values and gradients at the outputs."""
    source = torch.Generator().manual_seed(groups)
    queries, keys = random_qk(B, H, S, groups=groups, layers=L, dtype=dtype)
    values = [torch.randn(B, groups, S, D, generator=source, dtype=torch.float64).to(dtype) for _ in range(L)]
    slopes = [torch.randn(B, H, S, D, generator=source, dtype=torch.float64).to(dtype) for _ in range(L)]
    return queries, keys, values, slopes


def written_out(queries: list[Tensor], keys: list[Tensor], **options: Any) -> tuple[list[Tensor], list[int]]:
    """The maps in float64, by `nn.functional` alone."""
    maps = []
    for q, k in zip(queries, keys, strict=True):
        wide = k.double().repeat_interleave(H // k.shape[1], 1)
        scores = q.double() @ wide.mT * q.shape[-1] ** -0.5
        i, j = torch.arange(S)[:, None], torch.arange(S)
        allowed = (j <= i) if options.get("causal") else torch.ones(S, S, dtype=torch.bool)
        allowed = allowed.expand(B, S, S).clone()
        lengths = options.get("lengths")
        if lengths is not None:
            allowed &= (j < torch.tensor(lengths)[:, None])[:, None]
        maps.append(nn.functional.softmax(scores.masked_fill(~allowed[:, None], -1e300), -1))
    return maps, options.get("lengths") or [S] * B


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("groups", [H, 2])
@pytest.mark.parametrize("name", CHOSEN)
def test_as_from_maps_and_their_gradients(name: str, groups: int, backend: str) -> None:
    method = CHOSEN[name]
    queries, keys, values, slopes = drawn(groups)
    handed = {"values": values, "output_gradients": slopes, "method": method, "backend": backend}
    for options in ({}, {"causal": True}, {"lengths": LENGTHS}):
        maps, ends = written_out(queries, keys, **options)
        wide = [v.repeat_interleave(H // groups, 1) for v in values]
        gradients = [d @ v.mT for d, v in zip(slopes, wide, strict=True)]
        given = options | ({"lengths": torch.tensor(LENGTHS)} if "lengths" in options else {})
        if callable(method.head_fusion):
            full = rollout.attention_rollout(
                maps, gradients=gradients, method=method, backend="reference", lengths=given.get("lengths")
            ).numpy()
        else:
            full = rollout_matrices(maps, method, ends, gradients)
        for query in (None, 0, -1, torch.tensor([0, 0, 3]), random_weights(B, 2, S)):
            result = rollout.attention_rollout_qk(queries, keys, query=query, **given, **handed)
            assert_close(result, take_rows(full, query, ends), "qk")


def test_the_gradient_of_every_map_is_what_autograd_gives() -> None:
    queries, keys, values, _ = drawn()
    maps = [m.requires_grad_() for m in written_out(queries, keys)[0]]
    outputs = [m @ v for m, v in zip(maps, values, strict=True)]
    target = torch.stack([(o.tanh() * (1 + o[:, :1])).sum() for o in outputs]).prod()
    by_map = torch.autograd.grad(target, maps, retain_graph=True)
    by_output = torch.autograd.grad(target, outputs)
    plain = [m.detach() for m in maps]
    wanted = rollout.attention_rollout(plain, query=2, gradients=list(by_map), method="chefer", backend="reference")
    found = rollout.attention_rollout_qk(
        queries, keys, query=2, values=values, output_gradients=list(by_output), method="chefer"
    )
    assert_close(found, wanted, "qk")


@pytest.mark.parametrize("name", ["chefer", "grad_rollout", "chefer_normalised"])
def test_float32_tiles_and_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows; a key mask and rows that attend nothing."""
    from rollout_kernels._torch import qk

    queries, keys, values, slopes = drawn(2, torch.float32)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(5)) > 0.3
    given: dict[str, Any] = {
        "key_mask": mask, "query_mask": mask, "method": name, "values": values, "output_gradients": slopes,
    }  # fmt: skip
    for query in (None, 1, random_weights(B, 2, S)):
        exact = rollout.attention_rollout_qk(queries, keys, query=query, backend="reference", **given)
        assert_close(rollout.attention_rollout_qk(queries, keys, query=query, **given), exact.double().numpy(), "qk")
        with monkeypatch.context() as patch:
            patch.setattr(qk, "CPU_TILE_BYTES", 4 * 2 * H * S * 3)
            assert_close(rollout.attention_rollout_qk(queries, keys, query=query, **given), exact.numpy(), "qk")


def test_what_is_missing_or_misshapen_is_named() -> None:
    queries, keys, values, slopes = drawn()
    call = {"method": "chefer", "values": values, "output_gradients": slopes}
    for change, message in (
        ({"values": None}, "values must be given for a gradient-weighted method"),
        ({"output_gradients": None}, "output_gradients must be given for a gradient-weighted method"),
        ({"values": values[:2]}, "values must have one tensor per layer, 3, got 2"),
        ({"values": [v[:, :3] for v in values]}, r"values\[0\] must be .* a multiple of H_v, got \[3, 3, 11, 5\]"),
        ({"output_gradients": [d[..., :4] for d in slopes]}, r"output_gradients\[0\] must be .*\[3, 4, 11, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout.attention_rollout_qk(queries, keys, **(call | change))
    with pytest.raises(BackendError, match="queries, keys, values and output gradients are float64"):
        rollout.attention_rollout_qk(queries, keys, backend="triton", **call)


@pytest.mark.parametrize("query", [0, None])
def test_a_compiled_call_is_the_same(query: int | None) -> None:
    queries, keys, values, slopes = drawn(2, torch.float32)

    def call(*given: list[Tensor]) -> Tensor:
        q, k, v, d = given
        return rollout.attention_rollout_qk(q, k, query=query, values=v, output_gradients=d, method="chefer")

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(queries, keys, values, slopes), call(queries, keys, values, slopes))
