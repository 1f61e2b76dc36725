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
from rollout.tape.handed import Slope, gradients_of
from rollout.tape.record import Layer, Record
from rollout.tape.through import roll_through
from rollout_kernels import Method

__all__ = ["Tape"]

MEASURED = ("values", "output_weights", "inputs")


class Tape:
    """What one forward pass recorded; made by `rollout.capture`.

    A second forward pass in the same block replaces the first. A tape that is not yet full, because the model raised,
    holds the layers that ran.

    Attributes:
        streams: the names of the streams, in the order they first ran.
        nbytes: bytes held by the recorded tensors; memory two of them share counts once.
        notes: what `capture(model, allow=...)` let pass that makes a chain over the attention layers less than the
            model: what mixed positions in between, and where. Empty for a capture that allowed nothing.
        left_out: the paths of modules whose attention was over another sequence and was not recorded, in the order
            they ran.
    """

    def __init__(self, model: str = "the model") -> None:
        self._model = model
        self.notes: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._layers: dict[str, list[Layer]] = {}
        self._slopes: dict[str, list[Slope]] = {}
        self._gradients: dict[str, list[Tensor]] = {}

    def __repr__(self) -> str:
        held = ", ".join(f"{stream}: {len(self._stack(stream))} layers" for stream in self._layers)
        return f"Tape({held or 'empty'}; {self.nbytes} bytes)"

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(stream for stream in self._layers if self._stack(stream))

    @property
    def nbytes(self) -> int:
        storages = {}
        for layers in self._layers.values():
            for layer in layers:
                for tensor in layer.record.tensors():
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def clear(self) -> None:
        """Drop everything recorded."""
        self._layers, self._slopes, self._gradients = {}, {}, {}
        self._versions = {}
        self.notes, self.left_out = (), ()

    def keep_from(self, tensor: Tensor) -> None:
        """Copy the recorded tensors that share memory with one that is about to be changed in place."""
        changed = tensor.untyped_storage().data_ptr()
        for layers in self._layers.values():
            for at, layer in enumerate(layers):
                shared: dict[str, Any] = {
                    field.name: value.clone()
                    for field in fields(layer.record)
                    if isinstance(value := getattr(layer.record, field.name), Tensor)
                    and value.untyped_storage().data_ptr() == changed
                }
                if shared:
                    layers[at] = layer._replace(record=replace(layer.record, **shared))
                    self._watch(layers[at].record)

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
        return tuple(layer.record for layer in self._sound(self._stack(self._stream(stream, "layers"))))

    def modules(self, stream: str | None = None) -> tuple[str, ...]:
        """The path in the model of the module behind each layer of a stream, input side first.

        Raises:
            ValueError, KeyError: as `layers`.
        """
        return tuple(layer.path for layer in self._stack(self._stream(stream, "modules")))

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

    def take_gradients(self, target: Tensor, *, retain_graph: bool = False) -> None:
        """Go back from a number as far as the recorded attentions, for the gradient-weighted methods of `rollout`.

            with rollout.capture(model, gradients=True) as tape:
                logits = model(**batch).logits
            tape.take_gradients(logits[:, 1].sum())
            tape.rollout(query=0, method="chefer")

        Of each attention the gradient of its output is kept, [B, H, S, D_v]; no `.grad` is touched.

        Args:
            target: one number made of the model's output: of a class the sum of its logits over the samples.
            retain_graph: keep autograd's graph, for another target after this one.

        Raises:
            TypeError, ValueError: it is no such number; nothing was recorded, or without gradients=True.
        """
        name = "Tape.take_gradients"
        self._stream(next(iter(self._layers), None), "take_gradients")
        if not self._slopes:
            raise ValueError(f"{name}: the tape must be that of a capture(model, gradients=True)")
        slopes = [slope for held in self._slopes.values() for slope in held]
        found = gradients_of(target, slopes, name, retain_graph=retain_graph)
        records = [layer.record for stream in self._slopes for layer in self._stack(stream)]
        taken = iter([_nothing(record) if each is None else each for each, record in zip(found, records, strict=True)])
        self._gradients = {stream: [next(taken) for _ in held] for stream, held in self._slopes.items()}

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
            method: a name in `rollout.METHODS`, or a `rollout.Method`, without supplied matrices; one that weights
                maps by gradients after `take_gradients`, one with values of a capture with values=True.
            lengths: long [B], the valid prefix of each sample, or a mapping from stream to it. The recorded key masks
                apply in any case; lengths also make rows beyond them 0.
            backend, validate: as in `attention_rollout`.

        Returns:
            Per stream [B, S], [B, R, S] or [B, S, S], as `attention_rollout_qk` returns it.

        Raises:
            ValueError: nothing was recorded; the method needs what was not; as `attention_rollout_qk`.
            KeyError: `query` or `lengths` names a stream that is not there.
        """
        chosen = get_method(method, "Tape.rollout")
        if chosen.values is not None:
            self._refuse_unmeasured(method)
        elif chosen.gradients is None:
            chosen = _method_of_maps(method, "Tape.rollout")
        elif not self._gradients:
            raise ValueError(
                f"Tape.rollout: method must form M_l from Q and K alone; {method!r} needs gradients: record by "
                f"rollout.capture(model, gradients=True) and call Tape.take_gradients first, or run the model with its "
                f"maps and call rollout.attention_rollout"
            )
        self._stream(next(iter(self._layers), None), "rollout")
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
                    "Tape.rollout",
                ),
                lengths=lengths.get(stream) if isinstance(lengths, Mapping) else lengths,
                method=chosen,
                backend=backend,
                validate=validate,
                **call_arguments(self.layers(stream)),
                **self._handed_on(stream, chosen),
            )
            for stream in wanted
        }

    def encoder_decoder_rollout(
        self,
        query: int | Tensor | None = None,
        *,
        stream: str | None = None,
        method: str | Method = "rollout",
        backend: str = "auto",
        validate: bool = True,
    ) -> dict[str, Tensor]:
        """Attention rollout from a decoder's positions through its cross-attention to the encoder's inputs.

        The chain of Abnar & Zuidema (2020) over the joint sequence [decoder; encoder]: a decoder's self-attention is
        [[M, 0], [0, I]], its cross-attention [[r·I, a·C], [0, I]] with the r and a of `method`, and the encoder's
        layers come below. Relevance that a decoder position has for encoder positions leaves the decoder's rows, so
        the rows of both together sum to 1. Computed row by row from Q and K; no map is ever stored.

        Args:
            query: of the decoder: None (every position), an int, long [B], float [B, S] or [B, R, S], as in `rollout`.
            stream: the decoder's; may be left out when one stream alone has cross-attention.
            method: as in `rollout`; heads must be fused by their mean, without discarding and from the first layer.
            backend, validate: as in `attention_rollout`.

        Returns:
            For the decoder's stream [B, S], [B, R, S] or [B, S, S], relevance for its own inputs; and for each stream
            it attends over [B, S'], [B, R, S'] or [B, S, S'], for the inputs of that.

        Raises:
            ValueError: no cross-attention was recorded (`rollout.capture(model, cross_attention=True)` does), or of
                several streams; the method is another; as `attention_rollout_qk`.
            KeyError: no such stream.
        """
        name = "Tape.encoder_decoder_rollout"
        chosen = _method_of_maps(method, name)
        self._stream(next(iter(self._layers), None), "encoder_decoder_rollout")
        if stream is not None:
            self._known(stream, "encoder_decoder_rollout", "stream")
        crossing = [at for at, layers in self._layers.items() if any(layer.source for layer in layers)]
        if not crossing or (stream is not None and stream not in crossing):
            raise ValueError(
                f"{name}: the tape must hold cross-attention of {stream or 'a stream'}, it holds that of {crossing}: "
                f"record it by rollout.capture(model, cross_attention=True)"
            )
        if stream is None and len(crossing) > 1:
            raise ValueError(f"{name}: stream must be one of {crossing}, got None")
        top = stream or crossing[0]
        held = {at: self._sound(layers) for at, layers in self._layers.items()}
        return roll_through(held, top, query, chosen, name, backend=backend, validate=validate)

    def _handed_on(self, stream: str, method: Method) -> dict[str, Any]:
        """Values and what goes with them, for a method that needs them."""
        layers = self.layers(stream)
        if method.values is not None:
            return {name: [getattr(each, name) for each in layers] for name in MEASURED}
        if method.gradients is None:
            return {}
        return {"values": [each.values for each in layers], "output_gradients": self._gradients[stream]}

    def _refuse_unmeasured(self, method: str | Method) -> None:
        held = [layer for stream in self._layers for layer in self._stack(stream)]
        if any(layer.record.inputs is None for layer in held):
            raise ValueError(
                f"Tape.rollout: method must form M_l from Q and K alone; {method!r} needs values, W_O and residuals: "
                f"record by rollout.capture(model, values=True)"
            )

    def add(self, stream: str, path: str, record: Record, source: str | None = None, slope: Slope | None = None) -> int:
        """Append a layer; `rollout.capture` does this as the model runs.

        Args:
            stream: whose positions attend.
            path: of the module.
            record: what it attended with.
            source: the stream it attended over, when that is another.
            slope: where the gradient of its output arrives, when that is asked for.

        Returns:
            its number in the stream, cross-attention counted, for `measure`.

        Raises:
            ValueError: the layer's B or S is not that of its stream, or its stream has been attended over already; its
                keys are of another length and no source is named.
        """
        if source is None and record.key_seq != record.seq:
            raise ValueError(
                f"capture: self-attention must have as many keys as queries; {path} has {record.seq} queries and "
                f"{record.key_seq} keys"
            )
        layers = self._layers.setdefault(stream, [])
        if layers and (record.batch, record.seq) != (layers[0].record.batch, layers[0].record.seq):
            first, (before, other, _) = (record.batch, record.seq), layers[0]
            raise ValueError(
                f"capture: the layers of stream {stream!r} must see one sequence; {path} ran on (B, S) = {first}, "
                f"{before} on {(other.batch, other.seq)}: capture the part of the model that attends over one sequence"
            )
        over = next((layer for held in self._layers.values() for layer in held if layer.source == stream), None)
        if over is not None:
            raise ValueError(
                f"capture: a stream must be complete when another attends over it; {path} ran in {stream!r} after "
                f"{over.path} had attended over that"
            )
        layers.append(Layer(path, record, source))
        if slope is not None:
            self._slopes.setdefault(stream, []).append(slope)
        self._watch(record)
        return len(layers) - 1

    def measure(self, stream: str, at: int, output_weights: Tensor, inputs: Tensor) -> None:
        """Add to layer `at` of a stream W_O [H, D_v, E] and the residual x [B, S, E]."""
        layer = self._layers[stream][at]
        record = replace(layer.record, output_weights=output_weights, inputs=inputs)
        self._layers[stream][at] = layer._replace(record=record)
        self._watch(record)

    def _stack(self, stream: str) -> list[Layer]:
        """The self-attention of a stream."""
        return [layer for layer in self._layers[stream] if layer.source is None]

    def _sound(self, layers: list[Layer]) -> list[Layer]:
        """The layers; refused when a tensor of theirs is no longer what was recorded."""
        for layer in layers:
            for tensor in layer.record.tensors():
                watched = self._versions.get(id(tensor))
                if watched is not None and watched[0] is tensor and tensor._version != watched[1]:
                    raise ValueError(
                        f"Tape: what {layer.path or 'the model'} attended with must be as it was recorded, it was "
                        f"changed in place since: read the tape before that"
                    )
        return layers

    def _stream(self, stream: str | None, caller: str) -> str:
        if not self._layers:
            raise ValueError(
                f"Tape.{caller}: the tape must hold a forward pass, got none: call {self._model} inside "
                f"`with rollout.capture(model) as tape:`; a tape is empty also after clear(), or when no attention "
                f"module ran in this thread"
            )
        if stream is None:
            if len(self._layers) > 1:
                raise ValueError(f"Tape.{caller}: stream must be one of {list(self._layers)}, got None")
            return next(iter(self._layers))
        self._known(stream, caller, "stream")
        return stream

    def _known(self, stream: str, caller: str, argument: str) -> None:
        if stream not in self._layers:
            raise KeyError(f"Tape.{caller}: {argument} must name one of the streams {list(self._layers)}: {stream!r}")


def _nothing(record: Record) -> Tensor:
    """The gradient of an output that the number does not depend on."""
    assert record.values is not None
    shape = (*record.queries.shape[:3], record.values.shape[3])
    return record.values.new_zeros(shape)


def _method_of_maps(method: str | Method, caller: str) -> Method:
    """A method that forms M_l from the attention maps alone."""
    chosen = get_method(method, caller)
    needs = None
    if chosen.gradients is not None:
        needs = "the gradients of the attention maps"
    elif chosen.values is not None:
        needs = "values, output weights and inputs"
    elif chosen.matrices:
        needs = "the matrices themselves"
    if needs is not None:
        raise ValueError(
            f"{caller}: method must form M_l from Q and K alone; {method!r} needs {needs}, which a tape does not hold: "
            f"run the model with its maps and call rollout.attention_rollout"
        )
    return chosen
