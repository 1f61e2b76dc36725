"""States of shapes that a stack is seldom given: one position, and samples or positions that share their memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rollout
from tests.support.cases import generator, same_bits
from tests.support.oracles import assert_close, rollout_matrices

ROLLOUT = rollout.METHODS["rollout"]
B, S, E, H = 3, 8, 16, 4
X = torch.randn(B, S, E, generator=generator(1), dtype=torch.float64)


class Attention(nn.Module):
    """Attention written out, that keeps its maps."""

    def __init__(self, einsum: bool = False, shift: int = 0) -> None:
        super().__init__()
        self.qkv, self.einsum, self.shift, self.maps = nn.Linear(E, 3 * E), einsum, shift, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in self.qkv(x.roll(self.shift, 1)).chunk(3, -1))
        maps = (torch.einsum("bhid,bhjd->bhij", q, k) if self.einsum else q @ k.transpose(-2, -1)).softmax(-1)
        self.maps = maps.clone()
        return (torch.einsum("bhij,bhjd->bhid", maps, v) if self.einsum else maps @ v).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Residual layers, over what is given or over an array of its own, expanded."""

    def __init__(self, *layers: Attention, rows: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.start = None if rows is None else nn.Parameter(torch.randn(1, rows, E))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.start is None else self.start.expand(len(x), S, E)
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack(*layers: Attention, **options: Any) -> Stack:
    return Stack(*layers, **options).double().eval()


@pytest.mark.parametrize("einsum", [False, True], ids=["written-out", "einsum"])
def test_a_sequence_of_one_position(einsum: bool) -> None:
    torch.manual_seed(0)
    model = stack(Attention(einsum), Attention(einsum))
    with torch.no_grad(), rollout.capture(model) as tape:
        for seq in (1, S, 1):
            model(X[:, :seq])
            assert tape.modules() == ("layers.0", "layers.1")
            maps = [layer.maps for layer in model.layers]
            assert_close(tape.rollout()["layers"], rollout_matrices(maps, ROLLOUT), "qk")


@pytest.mark.parametrize("rows", [1, S], ids=["positions", "samples"])
def test_memory_that_samples_or_positions_share(rows: int) -> None:
    torch.manual_seed(0)
    model = stack(Attention(), Attention(), rows=rows)
    with torch.no_grad():
        plain = model(X)
        with rollout.capture(model) as tape:
            captured = model(X), model(X)
    assert all(same_bits(output, plain) for output in captured)
    assert_close(tape.rollout()["layers"], rollout_matrices([layer.maps for layer in model.layers], ROLLOUT), "qk")


def test_positions_mixed_in_memory_that_samples_share() -> None:
    torch.manual_seed(0)
    model = stack(Attention(shift=1), Attention(), rows=S)
    message = "positions are mixed by something else between .* and its stack"
    with pytest.raises(rollout.CaptureError, match=message), rollout.capture(model):
        model(X)


class Streams(nn.Module):
    """Hyper-connections: layers read and write several residual streams, [B, S, N, E]."""

    def __init__(self, where: str = "") -> None:
        super().__init__()
        self.layers, self.where = nn.ModuleList(Around(where) for _ in range(2)), where
        self.embed = nn.Embedding(20, E)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(2) * torch.linspace(0.5, 1.5, 3, dtype=torch.float64)[:, None]
        for layer in self.layers:
            x = layer(x)
        return x.mean(2)


class Around(nn.Module):
    """A layer that reads the mean of the streams, and adds to each of them."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.attention, self.where = Attention(), where

    def forward(self, x: Tensor) -> Tensor:
        before = x.roll(1, 1) if self.where == "before" else x
        y = x + self.attention(before.mean(2)).unsqueeze(2) * torch.linspace(1, 2, 3, dtype=torch.float64)[:, None]
        return y + y.roll(1, 1) if self.where == "after" else y


IDS = torch.randint(20, (B, S), generator=generator(2))


def test_parallel_residual_streams() -> None:
    torch.manual_seed(0)
    model = Streams().double().eval()
    with torch.no_grad():
        plain = model(IDS)
        with rollout.capture(model) as tape:
            captured = model(IDS), model(IDS)
    assert all(same_bits(output, plain) for output in captured)
    maps = [layer.attention.maps for layer in model.layers]
    assert_close(tape.rollout()["layers"], rollout_matrices(maps, ROLLOUT), "qk")


@pytest.mark.parametrize(("where", "at"), [("before", "its stack"), ("after", "the attention below")])
def test_parallel_residual_streams_that_are_mixed(where: str, at: str) -> None:
    torch.manual_seed(0)
    model = Streams(where).double().eval()
    message = f"positions are mixed by something else between .* and {at}"
    with pytest.raises(rollout.CaptureError, match=message), rollout.capture(model):
        model(IDS)


def test_the_last_of_parallel_residual_streams_that_is_mixed() -> None:
    torch.manual_seed(0)
    model = Streams().double().eval()
    model.layers[-1].where = "after"
    message = "positions are mixed by something else between the last attention and the end of"
    with pytest.raises(rollout.CaptureError, match=message), rollout.capture(model):
        model(IDS)
