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
