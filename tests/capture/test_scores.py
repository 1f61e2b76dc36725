"""Scores that are capped, and softmaxes with a sink, recorded exactly in a module of the user's own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from tests.support.cases import generator, same_bits
from tests.support.oracles import assert_close, rollout_matrices

B, S, E, H = 3, 8, 16, 4
X = torch.randn(B, S, E, generator=generator(1), dtype=torch.float64)
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
CAP = 0.7


class Attention(nn.Module):
    """softmax over capped scores, a causal mask and a sink of each head."""

    def __init__(self, cap: str, sink: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.sinks = nn.Parameter(torch.randn(H)) if sink else None
        self.cap = cap

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * 0.9
        if self.cap == "before":
            scores = CAP * torch.tanh(scores / CAP)
        elif self.cap == "in place":
            scores.div_(CAP).tanh_().mul_(CAP)
        elif self.cap == "doubled":
            scores = 2 * (torch.tanh(scores) * CAP)
        scores = scores.masked_fill(~CAUSAL, -math.inf)
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.view(1, -1, 1, 1).expand(len(q), -1, S, 1)
        both = torch.cat([scores, sinks], dim=-1)
        return (both - both.amax(-1, keepdim=True)).softmax(-1)[..., :-1]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + self.out((self.maps(q, k) @ v).transpose(1, 2).flatten(2))


def model_of(cap: str, sink: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Attention(cap, sink) for _ in range(3))).double().eval()


def maps_by_hand(model: nn.Sequential) -> list[Tensor]:
    maps, x = [], X
    for block in model:
        assert isinstance(block, Attention)
        q, k, _ = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in block.qkv(x).chunk(3, -1))
        maps.append(block.maps(q, k).detach())
        x = block(x)
    return maps


@pytest.mark.parametrize("sink", [False, True], ids=["no sink", "sinks"])
@pytest.mark.parametrize("cap", ["none", "before", "in place", "doubled"])
def test_caps_and_sinks(cap: str, sink: bool) -> None:
    model = model_of(cap, sink)
    with torch.inference_mode():
        plain, maps = model(X), maps_by_hand(model)
        for _ in range(2):
            with rollout.capture(model) as tape:
                output = model(X)
            assert same_bits(output.clone(), plain.clone())
            layers = tape.layers()
            assert [layer.softcap for layer in layers] == [{"none": None, "doubled": 2 * CAP}.get(cap, CAP)] * 3
            assert all((layer.sinks is not None) == sink and layer.causal for layer in layers)
            assert_close(tape.maps(1), maps[1], "qk")
            for name in ("rollout", "pyhealth"):
                assert_close(tape.rollout(method=name)["layers"], rollout_matrices(maps, rollout.METHODS[name]), "qk")
            full = rollout_matrices(maps, rollout.METHODS["rollout"])
            assert_close(tape.rollout(-1)["layers"], full[:, -1], "qk")


class Loose(Attention):
    """A sink that is not left out, or not the same for every row."""

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        assert self.sinks is not None
        sinks = self.sinks.view(1, -1, 1, 1).expand(len(q), -1, S, 1)
        if self.cap == "rows":
            sinks = sinks * torch.arange(S, dtype=sinks.dtype)[:, None]
        maps = torch.cat([scores, sinks], -1).softmax(-1)
        return maps[..., 1:] if self.cap == "first" else maps[..., :-1]


@pytest.mark.parametrize(
    ("what", "match"), [("rows", "not one sink a head: cat"), ("first", r"recorded exactly \(getitem\)")]
)
def test_other_columns_are_refused(what: str, match: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Loose(what, True), Loose(what, True)).double().eval()

    def run() -> Any:
        with rollout.capture(model):
            model(X)

    with torch.inference_mode(), pytest.raises(rollout.CaptureError, match=match):
        run()


def test_layers_of_other_caps_are_refused() -> None:
    model = nn.Sequential(*model_of("before", False)[:2], *model_of("doubled", False)[:1])
    with torch.inference_mode(), rollout.capture(model) as tape:
        model(X)
    with pytest.raises(ValueError, match=r"must share their softcap, got \[0.7, 1.4\]"):
        tape.rollout(0)


LOW_BESIDES = {
    "as GPT-2's first code": lambda scores, seen: scores * seen - 1e10 * (1 - seen),
    "as OpenAI GPT": lambda scores, seen: scores * seen + -1e4 * (1 - seen),
    "in place, of numbers": lambda scores, seen: scores.mul_(seen).sub_((1 - seen) * 1e9),
    "after a bias": lambda scores, seen: (scores + BIAS) * seen - 1e10 * (1 - seen),
    "before one": lambda scores, seen: scores * seen - 1e10 * (1 - seen) + BIAS,
    "and padding": lambda scores, seen: (scores.masked_fill(PADDED, -1e10) * seen) + (seen - 1) * 1e10,
    "twice": lambda scores, seen: (scores * seen - 1e10 * (1 - seen)) * KEPT - 1e10 * (1 - KEPT),
}
NOT_HIDDEN = {
    "nothing is added": lambda scores, seen: scores * seen,
    "nothing low": lambda scores, seen: scores * seen - 100.0 * (1 - seen),
    "a number": lambda scores, seen: scores * seen - 1e10,
    "low elsewhere": lambda scores, seen: scores * seen - 1e10 * seen,
    "something between": lambda scores, seen: (scores * seen) * 0.5 - 1e10 * (1 - seen),
    "a column": lambda scores, seen: scores * seen - scores.amax(-1, keepdim=True),
    "no zeros and ones": lambda scores, seen: scores * (0.5 * seen) - 1e10 * (1 - seen),
}
BIAS = torch.randn(1, H, S, S, generator=generator(2), dtype=torch.float64)
PADDED = torch.arange(S) >= torch.tensor([S, S - 2, S - 3]).view(B, 1, 1, 1)
KEPT = 1.0 - PADDED.double()


class Multiplied(Attention):
    """softmax over scores that are hidden by a factor 0 and by what is added."""

    def __init__(self, hide: Any) -> None:
        super().__init__("none", False)
        self.hide = hide

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        return self.hide(q @ k.transpose(-1, -2) * 0.9, CAUSAL.double()).softmax(-1)


def multiplied(hide: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Multiplied(hide) for _ in range(3))).double().eval()


@pytest.mark.parametrize("hide", LOW_BESIDES.values(), ids=LOW_BESIDES)
def test_masks_that_multiply(hide: Any) -> None:
    model = multiplied(hide)
    with torch.inference_mode():
        plain, maps = model(X), maps_by_hand(model)
        for _ in range(2):
            with rollout.capture(model) as tape:
                assert same_bits(model(X), plain)
            assert_close(tape.rollout()["layers"], rollout_matrices(maps, rollout.METHODS["rollout"]), "qk")


@pytest.mark.parametrize("hide", NOT_HIDDEN.values(), ids=NOT_HIDDEN)
def test_factors_that_hide_nothing_are_refused(hide: Any) -> None:
    model = multiplied(hide)
    with pytest.raises(rollout.CaptureError, match=r"cannot be recorded exactly"), rollout.capture(model):
        model(X)


class Stacked(nn.Module):
    """Heads that are cut from the channels and put behind each other in the batch, as set transformers do."""

    def __init__(self, fused: bool, masked: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(E, 3 * E), fused
        shown = torch.rand(H * B, S, S, generator=generator(3)) < 0.6
        self.shown = shown | torch.eye(S, dtype=torch.bool) if masked else None

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(1, 2) / math.sqrt(E // H)
        return (scores if self.shown is None else scores.masked_fill(~self.shown, -math.inf)).softmax(-1)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [torch.cat(part.split(E // H, 2), 0) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.shown)
        else:
            mixed = self.maps(q, k) @ v
        return x + torch.cat(mixed.split(len(x), 0), 2)


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "a mask of each matrix"])
@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
@pytest.mark.parametrize("batch", [1, B])
def test_heads_in_front_of_the_batch(batch: int, fused: bool, masked: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Stacked(fused, masked and batch == B) for _ in range(3))).double().eval(), X[:batch]
    with torch.inference_mode():
        plain, maps, state = model(x), [], x
        for layer in model:
            assert isinstance(layer, Stacked)
            made = layer.maps(*layer.heads(state)[:2])
            maps.append(torch.stack([made[head * batch : (head + 1) * batch] for head in range(H)], 1))
            state = layer(state)
        for _ in range(2):
            with rollout.capture(model) as tape:
                assert same_bits(model(x), plain)
            assert_close(tape.rollout()["layers"], rollout_matrices(maps, rollout.METHODS["rollout"]), "qk")


class Behind(nn.Module):
    """Positions in front of the samples, and heads cut from the channels behind them, as fairseq does."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(E, 3 * E), fused

    def heads(self, x: Tensor) -> list[Tensor]:
        seq, batch, _ = x.shape
        return [part.contiguous().view(seq, batch * H, -1).transpose(0, 1) for part in self.qkv(x).chunk(3, -1)]

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(E // H)
        scores = scores.view(-1, H, S, S).masked_fill(~SHOWN[: len(q) // H, None, None], -math.inf)
        return scores.view(-1, S, S).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        shown = SHOWN[: x.shape[1]].repeat_interleave(H, 0)[:, None]
        mixed = (
            nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)
            if self.fused
            else torch.bmm(self.maps(q, k), v)
        )
        return x + mixed.transpose(0, 1).contiguous().view(x.shape)


SHOWN = torch.arange(S) < torch.tensor([S, S - 2, 2])[:, None]


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
@pytest.mark.parametrize("batch", [1, B])
def test_heads_behind_the_batch(batch: int, fused: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Behind(fused) for _ in range(3))).double().eval(), X[:batch].transpose(0, 1)
    with torch.inference_mode():
        plain, maps, state = model(x), [], x
        for layer in model:
            assert isinstance(layer, Behind)
            maps.append(layer.maps(*layer.heads(state)[:2]).unflatten(0, (batch, H)))
            state = layer(state)
        for _ in range(2):
            with rollout.capture(model) as tape:
                assert same_bits(model(x), plain)
            ends = rollout_matrices(maps, rollout.METHODS["rollout"])[range(batch), SHOWN[:batch].sum(1).numpy() - 1]
            assert_close(tape.rollout(-1)["layers"], ends, "qk")


class Relative(nn.Module):
    """Values for relative positions, one array for all samples and heads, added to what the values give."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.far = nn.Linear(E, 3 * E), nn.Parameter(torch.randn(1, S, E // H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (H, -1)).transpose(1, 2).reshape(-1, S, E // H) for part in self.qkv(x).chunk(3, -1)
        )
        maps = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        mixed = torch.bmm(maps, v) + maps.flip(-1) @ self.far
        return x + mixed.view(-1, H, S, E // H).transpose(1, 2).flatten(2)


def test_values_that_all_heads_share_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Relative(), Relative()).double().eval()
    match = "0 did twice: the second does not stand on the first: parts of one attention"
    with pytest.raises(rollout.CaptureError, match=match), rollout.capture(model):
        model(X)
