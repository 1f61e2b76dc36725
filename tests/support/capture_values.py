"""Layers of one's own that add an attention's output up in the ways that are about, and the papers' formulas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rollout.tape import Tape

B, S, E, H = 2, 6, 8, 2
METHODS = ("value_norm", "kobayashi")


@dataclass
class Taken:
    """What a layer attended with and added up, taken by hand: maps [B, H, S, S], v [B, H, S, D], W_O [H, D, E], x."""

    maps: Tensor
    values: Tensor
    weights: Tensor
    inputs: Tensor


def explicit(layers: Sequence[Taken], name: str) -> Tensor:
    """The whole chain [B, S, S] in float64, every vector written out.

    Source: Kobayashi et al. 2021, arXiv:2109.07152, eq. 4 and 5, without biases and LayerNorm; chained by their product
    as in GlobEnc (Modarressi et al. 2022, arXiv:2205.03286). `value_norm` has each head's and the residual's norm for
    that of their sum.
    """
    product: Tensor | None = None
    for each in layers:
        maps, values, weights, x = (
            part.double() for part in (each.maps, each.values, each.weights, each.inputs)
        )  # fmt: skip
        values = values.repeat_interleave(maps.shape[1] // values.shape[1], 1)
        vectors = torch.einsum("bhjd,hde->bhje", values, weights)
        handed = torch.einsum("bhij,bhje->bhije", maps, vectors)
        kept = torch.diag_embed(x.transpose(1, 2)).permute(0, 2, 3, 1)
        matrix = (kept + handed.sum(1)).norm(dim=-1)
        if name == "value_norm":
            matrix = kept.norm(dim=-1) + handed.norm(dim=-1).sum(1)
        matrix = matrix / matrix.sum(-1, keepdim=True)
        product = matrix if product is None else matrix @ product
    assert product is not None
    return product


def agree(tape: Tape, layers: list[Taken], lengths: list[int] | None = None) -> None:
    """What the tape gives is what the formulas give, on the rows that count."""
    assert len(tape.layers()) == len(layers)
    for method in METHODS:
        (found,), wanted = tape.rollout(method=method).values(), explicit(layers, method)
        for b, n in enumerate(lengths or [wanted.shape[1]] * len(wanted)):
            torch.testing.assert_close(found[b, :n], wanted[b, :n].detach(), atol=1e-12, rtol=1e-10)


class Layer(nn.Module):
    """An attention of two heads that ends as a function of the layer, x and the output of the heads says."""

    def __init__(self, ending: Callable[["Layer", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(E), nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.second, self.inner = nn.Linear(E, E), nn.LayerNorm(E)
        self.mlp = nn.Sequential(nn.LayerNorm(E), nn.Linear(E, E), nn.GELU())
        self.drop, self.gamma = nn.Dropout(0.3), nn.Parameter(torch.linspace(-1.0, 2.0, E))
        self.ending = ending

    def forward(self, x: Tensor, kept: list[Taken] | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        if kept is not None:
            maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            weights = self.proj.weight.T.reshape(H, E // H, E)
            kept.append(Taken(maps, v, weights, x.clone()))
        return self.ending(self, x, functional.scaled_dot_product_attention(q, k, v))


class Stack(nn.Module):
    """Three layers of one ending."""

    def __init__(self, ending: Callable[[Layer, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.layers = nn.ModuleList([Layer(ending) for _ in range(3)])
        self.double().eval()

    def forward(self, x: Tensor, kept: list[Taken] | None = None) -> Tensor:
        x = x * 2.0
        for layer in self.layers:
            x = layer(x, kept)
            x = x + layer.mlp(x)
        return x


def merge(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def add_in_place(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    x += layer.drop(layer.proj(merge(o)))
    return x


def add_to_the_output(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    output = layer.proj(merge(o))
    output += x
    return output


def scale_in_place(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    return x + layer.proj(merge(o)).mul_(layer.gamma)


def swap_rows_and_back(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    return layer.proj(o.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1) + x


def add_with_rows_swapped(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    return (layer.proj(o.permute(2, 0, 1, 3).flatten(2)) + x.transpose(0, 1).contiguous()).permute(1, 0, 2)


def flatten_rows(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    rows = merge(o).reshape(B * S, E)
    return torch.addmm(layer.proj.bias, rows, layer.proj.weight.mT.contiguous()).view(B, S, E) + x


# Name → the ending, what W_O is times, and what x is times.
KNOWN: dict[str, tuple[Callable[[Layer, Tensor, Tensor], Tensor], Callable[[Layer], Any], float]] = {
    "pre-LN": (lambda at, x, o: x + at.drop(at.proj(merge(o))), lambda at: 1.0, 1.0),
    "post-LN": (lambda at, x, o: at.inner(at.proj(merge(o)) + x), lambda at: 1.0, 1.0),
    "in place": (add_in_place, lambda at: 1.0, 1.0),
    "in place, the other way": (add_to_the_output, lambda at: 1.0, 1.0),
    "LayerScale": (lambda at, x, o: x + at.gamma * at.proj(merge(o)), lambda at: at.gamma, 1.0),
    "LayerScale in place": (scale_in_place, lambda at: at.gamma, 1.0),
    "a factor": (lambda at, x, o: x + at.proj(merge(o)) * 0.3 / 2.0, lambda at: 0.15, 1.0),
    "a residual times a number": (lambda at, x, o: at.inner(1.7 * x + at.proj(merge(o))), lambda at: 1.0, 1.7),
    "a bias of its own": (
        lambda at, x, o: x + (merge(o) @ at.proj.weight.mT + at.proj.bias), lambda at: 1.0, 1.0
    ),
    "MLP beside, first": (lambda at, x, o: at.proj(merge(o)) + at.mlp(x) + x, lambda at: 1.0, 1.0),
    "MLP beside, last": (lambda at, x, o: x + at.proj(merge(o)) + at.mlp(x), lambda at: 1.0, 1.0),
    "MLP beside, LayerScale of both": (
        lambda at, x, o: x + at.gamma * (at.mlp(x) + at.proj(merge(o))), lambda at: at.gamma, 1.0
    ),
    "rows swapped and back": (swap_rows_and_back, lambda at: 1.0, 1.0),
    "added with rows swapped": (add_with_rows_swapped, lambda at: 1.0, 1.0),
    "flattened rows": (flatten_rows, lambda at: 1.0, 1.0),
}  # fmt: skip


def store(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    held = torch.zeros_like(x)
    held[:] = layer.proj(merge(o))
    return x + held


def scaled_heads_in_place(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    o *= torch.tensor([1.0, 2.0])[:, None, None]
    return x + layer.proj(merge(o))


def read_twice(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    output = layer.proj(merge(o))
    return x + output + layer.mlp(output)


def adapted(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    """As LoRA is."""
    merged = merge(o)
    return layer.proj(merged) + layer.second(merged) + x


def added_apart(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    """The terms of x + W_O·o with another projection of the same heads added behind."""
    output = x + layer.proj(merge(o))
    return output + layer.second(merge(o))


def through_an_alias(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    """x is no longer what the queries were made of, and is written through a view."""
    x.view(-1).add_(layer.mlp(x).view(-1))
    return x + layer.proj(merge(o))


# Name → the ending, and what is said of it.
REFUSED: dict[str, tuple[Callable[[Layer, Tensor, Tensor], Tensor], str]] = {
    "a norm on the heads": (lambda at, x, o: x + at.proj(at.inner(merge(o))), "output of its heads to layer_norm"),
    "a gate on the heads": (
        lambda at, x, o: x + at.proj(merge(o) * at.second(x).sigmoid()), "output of its heads to mul before any W_O"
    ),
    "heads scaled in place": (scaled_heads_in_place, "output of its heads to mul before any W_O"),
    "a norm on what is added": (lambda at, x, o: x + at.inner(at.proj(merge(o))), "W_O·o to layer_norm before"),
    "a gate on what is added": (
        lambda at, x, o: x + at.proj(merge(o)) * at.mlp(x)[..., :1].sigmoid(), "W_O·o to mul before"
    ),
    "an activation": (lambda at, x, o: x + at.proj(merge(o)).relu(), "W_O·o to relu before"),
    "subtracted": (lambda at, x, o: x - at.proj(merge(o)), "W_O·o to sub before"),
    "a factor of 0": (lambda at, x, o: x + at.proj(merge(o)) * 0, "W_O·o to mul before"),
    "turned by name": (
        lambda at, x, o: x + torch.transpose(input=at.proj(merge(o)), dim0=1, dim1=2).mT, "W_O·o to transpose before"
    ),
    "added more than once": (lambda at, x, o: torch.add(x, at.proj(merge(o)), alpha=2), "not of two such things"),
    "concatenated": (lambda at, x, o: at.mlp[1](torch.cat([x, at.proj(merge(o))], 1)[:, :S]), "W_O·o to cat before"),
    "stored": (store, "W_O·o to setitem before"),
    "no residual": (lambda at, x, o: at.inner(at.proj(merge(o))), "W_O·o to layer_norm before"),
    "no W_O": (lambda at, x, o: x + merge(o), "output of its heads to add before any W_O"),
    "a low-rank part beside W_O": (adapted, "hands what it gives to linear and to linear"),
    "another projection behind": (added_apart, "hands what it gives to linear and to transpose"),
    "W_O·o read twice": (read_twice, "hands what it gives to add and to layer_norm"),
    "dimensions before heads": (
        lambda at, x, o: x + at.proj(o.permute(0, 2, 3, 1).flatten(2)), "other numbers than its heads, side by side"
    ),
    "heads in another order": (lambda at, x, o: x + at.proj(merge(o[:, [1, 0]])), "output of its heads to getitem"),
    "the MLP first": (lambda at, x, o: x + at.mlp(x) + at.proj(merge(o)), "W_O·o to layer_norm before it is added"),
    "a residual changed since": (through_an_alias, "W_O·o to layer_norm before it is added"),
    "two residuals": (
        lambda at, x, o: x + at.proj(merge(o)) + x, "is added to two things that its queries are made of"
    ),
}  # fmt: skip
