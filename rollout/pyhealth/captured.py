"""Rollout of PyHealth models without readout methods, from the queries and keys that `rollout.capture` records."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rollout._capture import capture
from rollout.pyhealth.readout import Relevance, check_features
from rollout.pyhealth.zoo import PAIR, Call, Reading
from rollout_kernels import Method

__all__ = ["CapturedRollout", "Query"]

Query = int | Tensor | Mapping[str, Any]
NAME = "AttentionRollout"


class CapturedRollout:
    """What `AttentionRollout` does for a model of `rollout.pyhealth.zoo`; one forward pass under inference mode.

    Args:
        model: In evaluation mode.
        reading: What is known of it.
        query: The positions wanted, where each predicts.
        method: Formed of attention alone.
        backend: As in `rollout.attention_rollout`.

    Raises:
        TypeError: `query` is no position.
        ValueError: `query` is missing or has no meaning; the method needs more; the model cannot be read.
    """

    def __init__(self, model: Any, reading: Reading, query: Query | None, method: Method, backend: str) -> None:
        self.model, self.reading, self.query = model, reading, query
        self.method, self.backend = method, backend
        kind = type(model).__name__
        if reading.predicts and query is None:
            raise ValueError(
                f"{NAME}: query must name a position for a {kind}, got None: each of its positions "
                f"({reading.position}) predicts {reading.predicts}, and none is read for all; query=-1 is the last of "
                f"each sample"
            )
        if not reading.predicts and query is not None:
            raise ValueError(
                f"{NAME}: query is for models whose every position predicts; the prediction of a {kind} reads position "
                f"0 ({reading.position}), got {query!r}"
            )
        if isinstance(query, bool) or not isinstance(query, int | Tensor | Mapping | None):
            raise TypeError(f"{NAME}: query must be an int, long [B] or float [B, S], got {query!r}")
        known = PAIR if reading.features == tuple(PAIR) else ()
        if isinstance(query, Mapping) and not (query and set(query) <= set(known)):
            raise ValueError(
                f"{NAME}: query must be {'of ' + ', '.join(known) if known else 'one'} for a {kind}, got {query!r}"
            )
        if method.values is not None:
            raise ValueError(
                f"{NAME}: method must not measure values for a {kind}, whose attention alone is recorded; use "
                f"method='rollout'"
            )
        reading.check(model)

    def attribute(self, data: Mapping[str, Any]) -> Relevance:
        """Relevance by feature, in the shape that the table of `rollout.pyhealth.zoo` says.

        Raises:
            MissingFeatureError: The batch lacks a feature.
            CaptureError: The model ran an attention that cannot be recorded exactly.
            ValueError: A sample has no position `query`.
        """
        rows, call, _ = self.rows(data)
        return self.reading.shape(rows, call)

    def rows(self, data: Mapping[str, Any]) -> tuple[Relevance, Call, Any]:
        """By stream the relevance of every position, [B, S]; how the model was called; and the position read."""
        check_features(list(self.reading.features or self.model.feature_keys), dict(data), NAME)
        if self.reading.pooled is not None:
            return self._pooled(self.reading.pooled(self.model), data), Call(self.model, data, (), data), None
        recording = capture(self.model, shared_layers=True, cross_attention=self.reading.cross_attention)
        with torch.inference_mode(), self._calls(data) as calls, recording as tape:
            self.model(**data)
        call, query = calls[-1], self._query(calls[-1], tape.streams)
        if self.reading.cross_attention:
            return tape.encoder_decoder_rollout(query, method=self.method, backend=self.backend), call, query
        lengths = None if self.reading.lengths is None else self.reading.lengths(call)
        return tape.rollout(query, lengths=lengths, method=self.method, backend=self.backend), call, query

    def _pooled(self, parts: Mapping[str, tuple[str, str]], data: Mapping[str, Any]) -> Relevance:
        """By feature the row that the weights of its pooling are."""
        weights: dict[str, Tensor] = {}
        with torch.inference_mode(), ExitStack() as stack:
            tapes = {}
            for key, (attends, weighs) in parts.items():
                tapes[key] = stack.enter_context(capture(self.model.get_submodule(attends)))
                keep = partial(_keep_weights, weights, key)
                stack.callback(self.model.get_submodule(weighs).register_forward_hook(keep).remove)
            self.model(**data)
        found = {}
        for key, tape in tapes.items():
            (found[key],) = tape.rollout(weights[key], method=self.method, backend=self.backend).values()
        return found

    def _query(self, call: Call, streams: tuple[str, ...]) -> Any:
        """As a tape takes it: a position of each sample's own, long [B], where its length is known."""
        query = 0 if self.query is None else self.query
        if isinstance(query, Mapping):
            return {stream: query[key] for key in query for stream in streams if stream.startswith(PAIR[key])}
        if self.reading.lengths is None or (isinstance(query, Tensor) and query.is_floating_point()):
            return query
        lengths = self.reading.lengths(call)
        wanted = torch.as_tensor(query, device=lengths.device)
        if wanted.dim() and wanted.shape != lengths.shape:
            raise ValueError(
                f"{NAME}: query must name a position of each of {len(lengths)} samples, got {list(wanted.shape)}"
            )
        wanted = wanted.expand_as(lengths)
        rows = torch.where(wanted < 0, wanted + lengths, wanted)
        outside = ((rows < 0) | (rows >= lengths)).nonzero()
        if len(outside):
            b = int(outside[0])
            raise ValueError(
                f"{NAME}: query must be a position of every sample, got {int(wanted[b])} for sample {b}, which has "
                f"{int(lengths[b])} ({self.reading.position})"
            )
        return rows

    @contextmanager
    def _calls(self, data: Mapping[str, Any]) -> Iterator[list[Call]]:
        """The calls of the part that attends."""
        calls: list[Call] = []

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(Call(self.model, data, args, kwargs))

        handle = self.model.get_submodule(self.reading.part).register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()


def _keep_weights(weights: dict[str, Tensor], key: str, _: Any, __: Any, output: tuple[Tensor, Tensor]) -> None:
    weights[key] = output[1]
