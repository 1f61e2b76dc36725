"""What `rollout.capture` keeps of a forward pass: per stream the queries, keys and masks of its attention layers.

    with rollout.capture(model) as tape, torch.inference_mode():
        model(**batch)
    tape.rollout(query=0)                    # {stream: [B, S]}

A stream is a stack of self-attention layers over one sequence. What was recorded stays usable after the block, until
`Tape.clear()` or until the tape is deleted.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rollout.api import attention_rollout_qk
from rollout.method import get_method
from rollout.tape.call import call_arguments, meant_rows
from rollout.tape.record import Record
from rollout_kernels import Method

__all__ = ["Tape"]


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
                query=meant_rows(
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
