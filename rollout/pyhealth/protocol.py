"""One forward pass of any model by PyHealth's protocol: hooks on, forward, `get_attention_layers`, hooks off."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

Maps = dict[str, list[Tensor]]
Layers = Mapping[str, list[Any]]
Target = Callable[[Tensor], Tensor]
_NO_GRADIENT = ("hook on a tensor that doesn't require grad", "Inference tensors cannot be saved for backward")
_TORCH_ATTRIBUTES = frozenset(nn.Module().__dict__)


def protocol_maps(model: Any, data: Mapping[str, Any]) -> Maps:
    """The maps of one forward pass, taken by the model's own hooks, which are off again when it returns or raises.

    The hooks of the contract need gradients, so these are enabled, and frozen parameters thawed, for the call; hooks
    that take `capture_gradients` are told not to, and need neither.

    Returns:
        Per feature key the maps [B, H, S, S] or [B, S, S], detached, input side first.

    Raises:
        RuntimeError: a map is None, a feature has no layer, or a hook cannot be set.
    """
    gradient_free = "capture_gradients" in inspect.signature(model.set_attention_hooks).parameters
    with torch.inference_mode(False), torch.set_grad_enabled(not gradient_free), _maps_dropped(model) as found:
        try:
            with nullcontext() if gradient_free else thawed(model):
                _forward_with_hooks(model, data, {"capture_gradients": False} if gradient_free else {})
        except BaseException:
            with suppress(Exception):
                found.extend(_tensors(model.get_attention_layers()))
            raise
        layers = model.get_attention_layers()
        found.extend(_tensors(layers))
        return _part(layers, 0)


def protocol_gradients(model: Any, data: Mapping[str, Any], target: Target) -> tuple[Maps, Maps]:
    """The maps of one forward pass and the gradients of its target to them, by the model's own hooks.

    No parameter's `.grad` is touched; else as `protocol_maps`.

    Args:
        target: the number to differentiate, made of the model's logits [B, C].
    """
    with torch.inference_mode(False), torch.enable_grad(), _maps_dropped(model) as found, thawed(model):
        try:
            logits = _forward_with_hooks(model, data, {})["logit"]
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(target(logits), parameters, allow_unused=True)
        except BaseException:
            with suppress(Exception):
                found.extend(_tensors(model.get_attention_layers()))
            raise
        layers = model.get_attention_layers()
        found.extend(_tensors(layers))
        return _part(layers, 0), _part(layers, 1)


def _forward_with_hooks(model: Any, data: Mapping[str, Any], options: dict[str, bool]) -> Any:
    try:
        model.set_attention_hooks(True, **options)
        return model(**usable(data))
    except RuntimeError as error:
        if not any(reason in str(error) for reason in _NO_GRADIENT):
            raise
        raise RuntimeError(
            f"rollout.pyhealth: the attention hooks of {type(model).__name__} need gradients, and its maps have none: "
            f"it was made under torch.inference_mode() or detaches on the way. Make it outside, or let its "
            f"set_attention_hooks take capture_gradients=False"
        ) from error
    finally:
        model.set_attention_hooks(False)


def _tensors(found: Layers) -> list[Tensor]:
    """Every map and gradient the model gives."""
    layers = [layer for layers in found.values() for layer in layers]
    parts = [part for layer in layers for part in (layer if isinstance(layer, tuple | list) else [layer])]
    return [part for part in parts if isinstance(part, Tensor)]


def _part(found: Layers, part: int) -> Maps:
    """The maps (part 0) or their gradients (part 1)."""
    maps = {key: [_detached(key, layer, part) for layer in layers] for key, layers in found.items()}
    for key, layers in maps.items():
        if not layers:
            raise RuntimeError(
                f"rollout.pyhealth: get_attention_layers() must give at least one layer for feature '{key}', got none"
            )
    return maps


def _detached(key: str, layer: Any, part: int) -> Tensor:
    attention = layer[part] if isinstance(layer, tuple | list) else layer
    if attention is None:
        what = ("map", "gradient")[part]
        raise RuntimeError(
            f"rollout.pyhealth: get_attention_layers() must give a {what} for every layer of feature '{key}', got "
            f"None; the forward pass must store it after set_attention_hooks(True)"
        )
    return attention.detach()


def usable(data: Mapping[str, Any]) -> dict[str, Any]:
    """A batch that can enter autograd: a tensor made under inference mode cannot, its copy can."""
    return {name: _usable(value) for name, value in data.items()}


def _usable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (tuple, list):
        return type(value)(_usable(item) for item in value)
    return value


@contextmanager
def thawed(model: Any) -> Iterator[None]:
    """Frozen parameters take part in autograd for the call, so that a hook can be set on the maps."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point() and not p.is_inference()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _maps_dropped(model: Any) -> Iterator[list[Tensor]]:
    """Gives a list for the maps; on leaving, wherever the model holds one of them, puts back what was there before.

    It looks at the plain attributes of every module: tensors, and lists and dicts of them.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else [model]
    before = {id(module): {name: _snapshot(value) for name, value in _state(module)} for module in modules}
    found: list[Tensor] = []
    try:
        yield found
    finally:
        storages = {_storage(tensor) for tensor in found}
        for module in modules:
            for name, value in _state(module):
                if name == "attn_map" or _holds(value, storages):
                    _put_back(module, name, value, before[id(module)])


def _state(module: Any) -> list[tuple[str, Any]]:
    """The plain attributes that could hold maps: not parameters, buffers, submodules or hooks."""
    attributes = getattr(module, "__dict__", {}).items()
    return [
        (name, value)
        for name, value in attributes
        if name not in _TORCH_ATTRIBUTES and (value is None or isinstance(value, Tensor | list | dict))
    ]


def _snapshot(value: Any) -> tuple[Any, Any]:
    return value, copy.copy(value) if isinstance(value, list | dict) else None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _holds(value: Any, storages: set[int]) -> bool:
    if isinstance(value, Tensor):
        return _storage(value) in storages
    if isinstance(value, dict):
        return any(_holds(item, storages) for item in value.values())
    return isinstance(value, list | tuple) and any(_holds(item, storages) for item in value)


def _put_back(module: Any, name: str, value: Any, found: dict[str, tuple[Any, Any]]) -> None:
    if name not in found:
        delattr(module, name)
        return
    original, content = found[name]
    if value is not original:
        setattr(module, name, original)
    elif isinstance(value, dict):
        value.clear()
        value.update(content)
    elif isinstance(value, list):
        value[:] = content
