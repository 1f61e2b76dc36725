"""One forward pass of PyHealth's own Transformer or StageAttentionNet, and the attention maps it made.

A forward hook on each `Attention` module takes the map while the model runs under `torch.inference_mode()`. Other
models are run by their own protocol, in `rollout._pyhealth_protocol`.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

try:
    from pyhealth.interpret.methods.base_interpreter import BaseInterpreter
    from pyhealth.models import StageAttentionNet, Transformer
    from pyhealth.models.transformer import Attention, MultiHeadedAttention
except ImportError as error:
    raise ImportError("rollout.pyhealth needs PyHealth: pip install 'attention-rollout[pyhealth]'") from error

__all__ = [
    "READOUT_METHODS",
    "BaseInterpreter",
    "CapturedForward",
    "Sites",
    "StageAttentionNet",
    "attention_sites",
    "captured_forward",
    "is_own",
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
    if any(type(mha) is not MultiHeadedAttention or "forward" in vars(mha) for mha in every):
        return None
    if len(set(every)) < len(every):  # layers shared by streams or depths: PyHealth keeps the last map of each
        return None
    if any(type(mha.attention) is not Attention for mha in every):
        return None
    return {key: [mha.attention for mha in layers] for key, layers in heads.items()}


class CapturedForward:
    """The maps of one forward pass, and the row of each that the model predicted from.

    Attributes:
        sites: per feature key the modules watched, input side first.
        rows: per feature key long [B]: 0 for a Transformer, the last valid position for a StageAttentionNet.
    """

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.rows: dict[str, Tensor] = {}
        self._maps: dict[nn.Module, Tensor] = {}
        self._narrowed: dict[nn.Module, torch.dtype] = {}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(B, S) per feature key.

        Raises:
            RuntimeError: a layer made no map.
        """
        return {key: (self._top(key).shape[0], self._top(key).shape[-1]) for key in self.sites}

    def _top(self, key: str) -> Tensor:
        made = [site in self._maps for site in self.sites[key]]
        if not made or not all(made):
            raise RuntimeError(
                f"AttentionRollout: the forward pass must make an attention map in every layer of feature '{key}' and "
                f"there must be a layer; got {sum(made)} maps from {len(made)} layers"
            )
        return self._maps[self.sites[key][-1]]

    def take(self, key: str) -> list[Tensor]:
        """The maps of one feature key, [B, H, S, S] each, input side first; they are dropped here."""
        self._top(key)
        return [self._maps.pop(site) for site in self.sites[key]]

    def widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before an `Attention`: float16 cannot hold the −1e9 that masks a score, so it runs in float32."""
        half = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dtype == torch.float16]
        if not self._listening() or not half:
            return None
        self._narrowed[module] = torch.float16
        return tuple(_to_float32(x) for x in args), {name: _to_float32(x) for name, x in kwargs.items()}

    def record(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
        """After an `Attention`: keep its map; the last one counts when a module runs twice, as in PyHealth."""
        if not self._listening():
            return None
        dtype = self._narrowed.pop(module, None)
        mixed, attention = output
        self._maps[module] = attention.detach() if dtype is None else attention.detach().to(dtype)
        return None if dtype is None else (mixed.to(dtype), attention.to(dtype))

    def record_row(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a StageNetAttentionLayer: the position it will predict from, from the mask it is given."""
        if not self._listening():
            return
        mask = kwargs.get("mask", args[2] if len(args) > 2 else None)
        if mask is None:
            batch, seq = args[0].shape[:2]
            self.rows[key] = torch.full((batch,), seq - 1, dtype=torch.int64, device=args[0].device)
        else:
            self.rows[key] = (mask.long().sum(1) - 1).clamp(min=0)

    def _listening(self) -> bool:
        """False while a forward pass nested in this one, or one in another thread, runs the same modules."""
        return bool(_captures()) and _captures()[-1] is self


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


_local = threading.local()


def _captures() -> list[CapturedForward]:
    if not hasattr(_local, "captures"):
        _local.captures = []
    captures: list[CapturedForward] = _local.captures
    return captures


def captured_forward(model: Any, sites: Sites, data: Batch) -> CapturedForward:
    """Run the model once under `torch.inference_mode()`, its own hooks off, and keep the maps of `sites`."""
    captured = CapturedForward(sites)
    with _hooks_off(model), _watching(model, captured), torch.inference_mode():
        try:
            model(**data)
        except RuntimeError as error:
            if "without overflow" in str(error):
                raise RuntimeError(
                    "AttentionRollout: PyHealth masks scores with -1e9, which float16 cannot hold under autocast; "
                    "use torch.autocast with bfloat16, or none"
                ) from error
            raise
    if isinstance(model, Transformer):
        for key, (batch, _) in captured.shapes().items():
            captured.rows[key] = torch.zeros(batch, dtype=torch.int64, device=captured._top(key).device)
    return captured


@contextmanager
def _watching(model: Any, captured: CapturedForward) -> Iterator[None]:
    handles = []
    _captures().append(captured)
    try:
        for site in (site for layers in captured.sites.values() for site in layers):
            handles.append(site.register_forward_pre_hook(captured.widen, with_kwargs=True))
            handles.append(site.register_forward_hook(captured.record))
        if isinstance(model, StageAttentionNet):
            for key in captured.sites:
                hook = _row_hook(captured, key)
                handles.append(model.stagenet[key].register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        _captures().remove(captured)


def _row_hook(captured: CapturedForward, key: str) -> Any:
    return lambda module, args, kwargs: captured.record_row(key, args, kwargs)


@contextmanager
def _hooks_off(model: Any) -> Iterator[None]:
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
