"""Attention that torch computes in modules nobody knows: what is recorded of it, and what is refused."""

import copy
import math
import pickle
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rollout
from tests.support.capture_state import assert_nothing_left, state
from tests.support.cases import generator, same_bits
from tests.support.oracles import assert_close, rollout_matrices

ROLLOUT = rollout.METHODS["rollout"]
B, S, E, H = 3, 8, 16, 4
X = torch.randn(B, S, E, generator=generator(1), dtype=torch.float64)
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()


class Block(nn.Module):
    """A residual block; `mix` does the attention, and keeps its maps for the test when it makes them."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.mix = nn.Linear(E, 3 * E), nn.Linear(E, E), mix

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.mix(*self.qkv(x).chunk(3, -1)))


class Stack(nn.Module):
    def __init__(self, *mixes: Any, between: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(mix) for mix in mixes)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = x if self.between is None else self.between(x)
        return x


def stack(*mixes: Any, between: Any = None) -> Stack:
    torch.manual_seed(0)
    return Stack(*mixes, between=between).double().eval()


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = functional.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True)
    return mixed.transpose(1, 2).flatten(2)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL, scale=0.3)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = split(q) @ split(k).transpose(-2, -1) * (1.0 / math.sqrt(E // H))
    scores = scores.masked_fill(CAUSAL.logical_not(), float("-inf"))
    return (functional.softmax(scores, dim=-1) @ split(v)).transpose(1, 2).flatten(2)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [x.unflatten(-1, (H, -1)) for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", heads[0], heads[1]) / 2
    scores = torch.where(CAUSAL, scores, torch.finfo(scores.dtype).min)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), heads[2]).flatten(2)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads folded into the batch, and a bias of each."""
    q, k, v = (split(x).reshape(B * H, S, -1) for x in (q, k, v))
    bias = torch.linspace(-1, 1, B * H, dtype=q.dtype)[:, None, None] * torch.arange(S)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5, alpha=0.5)
    scores = scores.view(B, H, S, S) + torch.zeros(S, S, dtype=q.dtype).masked_fill(~CAUSAL, -1e9)
    mixed = torch.bmm(scores.softmax(-1).view(B * H, S, S), v)
    return mixed.view(B, H, S, -1).transpose(1, 2).flatten(2)


def maps_by_hand(model: Stack, scale: float, heads: int, bias: Any = None) -> list[Tensor]:
    maps, x = [], X
    for block in model.blocks:
        q, k, _ = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in block.qkv(x).chunk(3, -1))
        scores = scale * (q @ k.transpose(-1, -2))
        scores = scores if bias is None else scores + bias
        maps.append(scores.masked_fill(~CAUSAL, -math.inf).softmax(-1).detach())
        x = block(x)
    return maps


BIAS = (torch.linspace(-1, 1, B * H, dtype=torch.float64)[:, None, None] * torch.arange(S) / 2).view(B, H, 1, S)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("mix", "scale", "heads", "bias"),
    [(fused, 0.5, H, None), (one_head, 0.3, 1, None), (written_out, 0.5, H, None), (by_einsum, 0.5, H, None),
     (folded, 0.5, H, BIAS)],
    ids=["fused", "one-head", "written-out", "einsum", "folded"],
)  # fmt: skip
def test_every_way_to_write_attention(mix: Any, scale: float, heads: int, bias: Any, mode: Any) -> None:
    model = stack(mix, mix, mix)
    before = state(model)
    full = rollout_matrices(maps_by_hand(model, scale, heads, bias), ROLLOUT)
    with mode():
        plain = model(X)
        with rollout.capture(model) as tape:
            captured = model(X), model(X)
    assert all(same_bits(output.detach().clone(), plain.detach().clone()) for output in captured)
    assert tape.modules() == ("blocks.0", "blocks.1", "blocks.2")
    assert_close(tape.rollout()["blocks"], full, "qk")
    assert all(layer.causal or layer.bias is not None for layer in tape.layers())
    assert_nothing_left(model, before)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(q @ k.transpose(-1, -2) + torch.ones(S, dtype=q.dtype)).softmax(-1) @ v


def with_head_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    maps = (q @ k.transpose(-1, -2)).softmax(-1)
    return (maps * 0.5) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.transpose(-1, -2), torch.zeros(B, S, 1, dtype=q.dtype)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-2) @ v


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def by_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Within halves of the sequence, folded into the batch."""
    q, k, v = (x.reshape(2 * B, S // 2, E) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).reshape(B, S, E)


@pytest.mark.parametrize(
    ("mix", "message"),
    [(capped, r"exactly \(tanh\)"), (with_head_mask, r"exactly \(mul\)"), (with_sink, "not one sink a head: cat"),
     (over_queries, "softmax over dimension -2"), (with_dropout, "got attention dropout 0.1 on in Block at blocks.1"),
     (by_column, "got 6 sequences for inputs of 3 or 8")],
    ids=["cap-over-bias", "head-mask", "sink", "softmax-over-queries", "dropout", "folded-windows"],
)  # fmt: skip
def test_what_is_not_the_softmax_of_a_product_is_refused(mix: Any, message: str) -> None:
    model = stack(fused, mix)
    before = state(model)
    with pytest.raises(rollout.CaptureError, match=message), rollout.capture(model):
        model(X)
    assert_nothing_left(model, before)


def shifted(x: Tensor) -> Tensor:
    return x + 0.01 * x.roll(1, 1)


def averaged(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def convolved(x: Tensor) -> Tensor:
    kernel = torch.full((E, 1, 3), 0.1, dtype=x.dtype)
    return x + functional.conv1d(functional.pad(x.transpose(1, 2), (2, 0)), kernel, groups=E).transpose(1, 2)


def scanned(x: Tensor) -> Tensor:
    """A recurrence, written in place into memory of its own."""
    out = torch.empty_like(x)
    held = torch.zeros_like(x[:, 0])
    for at in range(x.shape[1]):
        held = 0.5 * held + x[:, at]
        out[:, at] = held
    return out


def linear_attention(x: Tensor) -> Tensor:
    return x + x @ (x.transpose(1, 2) @ x) * 1e-3


def by_numpy(x: Tensor) -> Tensor:
    """As a kernel that torch does not see."""
    return torch.from_numpy(np.flip(x.numpy(), 1).copy())


def by_opaque_kernel(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    np.copyto(np.asarray(memoryview(out.numpy())), np.flip(x.numpy(), 1))
    return out


MIXED = "positions are mixed by something else between Block at blocks.1 and the attention below"


@pytest.mark.parametrize("between", [shifted, averaged, convolved, scanned, linear_attention])
def test_what_mixes_positions_in_between_is_refused(between: Any) -> None:
    model = stack(fused, fused, between=between)
    with pytest.raises(rollout.CaptureError, match=MIXED), torch.no_grad(), rollout.capture(model):
        model(X)
    with torch.no_grad(), rollout.capture(model, allow="attention_layers_only") as tape:
        output = model(X)
        assert same_bits(output, model(X))
    assert MIXED in tape.notes[0]
    assert len(tape.layers()) == 2


@pytest.mark.parametrize("between", [by_numpy, by_opaque_kernel])
def test_what_cannot_be_followed_is_refused(between: Any) -> None:
    model = stack(fused, fused, between=between)
    with (
        pytest.raises(rollout.CaptureError, match=r"cannot be followed|side by side"),
        torch.no_grad(),
        rollout.capture(model),
    ):
        model(X)


@pytest.mark.parametrize(
    "between", [nn.LayerNorm(E), nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))]
)
def test_what_works_position_by_position_is_not(between: nn.Module) -> None:
    model = stack(fused, written_out, between=between)
    with torch.no_grad(), rollout.capture(model) as tape:
        model(X)
    assert tape.notes == ()


def test_attentions_side_by_side_are_no_chain() -> None:
    class Parallel(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x) + self.blocks[1](x)

    torch.manual_seed(0)
    model = Parallel(fused, fused).double().eval()
    with (
        pytest.raises(rollout.CaptureError, match=r"blocks.1 does not stand on .* side by side"),
        torch.no_grad(),
        rollout.capture(model),
    ):
        model(X)


def test_axes_of_a_square_are_no_sequence() -> None:
    """First along rows, then along columns: the same shapes, other positions."""

    class Axial(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return self.blocks[1](x.transpose(1, 2).flatten(0, 1)).unflatten(0, x.shape[:2])

    torch.manual_seed(0)
    model, x = Axial(fused, fused).double().eval(), torch.randn(1, S, S, E, generator=generator(3)).double()
    for given in (x, x.expand(B, -1, -1, -1)):
        with (
            pytest.raises(rollout.CaptureError, match=r"sequences for inputs|positions are mixed"),
            torch.no_grad(),
            rollout.capture(model),
        ):
            model(given)


def test_a_call_that_runs_other_attentions_is_looked_at_afresh() -> None:
    class Early(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            return x if float(x.sum()) > 1e6 else self.blocks[1](x)

    torch.manual_seed(0)
    model, far = Early(fused, fused).double().eval(), X + 1e6
    with torch.no_grad(), rollout.capture(model) as tape:
        model(X)
        with pytest.raises(rollout.CaptureError, match=r"at the end it runs others: call it again"):
            model(far)
        model(far)
        assert len(tape.layers()) == 1
        model(X)
        assert len(tape.layers()) == 2
        model(far)


def test_copies_made_in_the_block_are_plain() -> None:
    model = stack(fused, fused)
    with torch.no_grad(), rollout.capture(model) as tape:
        model.between = None
        twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        wanted = model(X)
        tape.clear()
        for other in (twin, thawed):
            assert same_bits(other(X), wanted)
            assert other.blocks[0].forward.__self__ is other.blocks[0]
            assert tape.streams == ()
    for other in (twin, thawed):
        assert [name for name in vars(other) if name not in vars(model)] in ([], ["_compiled_call_impl"])
        with torch.no_grad():
            assert same_bits(other(X), wanted)


def changes_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = fused(q, k, v)
    k.zero_()
    return mixed


def test_what_is_changed_in_place_afterwards_stays_as_it_was() -> None:
    model = stack(fused)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), rollout.capture(model) as tape:
            model(X)
        wanted = tape.maps(0)
        changed = stack(changes_in_place)
        with mode(), rollout.capture(changed) as tape:
            changed(X)
        assert_close(tape.maps(0), wanted, "qk")
    with torch.no_grad(), rollout.capture(model) as tape:
        model(X)
        tape.layers()[0].keys.zero_()
        with pytest.raises(ValueError, match=r"it was changed in place since"):
            tape.rollout(0)


def test_rows_count_from_each_samples_own_ends() -> None:
    lengths = torch.tensor([8, 5, 2])
    right = torch.arange(S) < lengths[:, None]
    for mask in (right, right.flip(1)):

        def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            return functional.scaled_dot_product_attention(
                split(q), split(k), split(v), mask[:, None, None]
            ).transpose(1, 2).flatten(2)  # fmt: skip

        model = stack(masked, masked)
        with torch.no_grad(), rollout.capture(model) as tape:
            model(X)
        full = tape.rollout()["blocks"]
        first = mask.long().argmax(1)
        for row, wanted in ((0, first), (1, first + 1), (-1, first + lengths - 1), (-2, first + lengths - 2)):
            assert_close(tape.rollout(row)["blocks"], full[torch.arange(B), wanted], "qk")
        assert_close(tape.rollout(first)["blocks"], full[torch.arange(B), first], "qk")
        assert_close(tape.rollout(torch.full((B,), -1))["blocks"], full[torch.arange(B), first + lengths - 1], "qk")
        for row in (2, -3):
            with pytest.raises(ValueError, match=rf"got {row}; sample 2 has 2 positions by the recorded mask"):
                tape.rollout(row)


def test_later_calls_cost_next_to_nothing() -> None:
    """Not the 4 times of the call that is looked at, but near the plain one, in processor time of one thread, the best
    of alternating turns. The bound is loose: what is held is other memory than the plain call reuses, which costs a
    model of nothing but narrow attention more on one machine than on another; `bench` times models as they are used."""
    model, wide = stack(*[fused] * 4).float(), torch.randn(8, 512, E, generator=generator(4))
    threads, times = torch.get_num_threads(), {"plain": math.inf, "captured": math.inf}

    def run(kind: str) -> None:
        start = time.thread_time()
        model(wide)
        times[kind] = min(times[kind], time.thread_time() - start)

    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), rollout.capture(model):
            model(wide)
        for _ in range(7):
            with torch.inference_mode():
                run("plain")
                with rollout.capture(model):
                    run("captured")
    finally:
        torch.set_num_threads(threads)
    assert times["captured"] <= 1.5 * times["plain"], times
