"""One forward pass of PyHealth's own models on fused attention: queries and keys are kept, no map is made.

What a sample's valid positions become does not depend on its padding, nor on the other samples: a valid row attends to
valid keys only, and everything else in a `TransformerLayer` works position by position. So on a CPU a layer may be run
on groups of samples of like length, each at its own width and small enough to stay in cache, when all the model reads
is row 0 and that is valid; and of the top block no row but 0 is needed. A sample whose row 0 is not valid is uniform
over all S positions there, and keeps the full width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyhealth.models.transformer import PositionwiseFeedForward, TransformerBlock, TransformerLayer
from torch import Tensor, nn

from rollout._capture.adapters.pyhealth import CannotFuseError, fused_attention, valid_positions
from rollout._capture.patch import Around, foreign_forward
from rollout._capture.recording import is_recording
from rollout.api import attention_rollout_qk
from rollout.pyhealth.watch import ModelCapture, Sites, Transformer, listener
from rollout_kernels import Method

__all__ = ["CannotFuseError", "FusedCapture", "can_fuse", "can_split"]

Forward = Callable[..., Any]

# Samples of up to GROUP_WIDTH positions run together when their lengths differ by at most GROUP_SLACK, longer ones when
# they do not differ: a further group costs time, and so do padded positions and their mask.
GROUP_WIDTH = 128
GROUP_SLACK = 24
GROUP_POSITIONS = 2048


def can_fuse(model: nn.Module, sites: Sites) -> bool:
    """Whether torch's fused attention may stand in for PyHealth's.

    Not where it would round otherwise (half precision and autocast), drop out otherwise, or where someone else wants
    the map: a forward of their own or a hook on the `Attention`, or an open `rollout.capture`.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None or parameter.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled(parameter.device.type) or any(part.training for part in model.modules()):
        return False
    return not any(
        site._forward_hooks or foreign_forward(site) is not None or is_recording(site)
        for layers in sites.values()
        for site in layers
    )


def can_split(model: Any) -> bool:
    """Whether of each stream PyHealth's own Transformer reads row 0 and nothing else, and runs on a CPU."""
    return (
        isinstance(model, Transformer)
        and type(model).forward is Transformer.forward
        and type(model).forward_from_embedding is Transformer.forward_from_embedding
        and foreign_forward(model) is None
        and "forward_from_embedding" not in vars(model)
        and all(map(_plain_layer, model.transformer.values()))
        and all(p.device.type == "cpu" for p in model.parameters())
    )


def _plain_layer(layer: Any) -> bool:
    """Whether a layer is PyHealth's own, with nobody's hooks in it that would see parts of a batch."""
    if type(layer) is not TransformerLayer:
        return False
    blocks = layer.transformer
    if any(type(b) is not TransformerBlock or type(b.feed_forward) is not PositionwiseFeedForward for b in blocks):
        return False
    return not any(
        part._forward_hooks or part._forward_pre_hooks or foreign_forward(part) is not None for part in layer.modules()
    )


@dataclass
class Group:
    """Samples of a stream that ran together, and what their layers attended with.

    Attributes:
        row_only: row 0 of every sample is valid, and of the top layer's output no other is needed.
        mask, valid: the mask as PyHealth handed it over, and the valid positions it is made of, bool [b, n]; None when
            every position is valid.
        queries, keys: per layer [b, H, n, D], input side first.
    """

    row_only: bool = False
    mask: Tensor | None = None
    valid: Tensor | None = None
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def add(self, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        """A layer's queries, keys and mask.

        Raises:
            CannotFuseError: the mask is not made of valid positions, or not of those of the layers below.
        """
        if not self.queries:
            self.mask, self.valid = mask, valid_positions(mask)
        elif not _same_memory(mask, self.mask) and not _equal(valid_positions(mask), self.valid):
            raise CannotFuseError
        self.queries.append(query)
        self.keys.append(key)

    def masks(self, rows: Tensor | None, method: Method) -> dict[str, Any]:
        """The masks of `attention_rollout_qk` for the start rows long [b], or for the full matrix.

        From a valid row only valid rows are reached, so that it does not matter what the others attend to, unless the
        method looks at the whole map. Looking at the values would keep a GPU waiting.
        """
        valid = self.valid
        if valid is None:
            return {}
        if rows is None or method.needs_whole_map or valid.device.type != "cpu":
            return {"key_mask": valid, "query_mask": valid}
        if not bool(valid.gather(1, rows[:, None]).all()):
            return {"key_mask": valid, "query_mask": valid}
        lengths = valid.sum(1)
        prefix = torch.arange(valid.shape[1]) < lengths[:, None]
        return {"lengths": lengths} if torch.equal(valid, prefix) else {"key_mask": valid}


def _same_memory(mask: Tensor | None, other: Tensor | None) -> bool:
    """Whether two masks are views of the same numbers: each layer is handed a view of its own of one mask."""
    if mask is None or other is None:
        return mask is other
    return (mask.data_ptr(), mask.shape, mask.stride()) == (other.data_ptr(), other.shape, other.stride())


def _equal(valid: Tensor | None, other: Tensor | None) -> bool:
    return valid is other if valid is None or other is None else torch.equal(valid, other)


class FusedCapture(ModelCapture):
    """Queries, keys and valid positions of one forward pass, and the rollout of them.

    Its `run` raises CannotFuseError when a mask is not made of valid positions.

    Args:
        model, sites: as `attention_sites` found them.
        method, backend: of the rollout.
        split: run the layers of a Transformer on groups of samples, and roll row 0 out group by group; what a group
            recorded is dropped with it.
    """

    def __init__(self, model: Any, sites: Sites, method: Method, backend: str, *, split: bool) -> None:
        super().__init__(model, sites)
        self.method, self.backend, self.split = method, backend, split
        self._groups: dict[str, Group] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._first_rows: dict[str, Tensor] = {}
        if split:
            self.key_of |= {part: key for key in sites for part in self._parts(key)}

    def _parts(self, key: str) -> dict[nn.Module, Around]:
        """The stream's layer, and the feed-forward network of its top block."""
        layer = self.model.transformer[key]
        return {layer: _through_layer} | {b.feed_forward: _through_feed_forward for b in layer.transformer[-1:]}

    def watched(self) -> dict[nn.Module, Around]:
        sites = [site for layers in self.sites.values() for site in layers]
        watched: dict[nn.Module, Around] = super().watched() | dict.fromkeys(sites, _through_attention)
        for key in self.sites if self.split else ():
            watched |= self._parts(key)
        return watched

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Stand in for `Attention.forward`; there is no map to give."""
        stream = self.key_of[module]
        layers = self.sites[stream]
        if not self.split and module is layers[0]:
            self._groups[stream] = Group()
            self._shapes[stream] = query.shape[0], query.shape[2]
        group, no_map = self._groups[stream], query.new_empty(0)
        group.add(query, key, mask)
        if group.row_only and module is layers[-1]:
            mixed = torch.zeros_like(query)
            mixed[:, :, :1] = fused_attention(query[:, :, :1], key, value, group.valid, fill=False)
            return mixed, no_map
        return fused_attention(query, key, value, group.valid, fill=not group.row_only), no_map

    def run_layer(self, layer: nn.Module, forward: Forward, x: Tensor, valid: Tensor, register_hook: bool) -> Any:
        """A `TransformerLayer`, group by group: None, which a Transformer does not read, and row 0, [B, E]."""
        key = self.key_of[layer]
        batch, seq, _ = x.shape
        self._shapes[key] = batch, seq
        output, relevance = x.new_empty(batch, x.shape[2]), x.new_zeros(batch, seq)
        for samples, width, row_valid in length_groups(valid):
            group = self._groups[key] = Group(row_only=row_valid)
            mask = valid[samples, :width]
            _, output[samples] = forward(x[samples, :width], None if bool(mask.all()) else mask, register_hook)
            self.shape(key)
            relevance[samples, :width] = self._chain(group, torch.zeros_like(samples))
        self._first_rows[key] = relevance
        self._groups.pop(key, None)
        return None, output

    def row_only(self, module: nn.Module) -> bool:
        """Whether the group that is running needs no row but 0 of its top layer."""
        return self._groups[self.key_of[module]].row_only

    def shape(self, key: str) -> tuple[int, int]:
        if key in self._first_rows:
            return self._shapes[key]
        ran = len(self._groups[key].queries) if key in self._groups else 0
        self.check_layers(key, [layer < ran for layer in range(len(self.sites[key]))])
        return self._shapes[key]

    def rollout(self, key: str, rows: Tensor | None) -> Tensor:
        """Rows [B, S] of the rollout of a feature key, or all of it [B, S, S]; what was recorded is dropped here."""
        self.shape(key)
        if key in self._first_rows:
            return self._first_rows.pop(key).clone()  # the clone is no inference tensor
        return self._chain(self._groups.pop(key), rows)

    def _chain(self, group: Group, rows: Tensor | None) -> Tensor:
        return attention_rollout_qk(
            group.queries,
            group.keys,
            query=rows,
            method=self.method,
            backend=self.backend,
            validate=False,
            **group.masks(rows, self.method),
        )


def length_groups(valid: Tensor) -> list[tuple[Tensor, int, bool]]:
    """Groups of samples to run together, the longest first.

    Args:
        valid: bool [B, S].

    Returns:
        Per group the samples, long [b]; the width they need: up to the last valid position, or S when position 0 is not
        valid; and whether position 0 is valid, in all of them.
    """
    seq = valid.shape[1]
    starts = valid[:, 0]
    ends = (valid * torch.arange(1, seq + 1)).amax(1)
    widths = torch.where(starts, ends, seq).tolist()
    valid_start = starts.tolist()
    groups: list[list[int]] = []
    for b in sorted(range(len(widths)), key=lambda b: (valid_start[b], -widths[b])):
        head = groups[-1][0] if groups else b
        slack = GROUP_SLACK if widths[head] <= GROUP_WIDTH else 0
        fits = valid_start[head] == valid_start[b] and widths[head] - widths[b] <= slack
        if groups and fits and (len(groups[-1]) + 1) * widths[head] <= GROUP_POSITIONS:
            groups[-1].append(b)
        else:
            groups.append([b])
    return [(torch.tensor(group), widths[group[0]], valid_start[group[0]]) for group in groups]


def _through_attention(
    module: nn.Module,
    forward: Forward,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: nn.Module | None = None,
) -> Any:
    capture = listener(module)
    if not isinstance(capture, FusedCapture):
        return forward(query, key, value, mask=mask, dropout=dropout)
    return capture.attend(module, query, key, value, mask)


def _through_layer(
    module: nn.Module, forward: Forward, x: Tensor, mask: Tensor | None = None, register_hook: bool = False
) -> Any:
    capture = listener(module)
    if not isinstance(capture, FusedCapture) or not capture.split:
        return forward(x, mask, register_hook)
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask != 0
    return capture.run_layer(module, forward, x, valid, register_hook)


def _through_feed_forward(module: nn.Module, forward: Forward, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The feed-forward network of a top block, which works position by position."""
    capture = listener(module)
    if not isinstance(capture, FusedCapture) or not capture.split or not capture.row_only(module):
        return forward(x, mask)
    output = torch.zeros_like(x)
    output[:, :1] = forward(x[:, :1], None if mask is None else mask[:, :1])
    return output
