"""One attention layer of a forward pass, as queries, keys and masks, and its place in the pass."""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from rollout.results.notebook import table

__all__ = ["MASKS", "Layer", "Record"]

MASKS = ("key_mask", "query_mask")


@dataclass(frozen=True, eq=False, kw_only=True)
class Record:
    """One attention layer of one forward pass: A[b, h, i, j] = softmax_j(cap(scale·q_i·k_j) + bias, masked).

    Keys are of S' positions; S' is S, but for cross-attention.

    Attributes:
        queries: [B, H, S, D], as they enter the product (rotary and other position codes applied).
        keys: [B, H_kv, S', D], H a multiple of H_kv.
        key_mask: bool [B, S'], True = may be attended.
        query_mask: bool [B, S], False = the model makes this row uniform over the keys of its sample.
        bias: added to the scaled scores, broadcastable to [B, H, S, S']; −inf masks.
        causal: row i attends to columns j ≤ i only.
        window: (left, right), row i attends to i − left ≤ j ≤ i + right; None is unbounded.
        scale: factor on q·k; None is D^−½.
        softcap: c of cap(s) = c·tanh(s/c); None leaves scores as they are.
        sinks: [H], scores of one more column of each head's softmax, that is no key: the rows of a map sum to less
            than 1.
        values: [B, H_v, S', D_v], H a multiple of H_v; only of a capture that asks for values or gradients.
        output_weights, inputs: W_O [H, D_v, E] and x [B, S, E] of x + W_O·A·v; only of one that asks for values.

    Raises:
        TypeError, ValueError: a field has the wrong type or shape; the message names it.
    """

    queries: Tensor
    keys: Tensor
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    values: Tensor | None = None
    output_weights: Tensor | None = None
    inputs: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "keys", *MASKS, "bias", "sinks", "values", "output_weights", "inputs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"Record: {name} must be a tensor, got {type(value).__name__}")
            if value is not None:
                object.__setattr__(self, name, value.detach())
        q, k = self.queries, self.keys
        if q.dim() != 4 or k.dim() != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
            raise ValueError(
                f"Record: queries must be [B, H, S, D] and keys [B, H_kv, S', D] with the same B and D, "
                f"got {list(q.shape)} and {list(k.shape)}"
            )
        if q.shape[1] % k.shape[1]:
            raise ValueError(f"Record: H must be a multiple of H_kv, got {q.shape[1]} and {k.shape[1]}")
        if self.sinks is not None and self.sinks.shape != (q.shape[1],):
            raise ValueError(f"Record: sinks must be [H] = [{q.shape[1]}], got {list(self.sinks.shape)}")
        v = self.values
        if v is not None and (v.dim() != 4 or (v.shape[0], v.shape[2]) != (k.shape[0], k.shape[2])):
            raise ValueError(f"Record: values must be [B, H_v, S', D_v] of the keys' B and S', got {list(v.shape)}")
        for name, positions, letter in (("key_mask", self.key_seq, "S'"), ("query_mask", self.seq, "S")):
            mask = getattr(self, name)
            if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], positions)):
                raise ValueError(
                    f"Record: {name} must be bool [B, {letter}] = {[q.shape[0], positions]}, got {mask.dtype} "
                    f"{list(mask.shape)}"
                )

    def _repr_html_(self) -> str:
        rows = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, {value.device}"
            if value is not None:
                rows.append([field.name, str(value)])
        return table(["", "attention"], rows)

    @property
    def batch(self) -> int:
        """B."""
        return self.queries.shape[0]

    @property
    def seq(self) -> int:
        """S."""
        return self.queries.shape[2]

    @property
    def key_seq(self) -> int:
        """S'."""
        return self.keys.shape[2]

    def allowed(self) -> Tensor | None:
        """Which key each row may attend, bool, broadcastable to [B, H, S, S']; None when all."""
        device = self.queries.device
        j = torch.arange(self.key_seq, device=device)
        i = torch.arange(self.seq, device=device)[:, None]
        left, right = self.window or (None, None)
        conditions = [j <= i] if self.causal else []
        conditions += [j >= i - left] if left is not None else []
        conditions += [j <= i + right] if right is not None else []
        conditions += [self.key_mask[:, None, None]] if self.key_mask is not None else []
        conditions += [self.query_mask[:, None, :, None]] if self.query_mask is not None else []
        allowed = None
        for condition in conditions:
            allowed = condition if allowed is None else allowed & condition
        return allowed

    def maps(self) -> Tensor:
        """The attention maps [B, H, S, S'], written out; float32, float64 for float64 queries.

        A row with no key allowed is uniform over the S' keys; with sinks it is 0.
        """
        dtype = torch.float64 if self.queries.dtype == torch.float64 else torch.float32
        q, k = self.queries.to(dtype), self.keys.to(dtype)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.transpose(-1, -2)
        scores *= self.queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores += self.bias.to(dtype)
        allowed = self.allowed()
        if allowed is not None:
            scores.masked_fill_(~allowed, -math.inf)
        if self.sinks is not None:
            sinks = self.sinks.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        dead = (scores == -math.inf).all(-1, keepdim=True)
        return scores.softmax(-1).masked_fill_(dead, 1.0 / self.key_seq)

    def tensors(self) -> list[Tensor]:
        """Every tensor the record holds."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]


class Layer(NamedTuple):
    """An attention in its place.

    Attributes:
        path: of the module that attended.
        record: what it attended with.
        source: the stream over whose last state it attended; None for self-attention.
    """

    path: str
    record: Record
    source: str | None = None
