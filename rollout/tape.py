"""What `rollout.capture` keeps of a forward pass: per stream the queries, keys and masks of its attention layers.

    with rollout.capture(model) as tape, torch.inference_mode():
        model(**batch)
    tape.rollout(query=0)                    # {stream: [B, S]}

A stream is a stack of self-attention layers over one sequence. What was recorded stays usable after the block, until
`Tape.clear()` or until the tape is deleted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rollout.api import attention_rollout_qk
from rollout.method import get_method
from rollout_kernels import Method

__all__ = ["Record", "Tape"]

MASKS = ("key_mask", "query_mask")


@dataclass(frozen=True, eq=False, kw_only=True)
class Record:
    """One self-attention layer of one forward pass: A[b, h, i, j] = softmax_j(scale·q_i·k_j + bias, masked).

    Attributes:
        queries: [B, H, S, D], as they enter the product (rotary and other position codes applied).
        keys: [B, H_kv, S, D], H a multiple of H_kv.
        key_mask: bool [B, S], True = may be attended.
        query_mask: bool [B, S], False = the model makes this row uniform over the keys of its sample.
        bias: added to the scaled scores, broadcastable to [B, H, S, S]; −inf masks.
        causal: row i attends to columns j ≤ i only.
        window: (left, right), row i attends to i − left ≤ j ≤ i + right; None is unbounded.
        scale: factor on q·k; None is D^−½.

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

    def __post_init__(self) -> None:
        for name in ("queries", "keys", *MASKS, "bias"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"Record: {name} must be a tensor, got {type(value).__name__}")
            if value is not None:
                object.__setattr__(self, name, value.detach())
        q, k = self.queries, self.keys
        if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
            raise ValueError(
                f"Record: queries must be [B, H, S, D] and keys [B, H_kv, S, D] with the same B, S and D, "
                f"got {list(q.shape)} and {list(k.shape)}"
            )
        if q.shape[1] % k.shape[1]:
            raise ValueError(f"Record: H must be a multiple of H_kv, got {q.shape[1]} and {k.shape[1]}")
        for name in MASKS:
            mask = getattr(self, name)
            if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], q.shape[2])):
                raise ValueError(
                    f"Record: {name} must be bool [B, S] = {[q.shape[0], q.shape[2]]}, got {mask.dtype} "
                    f"{list(mask.shape)}"
                )

    @property
    def batch(self) -> int:
        """B."""
        return self.queries.shape[0]

    @property
    def seq(self) -> int:
        """S."""
        return self.queries.shape[2]

    def allowed(self) -> Tensor | None:
        """Which key each row may attend, bool, broadcastable to [B, H, S, S]; None when all."""
        device = self.queries.device
        j = torch.arange(self.seq, device=device)
        i = j[:, None]
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
        """The attention maps [B, H, S, S], written out; float32, float64 for float64 queries.

        A row with no key allowed is uniform over the S keys.
        """
        dtype = torch.float64 if self.queries.dtype == torch.float64 else torch.float32
        q, k = self.queries.to(dtype), self.keys.to(dtype)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.transpose(-1, -2)
        scores *= self.queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        if self.bias is not None:
            scores += self.bias.to(dtype)
        allowed = self.allowed()
        if allowed is not None:
            scores.masked_fill_(~allowed, -math.inf)
        dead = (scores == -math.inf).all(-1, keepdim=True)
        return scores.softmax(-1).masked_fill_(dead, 1.0 / self.seq)

    def tensors(self) -> list[Tensor]:
        """Every tensor the record holds."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]


class Tape:
    """What one forward pass recorded; made by `rollout.capture`.

    A second forward pass in the same block replaces the first. A tape that is not yet full, because the model raised,
    holds the layers that ran.

    Attributes:
        streams: the names of the streams, in the order they first ran.
        nbytes: bytes held by the recorded tensors; memory two of them share counts once.
        notes: what `capture(model, allow=...)` let pass that makes a chain over the attention layers less than the
            model: what mixed positions in between, and where. Empty for a capture that allowed nothing.
        left_out: the paths of modules whose attention was over another sequence, in the order they ran.
    """

    def __init__(self, model: str = "the model") -> None:
        self._model = model
        self.notes: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._records: dict[str, list[tuple[str, Record]]] = {}

    def __repr__(self) -> str:
        held = ", ".join(f"{stream}: {len(layers)} layers" for stream, layers in self._records.items())
        return f"Tape({held or 'empty'}; {self.nbytes} bytes)"

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self._records)

    @property
    def nbytes(self) -> int:
        storages = {}
        for layers in self._records.values():
            for _, record in layers:
                for tensor in record.tensors():
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def clear(self) -> None:
        """Drop everything recorded."""
        self._records = {}
        self._versions = {}
        self.notes, self.left_out = (), ()

    def keep_from(self, tensor: Tensor) -> None:
        """Copy the recorded tensors that share memory with one that is about to be changed in place."""
        changed = tensor.untyped_storage().data_ptr()
        for layers in self._records.values():
            for at, (path, record) in enumerate(layers):
                shared: dict[str, Any] = {
                    field.name: value.clone()
                    for field in fields(record)
                    if isinstance(value := getattr(record, field.name), Tensor)
                    and value.untyped_storage().data_ptr() == changed
                }
                if shared:
                    layers[at] = path, replace(record, **shared)
                    self._watch(layers[at][1])

    def _watch(self, record: Record) -> None:
        """Note which state of its tensors a record is of; under inference mode torch counts none."""
        for tensor in record.tensors():
            if not tensor.is_inference():
                self._versions[id(tensor)] = tensor, tensor._version

    def layers(self, stream: str | None = None) -> tuple[Record, ...]:
        """The records of a stream, input side first; `stream` may be left out when there is one.

        Raises:
            ValueError: nothing was recorded; several streams and none named; a recorded tensor was changed in place
                after the call.
            KeyError: no such stream; the message lists them.
        """
        held = self._records[self._stream(stream, "layers")]
        for path, record in held:
            for tensor in record.tensors():
                watched = self._versions.get(id(tensor))
                if watched is not None and watched[0] is tensor and tensor._version != watched[1]:
                    raise ValueError(
                        f"Tape: what {path or 'the model'} attended with must be as it was recorded, it was changed in "
                        f"place since: read the tape before that"
                    )
        return tuple(record for _, record in held)

    def modules(self, stream: str | None = None) -> tuple[str, ...]:
        """The path in the model of the module behind each layer of a stream, input side first.

        Raises:
            ValueError, KeyError: as `layers`.
        """
        return tuple(path for path, _ in self._records[self._stream(stream, "modules")])

    def maps(self, layer: int, stream: str | None = None) -> Tensor:
        """The attention maps [B, H, S, S] of one layer, computed now and not kept.

        Args:
            layer: index in the stream, 0 at the input side; a negative one counts from the top.
            stream: its name; may be left out when there is one.

        Raises:
            IndexError: no such layer.
            ValueError, KeyError: as `layers`.
        """
        records = self.layers(stream)
        if not -len(records) <= layer < len(records):
            raise IndexError(f"Tape.maps: layer must be one of the stream's {len(records)} layers, got {layer}")
        with torch.no_grad():
            return records[layer].maps()

    def rollout(
        self,
        query: int | Tensor | Mapping[str, Any] | None = None,
        *,
        method: str | Method = "rollout",
        lengths: Tensor | Mapping[str, Tensor] | None = None,
        backend: str = "auto",
        validate: bool = True,
    ) -> dict[str, Tensor]:
        """Attention rollout of every stream, by `rollout.attention_rollout_qk`: no map is ever stored.

        Args:
            query: as in `attention_rollout`: None, an int, long [B], float [B, S] or [B, R, S]; or a mapping from
                stream to one of these, and then only its streams are computed. An int counts the positions of each
                sample that the recorded key masks (or `lengths`) leave it: 0 is its first one, also when the batch is
                padded on the left, and −1 its last (where `query_mask` says what the other rows are, as in PyHealth's
                models, 0 is position 0). A long [B] names positions of the padded batch; a negative one counts from
                the sample's own end.
            method: a name in `rollout.METHODS`, or a `rollout.Method`, without gradients or supplied matrices.
            lengths: long [B], the valid prefix of each sample, or a mapping from stream to it. The recorded key masks
                apply in any case; lengths also make rows beyond them 0.
            backend, validate: as in `attention_rollout`.

        Returns:
            Per stream [B, S], [B, R, S] or [B, S, S], as `attention_rollout_qk` returns it.

        Raises:
            ValueError: nothing was recorded; the method needs maps or gradients; as `attention_rollout_qk`.
            KeyError: `query` or `lengths` names a stream that is not there.
        """
        chosen = get_method(method, "Tape.rollout")
        if chosen.gradients is not None or chosen.matrices:
            needs = "the gradients of the attention maps" if chosen.gradients is not None else "the matrices themselves"
            raise ValueError(
                f"Tape.rollout: method must form M_l from Q and K alone; {method!r} needs {needs}, which a tape does "
                f"not hold: run the model with its maps and call rollout.attention_rollout"
            )
        self._stream(next(iter(self._records), None), "rollout")
        for name, value in (("query", query), ("lengths", lengths)):
            for stream in value if isinstance(value, Mapping) else ():
                self._known(stream, "rollout", name)
        wanted = list(query) if isinstance(query, Mapping) else self.streams
        return {
            stream: attention_rollout_qk(
                query=_rows(
                    query[stream] if isinstance(query, Mapping) else query,
                    self.layers(stream),
                    lengths is not None,
                ),
                lengths=lengths.get(stream) if isinstance(lengths, Mapping) else lengths,
                method=chosen,
                backend=backend,
                validate=validate,
                **call_arguments(self.layers(stream)),
            )
            for stream in wanted
        }

    def add(self, stream: str, path: str, record: Record) -> None:
        """Append a layer; `rollout.capture` does this as the model runs.

        Raises:
            ValueError: the layer's B or S is not that of its stream.
        """
        layers = self._records.setdefault(stream, [])
        if layers and (record.batch, record.seq) != (layers[0][1].batch, layers[0][1].seq):
            first, (before, other) = (record.batch, record.seq), layers[0]
            raise ValueError(
                f"capture: the layers of stream {stream!r} must see one sequence; {path} ran on (B, S) = {first}, "
                f"{before} on {(other.batch, other.seq)}: capture the part of the model that attends over one sequence"
            )
        layers.append((path, record))
        self._watch(record)

    def _stream(self, stream: str | None, caller: str) -> str:
        if not self._records:
            raise ValueError(
                f"Tape.{caller}: the tape must hold a forward pass, got none: call {self._model} inside "
                f"`with rollout.capture(model) as tape:`; a tape is empty also after clear(), or when no attention "
                f"module ran in this thread"
            )
        if stream is None:
            if len(self._records) > 1:
                raise ValueError(f"Tape.{caller}: stream must be one of {list(self._records)}, got None")
            return next(iter(self._records))
        self._known(stream, caller, "stream")
        return stream

    def _known(self, stream: str, caller: str, argument: str) -> None:
        if stream not in self._records:
            raise KeyError(f"Tape.{caller}: {argument} must name one of the streams {list(self._records)}: {stream!r}")


def _rows(query: Any, layers: tuple[Record, ...], has_lengths: bool) -> Any:
    """Rows counted from each sample's own start or end, as positions of the padded batch.

    Raises:
        ValueError: a sample has no such row.
    """
    valid = None
    for layer in layers:
        if layer.key_mask is not None:
            valid = layer.key_mask if valid is None else valid & layer.key_mask
    whole = isinstance(query, Tensor) and (query.is_floating_point() or query.dim() != 1)
    if valid is None or query is None or whole or isinstance(query, bool) or has_lengths:
        return query
    seq = valid.shape[1]
    positions = torch.arange(seq, device=valid.device)
    some = valid.any(1)
    starts = torch.where(some, torch.where(valid, positions, seq).amin(1), 0)
    if all(layer.query_mask is not None for layer in layers):  # the model says what such rows are, and reads them
        starts = torch.zeros_like(starts)
    ends = torch.where(some, torch.where(valid, positions, -1).amax(1) + 1, seq)
    if isinstance(query, Tensor):
        given = query.to(valid.device)
        return torch.where(given < 0, given + ends, given)
    rows = starts + query if query >= 0 else ends + query
    outside = (rows < starts) | (rows >= ends)
    if bool(outside.any()):
        b = int(outside.nonzero()[0])
        raise ValueError(
            f"Tape.rollout: query must be a row of every sample, got {query}; sample {b} has "
            f"{int(ends[b] - starts[b])} positions by the recorded mask"
        )
    return rows


def call_arguments(layers: tuple[Record, ...]) -> dict[str, Any]:
    """The arguments of `attention_rollout_qk` for the layers of a stream.

    Masks, windows and scales that all layers share are passed as they are. Where layers differ, a mask becomes part of
    that layer's bias (−inf), and scales are multiplied into the queries.
    """
    shared: dict[str, Any] = {name: getattr(layers[0], name) for name in (*MASKS, "causal", "window")}
    for name, value in shared.items():
        if not all(_same(value, getattr(layer, name)) for layer in layers):
            shared[name] = False if name == "causal" else None
    scales = [layer.queries.shape[-1] ** -0.5 if layer.scale is None else float(layer.scale) for layer in layers]
    one_scale = len(set(scales)) == 1
    queries = [layer.queries if one_scale else layer.queries * s for layer, s in zip(layers, scales, strict=True)]
    biases = [_bias(layer, shared) for layer in layers]
    return {
        "queries": queries,
        "keys": [layer.keys for layer in layers],
        "bias": None if all(bias is None for bias in biases) else biases,
        "scale": scales[0] if one_scale else 1.0,
        **shared,
    }


def _same(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    return type(first) is type(second) and first == second


def _bias(layer: Record, shared: Mapping[str, Any]) -> Tensor | None:
    """A layer's bias, with the masks of its own that are not passed for all layers."""
    passed = [name for name, value in shared.items() if _same(value, getattr(layer, name))]
    without: dict[str, Any] = {name: False if name == "causal" else None for name in passed}
    rest = replace(layer, **without).allowed()
    if rest is None:
        return layer.bias
    bias = torch.zeros(rest.shape, dtype=torch.float32, device=rest.device).masked_fill_(~rest, -math.inf)
    return bias if layer.bias is None else bias + layer.bias
