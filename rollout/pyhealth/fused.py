"""One forward pass of PyHealth's own models on fused attention: queries and keys are kept, no map is made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rollout._capture.adapters.pyhealth import CannotFuseError, fused_attention, valid_positions
from rollout._capture.patch import Around, foreign_forward
from rollout._capture.recording import is_recording
from rollout.api import attention_rollout_qk
from rollout.pyhealth.residual import residuals_of
from rollout.pyhealth.watch import ModelCapture, Sites, listener
from rollout_kernels import Method

__all__ = ["CannotFuseError", "FusedCapture", "can_fuse"]

Forward = Callable[..., Any]


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


@dataclass
class Attended:
    """What the layers of a stream attended with.

    Attributes:
        mask, valid: the mask as PyHealth handed it over, and the valid positions it is made of, bool [b, n]; None when
            every position is valid.
        queries, keys: per layer [b, H, n, D], input side first.
        values, inputs: per layer [b, H, n, D], and what the residual adds, [b, n, E], for a method that measures them.
    """

    mask: Tensor | None = None
    valid: Tensor | None = None
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def add(self, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        """A layer's queries, keys and mask.

        Raises:
            CannotFuseError: the mask is not made of valid positions, or not of those of the layers below.
        """
        if not self.queries:
            self.mask, self.valid = mask, valid_positions(mask)
        elif not _same_memory(mask, self.mask) and not _equal(valid_positions(mask), self.valid):
            raise CannotFuseError
        self.queries.append(query.detach())
        self.keys.append(key.detach())

    def measure(self, value: Tensor, x: Tensor) -> None:
        """A layer's values, and what the residual adds.

        Of a record without a code, all 0 to an untrained model, no row has a length to divide by: with residuals of any
        length each of its rows keeps its own place, as it does when what all hand on is next to nothing.
        """
        something = (x != 0).any(2) | (value != 0).any(3).any(1)
        self.values.append(value)
        self.inputs.append(x.masked_fill(~something.any(1)[:, None, None], 1.0))

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

    Values and what the residuals add are kept too when the method measures them. Its `run` raises CannotFuseError when
    a mask is not made of valid positions.

    Args:
        model, sites: as `attention_sites` found them.
        method, backend: of the rollout.

    Raises:
        CannotMeasureError: the method measures values, and a layer's residual is not PyHealth's own.
    """

    def __init__(self, model: Any, sites: Sites, method: Method, backend: str) -> None:
        super().__init__(model, sites)
        self.method, self.backend = method, backend
        self._attended: dict[str, Attended] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._residuals = {} if method.values is None else residuals_of(model, sites)
        self._site_of = {residual.adder: site for site, residual in self._residuals.items()}
        self._added: dict[nn.Module, Tensor] = {}
        self.key_of |= {adder: self.key_of[site] for adder, site in self._site_of.items()}

    def watched(self) -> dict[nn.Module, Around]:
        sites = [site for layers in self.sites.values() for site in layers]
        adders: dict[nn.Module, Around] = dict.fromkeys(self._site_of, _through_adder)
        return super().watched() | adders | dict.fromkeys(sites, _through_attention)

    def add_to(self, adder: nn.Module, x: Tensor) -> None:
        """Keep what the output of an `Attention` that is about to run will be added to."""
        self._added[self._site_of[adder]] = x

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Stand in for `Attention.forward`; there is no map to give."""
        stream = self.key_of[module]
        if module is self.sites[stream][0]:
            self._attended[stream] = Attended()
            self._shapes[stream] = query.shape[0], query.shape[2]
        attended = self._attended[stream]
        attended.add(query, key, mask)
        if module in self._added:
            attended.measure(value, self._added.pop(module))
        return fused_attention(query, key, value, attended.valid), query.new_empty(0)

    def shape(self, key: str) -> tuple[int, int]:
        ran = len(self._attended[key].queries) if key in self._attended else 0
        self.check_layers(key, [layer < ran for layer in range(len(self.sites[key]))])
        return self._shapes[key]

    def rollout(self, key: str, rows: Tensor | None) -> Tensor:
        """Rows [B, S] of the rollout of a feature key, or all of it [B, S, S]; what was recorded is dropped here."""
        self.shape(key)
        attended = self._attended.pop(key)
        return attention_rollout_qk(
            attended.queries,
            attended.keys,
            query=rows,
            method=self.method,
            backend=self.backend,
            validate=False,
            **attended.masks(rows, self.method),
            **self._measured(key, attended),
        )

    def _measured(self, key: str, attended: Attended) -> dict[str, Any]:
        """What `attention_rollout_qk` wants for a method that measures values."""
        if not self._residuals:
            return {}
        weights = [self._residuals[site].output_weights for site in self.sites[key]]
        return {"values": attended.values, "output_weights": weights, "inputs": attended.inputs}


def _through_adder(module: nn.Module, forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    capture = listener(module)
    if isinstance(capture, FusedCapture):
        capture.add_to(module, x)
    return forward(x, *args, **kwargs)


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
