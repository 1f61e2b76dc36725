"""What a capture must know of a model beside its attentions, found out by one call of it.

Is an attention over one sequence, or do its keys come from elsewhere? Does it stand on the one below it? Is anything
else mixing positions in between? None of this is read off names. The first call of a model runs in lockstep with a
second one (`rollout._capture.shadow`) in which every attention's output is other than it was at half of the positions.
At the next attention the other half must be as before: if not, something has carried numbers from one position to
another. The calls after the first are compared with it and pay nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rollout._capture.grids import altered_rows, as_sequence, sequences
from rollout._capture.shadow import Lockstep, Trace

__all__ = ["Kind", "Study"]

SELF, CROSS, STALE = "self-attention", "cross-attention", "stale keys"
Kind = str
# A change that rounding could make, in units of the last place of the largest number of a row.
SLACK = 4.0


@dataclass
class Stream:
    """Where the probe is in one stream.

    Attributes:
        altered: bool [B, S], the positions at which numbers are other than they were.
        inputs, before: what its first layer stands on: inputs of the model, and attentions of other streams.
        lost: how many operations could not be followed when it was last looked at.
        valid: bool [B, S], the positions that counted in its last attention.
        layers: how many attentions were recorded.
        grid: shape of the state of an image that the stack began with, until its first attention, and then its layout.
    """

    altered: Tensor
    inputs: frozenset[int]
    before: dict[str, int]
    lost: int
    valid: Tensor | None
    layers: int = 0
    grid: torch.Size | str | None = None


class Study:
    """One call of a model, looked at.

    Attributes:
        lockstep: to be entered around the call.
        findings: what makes a chain over the recorded attentions alone wrong, in the order it was met.
        conclusive: there were positions to see a change at.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.lockstep = Lockstep(model, inputs)
        self.findings: list[str] = []
        self.conclusive = True
        self._streams: dict[str, Stream] = {}
        given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and not leaf.is_nested]
        images = any(leaf.dim() > 3 for leaf in given)
        self._sequences = set() if images else {leaf.shape[:2] for leaf in given if leaf.dim() > 1}

    def _is_image(self, state: Tensor) -> bool:
        return state.dim() == 4 and state.shape[:2] not in self._sequences

    def kind(self, stream: str, queries: Tensor, keys: Tensor) -> Kind:
        """Whether queries and keys are of one sequence, and of one layer's state of it."""
        q, k = self.lockstep.trace(queries), self.lockstep.trace(keys)
        one_source = bool(q.inputs & k.inputs) or not (q.inputs or k.inputs)
        if q.layers == k.layers and one_source:
            return SELF
        known = self._streams.get(stream)
        one_state = known is not None and q.layers.get(stream) == k.layers.get(stream) == known.layers - 1 >= 0
        if one_state and one_source:
            return SELF  # whatever else, of other streams, went into one of them
        if known is None or queries.shape[-2] != keys.shape[-2]:
            return CROSS
        others = {name: layer for name, layer in k.layers.items() if name != stream}
        same_inputs = k.inputs == known.inputs
        older = k.layers.get(stream, -1) < q.layers.get(stream, -1)
        return STALE if same_inputs and others == known.before and older else CROSS

    def begin(self, stream: str, hidden: Tensor) -> None:
        """The first layer of a stack is about to run: other numbers at half of the positions.

        Args:
            stream: of the stack; one that has run its layers before goes on where it was.
            hidden: [B, S, E], of parallel residual streams [B, S, N, E], or the state of an image, [B, C, H, W] or
                [B, H, W, C].
        """
        once = [hidden.shape[dim] > 1 and stride == 0 for dim, stride in enumerate(hidden.stride())]
        if (stream in self._streams and self._streams[stream].layers) or any(once[1:]):  # all positions are one
            return
        trace = self.lockstep.trace(hidden)
        with self.lockstep.paused():
            image = self._is_image(hidden)
            at = self._open(stream, hidden if image else hidden.flatten(2).unsqueeze(1), None)
            if once[0]:  # all samples are one
                at.altered, hidden = at.altered[:1].expand_as(at.altered), hidden[:1]
            altered = at.altered[(slice(len(hidden)), slice(None), *(None,) * (hidden.dim() - 2))]
            if image:
                altered = at.altered = altered_rows(hidden)
                at.grid = hidden.shape
            numbers = torch.where(altered, _other(hidden), hidden)
            self.lockstep.alter(hidden, numbers, Trace(trace.inputs, dict(trace.layers)))

    def end(self, stream: str, where: str, hidden: Tensor) -> None:
        """The last layer of a stack has given what `begin` says."""
        at = self._streams.get(stream)
        if at is None or not at.layers or isinstance(at.grid, str) != self._is_image(hidden):
            return
        state = as_sequence(hidden, at.grid) if isinstance(at.grid, str) else hidden.flatten(2).unsqueeze(1)
        if at.altered.shape == (state.shape[0], state.shape[2]):
            with self.lockstep.paused():
                self._compare(at, [state], at.valid, f"the last attention and the end of {where}")

    def arrive(self, stream: str, where: str, states: Sequence[Tensor], valid: Tensor | None) -> None:
        """A self-attention is about to be recorded: does it stand on the one below, position by position?

        Args:
            stream, where: its stream, and its name for messages.
            states: what it attends with, [B, *, S, *] each: queries, keys and values.
            valid: bool [B, S], the positions that count.
        """
        with self.lockstep.paused():
            at = self._streams.get(stream)
            size = states[0].shape[0], states[0].shape[2]
            if at is None:
                self._open(stream, states[0], valid)
                return
            if not at.layers and at.grid is not None and not self._flatten(at, where, states):
                return
            if not at.layers and at.altered.shape == size[::-1] != size:  # begun with S in front
                at.altered = at.altered.t()
            if not at.layers and at.altered.shape != size:
                self.findings.append(
                    f"{where} attends over {size[1]} positions in each of {size[0]}, and its stack works on "
                    f"{at.altered.shape[1]} in each of {at.altered.shape[0]}"
                )
                return
            if not self.stands(stream, states[0]):
                self.findings.append(
                    f"{where} does not stand on the attention recorded before it: they run side by side"
                )
            at.valid = valid
            if at.altered.shape == size:
                self._compare(at, states, valid, f"{where} and {'the attention below' if at.layers else 'its stack'}")

    def stands(self, stream: str, state: Tensor) -> bool:
        """Whether a state is made of what the last attention of its stream gave."""
        at = self._streams.get(stream)
        return at is None or self.lockstep.trace(state).layers.get(stream, -1) == at.layers - 1

    def _flatten(self, at: Stream, where: str, states: Sequence[Tensor]) -> bool:
        """The positions altered in an image, now that it is known which sequence attention makes of it."""
        shape, seq = at.grid, states[0].shape[2]
        if not isinstance(shape, torch.Size):
            return True
        found = list(sequences(shape, at.altered, seq))
        if not found:
            self.findings.append(f"{where} attends over {seq} positions, and its stack works on images {list(shape)}")
            return False
        kept = [pair for pair in found if not any(self._changed(state, ~pair[1]) for state in states)]
        at.grid, at.altered = (kept or found)[0]
        return True

    def _open(self, stream: str, state: Tensor, valid: Tensor | None) -> Stream:
        trace = self.lockstep.trace(state)
        made = Stream(_half(state, valid), trace.inputs, dict(trace.layers), len(self.lockstep.lost), valid)
        self._streams[stream] = made
        return made

    def _compare(self, at: Stream, states: Sequence[Tensor], valid: Tensor | None, where: str) -> None:
        """What was altered must have stayed where it was."""
        if len(self.lockstep.lost) > at.lost:
            what = ", ".join(dict.fromkeys(self.lockstep.lost[at.lost :]))
            self.findings.append(f"between {where} ran what cannot be followed: {what}")
            at.lost = len(self.lockstep.lost)
        counted = torch.ones_like(at.altered) if valid is None else valid
        kept = ~at.altered & counted
        self.conclusive = self.conclusive and bool(kept.any()) and bool((at.altered & counted).any())
        if any(self._changed(state, kept) for state in states):
            self.findings.append(f"positions are mixed by something else between {where}")

    def source(self, stream: str, where: str, states: Sequence[Tensor], valid: Tensor | None) -> str | None:
        """The stream over whose last state a cross-attention attends, position by position; None when it is none.

        Args:
            stream, where: of the queries, and a name for messages.
            states: [B, *, S, *] of queries, and [B, *, S', *] of keys and values.
            valid: bool [B, S'], the keys that count.
        """
        with self.lockstep.paused():
            at = self._streams.get(stream)
            if at is None or at.altered.shape != (states[0].shape[0], states[0].shape[2]):
                at = self._open(stream, states[0], None)
            if not self.stands(stream, states[0]):
                self.findings.append(
                    f"{where} does not stand on the attention recorded before it: they run side by side"
                )
            self._compare(at, states[:1], None, f"the attention below and {where}")
            layers = self.lockstep.trace(states[1]).layers
            for name, over in self._streams.items():
                size = states[1].shape[0], states[1].shape[2]
                if name != stream and layers == {name: over.layers - 1} and over.altered.shape == size:
                    self._compare(over, states[1:], valid, f"the last attention of {name} and the keys of {where}")
                    return name
        return None

    def stand(self, stream: str) -> None:
        """An attention that is known to stand on the one before, which was not left."""
        self._streams[stream].layers += 1

    def leave(self, stream: str, where: str, queries: Tensor, output: Tensor, *, recorded: bool) -> None:
        """An attention has given its output, [B, *, S, *]: alter it at the positions of the stream."""
        trace = self.lockstep.trace(queries)
        at = self._streams.get(stream)
        layers = dict(trace.layers)
        with self.lockstep.paused():
            if at is None or at.altered.shape != (output.shape[0], output.shape[2]):
                numbers = output.clone()
            else:
                numbers = torch.where(at.altered[:, None, :, None], _other(output), output)
                if recorded:
                    layers[stream] = at.layers
                    at.layers += 1
            self.lockstep.alter(output, numbers, Trace(trace.inputs, layers))

    def _changed(self, state: Tensor, kept: Tensor) -> bool:
        """Whether the shadow of [B, *, S, *] differs at the positions kept, bool [B, S]."""
        shadow = self.lockstep.shadow(state)
        if shadow is state:
            return False
        size = state.abs().amax((1, 3), keepdim=True) * torch.finfo(state.dtype).eps * SLACK
        differs = ((shadow - state).abs() > size).any(3).any(1) | (shadow.isnan() != state.isnan()).any(3).any(1)
        return bool((differs & kept).any())


def _half(state: Tensor, valid: Tensor | None) -> Tensor:
    """About half of the positions of [B, *, S, *] that count, others in each sample, the first one among them."""
    batch, seq = state.shape[0], state.shape[2]
    picked = torch.rand(batch, seq, generator=torch.Generator().manual_seed(seq)) < 0.5
    picked = picked.to(state.device)
    counts = torch.ones_like(picked) if valid is None else valid
    first = counts & (counts.cumsum(1) == 1)
    last = counts & (counts.flip(1).cumsum(1).flip(1) == 1) & ~first
    return (picked & counts | first) & ~last


def _other(output: Tensor) -> Tensor:
    """Other numbers of the same size as these."""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    size = output.float().pow(2).mean().sqrt().clamp(min=1e-3)
    return output + (noise.to(output.device) * size).to(output.dtype)
