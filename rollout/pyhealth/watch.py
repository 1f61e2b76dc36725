"""PyHealth's own Transformer and StageAttentionNet: where their attention is, and one forward pass watched.

`MergedCapture` (`rollout.pyhealth.merged`) runs a Transformer on the distinct rows of its records; `FusedCapture`
(`rollout.pyhealth.fused`) keeps queries and keys and lets torch's fused attention run; `MapCapture` here lets
PyHealth's run and keeps its maps. Other models are run by their own protocol, `rollout.pyhealth.protocol`.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

try:
    from pyhealth.interpret.api import CheferInterpretable
    from pyhealth.interpret.methods.base_interpreter import BaseInterpreter
    from pyhealth.models import StageAttentionNet, Transformer
    from pyhealth.models.transformer import Attention, MultiHeadedAttention
except ImportError as error:
    raise ImportError("rollout.pyhealth needs PyHealth: pip install 'attention-rollout[pyhealth]'") from error

from rollout._capture.patch import Around, around_forward, foreign_forward

__all__ = [
    "READOUT_METHODS",
    "BaseInterpreter",
    "CheferInterpretable",
    "LayersMissingError",
    "MapCapture",
    "ModelCapture",
    "Sites",
    "StageAttentionNet",
    "Transformer",
    "attention_sites",
    "hooks_off",
    "is_own",
    "listener",
]

READOUT_METHODS = ("set_attention_hooks", "get_attention_layers", "get_relevance_tensor")
OWN_METHODS = {
    model: {name: getattr(model, name) for name in READOUT_METHODS} for model in (Transformer, StageAttentionNet)
}

Sites = dict[str, list[nn.Module]]
Batch = Mapping[str, Any]


def is_own(model: object, *names: str) -> bool:
    """Whether these readout methods are PyHealth's own, overridden neither by a subclass nor on the instance."""
    for kind, methods in OWN_METHODS.items():
        if isinstance(model, kind):
            return all(getattr(getattr(model, name), "__func__", None) is methods[name] for name in names)
    return False


def attention_sites(model: Any) -> Sites | None:
    """Per feature key the `Attention` modules, input side first; None when the model must be run by its protocol."""
    if not is_own(model, "set_attention_hooks", "get_attention_layers"):
        return None
    if isinstance(model, Transformer):
        heads = {key: [block.attention for block in model.transformer[key].transformer] for key in model.feature_keys}
    else:
        heads = {key: [model.stagenet[key].mha] for key in model.feature_keys}
    every = [mha for layers in heads.values() for mha in layers]
    if any(type(mha) is not MultiHeadedAttention or foreign_forward(mha) is not None for mha in every):
        return None
    if len(set(every)) < len(every):  # layers shared by streams or depths: PyHealth keeps the last map of each
        return None
    if any(type(mha.attention) is not Attention for mha in every):
        return None
    return {key: [mha.attention for mha in layers] for key, layers in heads.items()}


_local = threading.local()


def _open() -> list["ModelCapture"]:
    if not hasattr(_local, "captures"):
        _local.captures = []
    captures: list[ModelCapture] = _local.captures
    return captures


def listener(module: nn.Module) -> "ModelCapture | None":
    """The capture that this thread opened last, if it watches the module: an earlier one waits for it to close."""
    captures = _open()
    return captures[-1] if captures and module in captures[-1].key_of else None


class LayersMissingError(RuntimeError):
    """A forward pass in which a layer's `Attention` did not run."""


class ModelCapture(ABC):
    """One forward pass of a model, watched.

    Attributes:
        sites: per feature key the `Attention` modules watched, input side first.
        key_of: the feature key of each module watched.
        rows: per feature key long [B], the row the model predicted from: 0 for a Transformer, the last valid position
            for a StageAttentionNet.
    """

    def __init__(self, model: Any, sites: Sites) -> None:
        self.model, self.sites = model, sites
        self.key_of = {site: key for key, layers in sites.items() for site in layers}
        self.rows: dict[str, Tensor] = {}
        if isinstance(model, StageAttentionNet):
            self.key_of |= {model.stagenet[key]: key for key in sites}

    @abstractmethod
    def shape(self, key: str) -> tuple[int, int]:
        """(B, S) of a feature key.

        Raises:
            LayersMissingError: a layer did not run, or there is none.
        """

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(B, S) per feature key; raises as `shape`."""
        return {key: self.shape(key) for key in self.sites}

    def run(self, data: Batch) -> None:
        """Run the model once under `torch.inference_mode()`, its own hooks off."""
        with torch.inference_mode():
            self.forward(data)

    def forward(self, data: Batch) -> Any:
        """Run the model once, its own hooks off, and give what it returns."""
        with hooks_off(self.model), self._watching():
            output = self.model(**data)
        if isinstance(self.model, Transformer):
            for key, (batch, _) in self.shapes().items():
                self.rows[key] = torch.zeros(batch, dtype=torch.int64, device=self.model.device)
        return output

    def watched(self) -> dict[nn.Module, Around]:
        """The modules whose calls go through a function, which asks `listener` for the capture."""
        if isinstance(self.model, StageAttentionNet):
            return {self.model.stagenet[key]: _through_stage for key in self.sites}
        return {}

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with around_forward(self.watched()):
            _open().append(self)
            try:
                yield
            finally:
                _open().remove(self)

    def check_layers(self, key: str, ran: list[bool]) -> None:
        """Raise LayersMissingError unless every layer of a feature ran, and there is one."""
        if not ran or not all(ran):
            raise LayersMissingError(
                f"rollout.pyhealth: the forward pass must make an attention map in every layer of feature '{key}' and "
                f"there must be a layer; got {sum(ran)} maps from {len(ran)} layers"
            )


def _through_stage(
    module: nn.Module,
    forward: Callable[..., Any],
    x: Tensor,
    time: Tensor | None = None,
    mask: Tensor | None = None,
    register_hook: bool = False,
) -> Any:
    """A StageNetAttentionLayer: the position it will predict from, from the mask it is given."""
    capture = listener(module)
    if capture is not None:
        last = torch.full((len(x),), x.shape[1] - 1, device=x.device) if mask is None else mask.long().sum(1) - 1
        capture.rows[capture.key_of[module]] = last.clamp(min=0)
    return forward(x, time=time, mask=mask, register_hook=register_hook)


class MapCapture(ModelCapture):
    """The maps of one forward pass, as PyHealth's attention makes them."""

    def __init__(self, model: Any, sites: Sites) -> None:
        super().__init__(model, sites)
        self._maps: dict[nn.Module, Tensor] = {}
        self._narrowed: set[nn.Module] = set()

    def run(self, data: Batch) -> None:
        """Run the model once under `torch.inference_mode()`, its own hooks off."""
        try:
            super().run(data)
        except RuntimeError as error:
            if "without overflow" in str(error):
                raise RuntimeError(
                    "rollout.pyhealth: PyHealth masks scores with -1e9, which float16 cannot hold under autocast; "
                    "use torch.autocast with bfloat16, or none"
                ) from error
            raise

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Hooks, so that the maps are those that reach the model, past the hooks of others."""
        handles = []
        with super()._watching():
            try:
                for site in (site for layers in self.sites.values() for site in layers):
                    handles.append(site.register_forward_pre_hook(self._widen, with_kwargs=True))
                    handles.append(site.register_forward_hook(self._record))
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before an `Attention`: float16 cannot hold the −1e9 that masks a score, so it runs in float32."""
        half = any(isinstance(x, Tensor) and x.dtype == torch.float16 for x in (*args, *kwargs.values()))
        if not half or listener(module) is not self:
            return None
        self._narrowed.add(module)
        return tuple(map(_to_float32, args)), {name: _to_float32(x) for name, x in kwargs.items()}

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
        """After an `Attention`: keep its map; the last one counts when a module runs twice, as in PyHealth."""
        if listener(module) is not self:
            return None
        output, half = self.keep(module, args, *output), module in self._narrowed
        self._narrowed.discard(module)
        return tuple(part.half() for part in output) if half else output

    def keep(self, module: nn.Module, args: tuple[Any, ...], mixed: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a map; what the model is to go on with is returned."""
        self._maps[module] = attention.detach().half() if module in self._narrowed else attention.detach()
        return mixed, attention

    def shape(self, key: str) -> tuple[int, int]:
        self.check_layers(key, [site in self._maps for site in self.sites[key]])
        top = self._maps[self.sites[key][-1]]
        return top.shape[0], top.shape[-1]

    def take(self, key: str) -> list[Tensor]:
        """The maps of one feature key, [B, H, S, S] each, input side first; they are dropped here."""
        self.shape(key)
        return [self._maps.pop(site) for site in self.sites[key]]


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


@contextmanager
def hooks_off(model: Any) -> Iterator[None]:
    """PyHealth's own hooks need gradients: off while we run, then as they were."""
    enabled = getattr(model, "_attention_hooks_enabled", False)
    if not enabled:
        yield
        return
    model.set_attention_hooks(False)
    try:
        yield
    finally:
        model._attention_hooks_enabled = enabled
