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
