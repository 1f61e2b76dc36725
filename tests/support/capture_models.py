"""A small model of an attention nobody knows, for the tests of capture."""

import math
from typing import Any

import torch
from torch import Tensor, nn

import rollout
from rollout import Record
from tests.support.cases import generator
from tests.support.oracles import rollout_matrices

ROLLOUT = rollout.METHODS["rollout"]
B, S, E, H = 3, 6, 8, 2


class Mixer(nn.Module):
    """An attention nobody knows; it keeps its maps for the test."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(E, E), nn.Linear(E, E)
        self.maps: list[Tensor] = []

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.split(self.q(x)) @ self.split(self.k(x)).transpose(-1, -2) * 0.7
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        maps = scores.softmax(-1)
        self.maps = [maps]
        return x + (maps @ self.split(x)).transpose(1, 2).flatten(2)


class Cousin(Mixer):
    pass


class Model(nn.Module):
    def __init__(self, layers: int = 3, kind: type[Mixer] = Mixer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(layers))
        self.fail = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask=mask)
        if self.fail:
            raise RuntimeError("the model raises")
        return x


def read_mixer(module: Mixer, x: Tensor, mask: Tensor | None = None) -> Record:
    return Record(queries=module.split(module.q(x)), keys=module.split(module.k(x)), key_mask=mask, scale=0.7)


def model_and_input(layers: int = 3) -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False], [True] * 3 + [False] * 3])
    return Model(layers).double().eval(), torch.randn(B, S, E, generator=generator(1), dtype=torch.float64), mask


def expected(model: Model) -> Any:
    return rollout_matrices([block.maps[0] for block in model.blocks], ROLLOUT)
