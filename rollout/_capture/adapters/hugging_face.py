"""The capture adapter for Hugging Face models whose attention goes through transformers' attention interface.

For the duration the model's configs name an implementation of ours, registered for attention and for masks (with the
first alone the mask would be missing). In the thread that captures it is transformers' own sdpa with its sdpa mask; in
every other thread it is what the config named before.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rollout._capture.masks import structure
from rollout._capture.patch import around_forward
from rollout._capture.recording import is_recording, memo, name_of, owners, record, registered
from rollout.errors import CaptureError
from rollout.tape import Record

__all__ = ["adapter"]

# Arguments of an attention module that hold another sequence, when they hold anything.
OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states", "memory")
# Arguments of the attention function that change the softmax in a way Q, K and a bias do not tell.
REFUSED = {
    "softcap": "soft-capping of the scores",
    "s_aux": "attention sinks",
    "head_mask": "a head mask",
    "cache": "a paged cache",
    "block_table": "a paged cache",
}
NO_MAPS = "output_attentions must be off, fused attention makes no maps; tape.maps(layer) gives them"

_lock = threading.Lock()
_names: dict[str | None, str] = {}
_switched: dict[int, list[Any]] = {}  # id(config) → [config, the implementation before, captures open on it]
_configs: ContextVar[tuple[PretrainedConfig, ...]] = ContextVar("rollout_configs", default=())
_crossing: ContextVar[frozenset[nn.Module]] = ContextVar("rollout_crossing", default=frozenset())


def adapter(model: nn.Module) -> AbstractContextManager[None] | None:
    """Switches the attention implementation of every config in the model; None when there is none to switch.

    Raises:
        CaptureError: the implementation is one that packs or pages sequences.
    """
    if not any(_uses_interface(module) for module in model.modules()):
        return None
    found = (getattr(module, "config", None) for module in model.modules())
    configs = list({id(config): config for config in found if isinstance(config, PretrainedConfig)}.values())
    for config in configs:
        before = _implementation(config)
        if before is not None and before.startswith("paged"):
            raise CaptureError(
                f"capture: {type(config).__name__} names the attention {before!r}, which pages sequences"
            )
        if getattr(config, "output_attentions", False):
            raise CaptureError(f"capture: {type(config).__name__}.{NO_MAPS}")
    crossing = [module for module in model.modules() if _takes_another_sequence(type(module).forward)]
    return _switching(configs, crossing)


def _uses_interface(module: nn.Module) -> bool:
    """Whether the module has a config and the file of its class looks attention up in the interface."""
    source = sys.modules.get(type(module).__module__)
    return isinstance(getattr(module, "config", None), PretrainedConfig) and hasattr(source, "ALL_ATTENTION_FUNCTIONS")


@cache
def _supports_fused(file: str) -> bool:
    """Whether some model of the file an attention module comes from supports sdpa; True when it has no models."""
    kinds: list[Any] = [value for value in vars(sys.modules.get(file, sys)).values() if isinstance(value, type)]
    models = [kind for kind in kinds if issubclass(kind, PreTrainedModel) and kind.__module__ == file]
    return not models or any(kind._supports_sdpa for kind in models)


@cache
def _takes_another_sequence(forward: Callable[..., Any]) -> bool:
    return any(name in inspect.signature(forward).parameters for name in OTHER_SEQUENCE)


def _implementation(config: PretrainedConfig) -> str | None:
    """What the config names, or named before a capture switched it."""
    held = _switched.get(id(config))
    value = config._attn_implementation if held is None else held[1]
    return value if value is None else str(value)


@contextmanager
def _switching(configs: list[PretrainedConfig], crossing: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        with _lock:
            for config in configs:
                held = _switched.setdefault(id(config), [config, config._attn_implementation, 0])
                held[2] += 1
                config._attn_implementation_internal = _registered_name(held[1])
        stack.callback(_switch_back, configs)
        stack.enter_context(around_forward(dict.fromkeys(crossing, _through_crossing)))
        _configs.set((*_configs.get(), *configs))
        stack.callback(_forget, configs)
        yield


def _switch_back(configs: list[PretrainedConfig]) -> None:
    with _lock:
        for config in configs:
            held = _switched[id(config)]
            held[2] -= 1
            if held[2] == 0:
                config._attn_implementation_internal = held[1]
                del _switched[id(config)]


def _forget(configs: list[PretrainedConfig]) -> None:
    left = list(_configs.get())
    for config in configs:
        del left[next(i for i, other in enumerate(left) if other is config)]
    _configs.set(tuple(left))


def _registered_name(before: str | None) -> str:
    """Our implementation that stands in for `before`; the name tells transformers nothing about it."""
    if before not in _names:
        name = f"rollout_capture_{len(_names)}"
        AttentionInterface.register(name, partial(_attention, before))
        AttentionMaskInterface.register(name, partial(_mask, before))
        _names[before] = name
    return _names[before]


def _captured(config: object) -> bool:
    """Whether this thread captures a model with the config: asked alike for the mask and for the attention."""
    return any(config is other for other in _configs.get())


def _mask(before: str | None, *args: Any, **kwargs: Any) -> Any:
    chosen = "sdpa" if _captured(kwargs.get("config")) else before or "eager"
    return ALL_MASK_ATTENTION_FUNCTIONS[chosen](*args, **kwargs)


def _attention(
    before: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not _captured(getattr(module, "config", None)):
        return _own(before, module)(module, query, key, value, attention_mask, *args, **kwargs)
    if args:
        raise CaptureError(f"capture: {name_of(module)} must pass its attention's options by name")
    wanted = is_recording(module) and registered(module) is None and module not in _crossing.get()
    if is_recording(module):
        _refuse(module, kwargs)
    output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    if wanted:
        _record(module, query, key, attention_mask, kwargs)
    return output


def _own(before: str | None, module: nn.Module) -> Callable[..., Any]:
    """The attention function that the config named; the eager one is its model's own."""
    if before in (None, "eager"):
        for kind in type(module).__mro__:
            function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
            if function is not None:
                return function
    return ALL_ATTENTION_FUNCTIONS[before]


def _refuse(module: nn.Module, options: Mapping[str, Any]) -> None:
    if options.get("dropout"):
        raise CaptureError(
            f"capture: the model must be in eval mode, got attention dropout {options['dropout']} on in "
            f"{name_of(module)}: call model.eval()"
        )
    for name, what in REFUSED.items():
        if options.get(name) is not None:
            raise CaptureError(f"capture: {name_of(module)} uses {what} ({name}), which cannot be recorded exactly")
    if options.get("output_attentions"):
        raise CaptureError(f"capture: {NO_MAPS}")
    if any(getattr(owner, "window_size", None) for owner in owners(module)):
        raise CaptureError(
            f"capture: {name_of(module)} attends within windows of an image (window_size), which other layers cut "
            f"differently: its rows are not those of one sequence"
        )
    if not _supports_fused(type(module).__module__):
        raise CaptureError(
            f"capture: {name_of(module)} must allow transformers' sdpa attention, its model says it does not "
            f"(_supports_sdpa): its scores are not those of Q and K alone"
        )


def _record(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> None:
    if query.shape[2] != key.shape[2]:
        raise CaptureError(
            f"capture: {name_of(module)} must attend over the positions it is given, got {query.shape[2]} queries and "
            f"{key.shape[2]} keys: run the whole sequence at once, without a filled key-value cache (use_cache=False); "
            f"generation steps cannot be recorded"
        )
    with torch.no_grad():
        fields: dict[str, Any] = {}
        if mask is not None:
            fields = memo(mask, ("structure", query.shape[0]), lambda: structure(mask, query.shape[0]))
        else:
            causal = options.get("is_causal")
            fields = {"causal": bool(getattr(module, "is_causal", True) if causal is None else causal)}
        fields = _with_position_bias(fields, options.get("position_bias"))
        record(module, Record(queries=query, keys=key, scale=options.get("scaling"), **fields))


def _with_position_bias(fields: dict[str, Any], position: Tensor | None) -> dict[str, Any]:
    if position is None:
        return fields
    bias = fields.get("bias")
    return {**fields, "bias": position if bias is None else position + bias}


def _through_crossing(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module that may attend over another sequence: note whether this call does."""
    if not is_recording(module):
        return forward(*args, **kwargs)
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    before = _crossing.get()
    crossing = any(given.get(name) is not None for name in OTHER_SEQUENCE)
    _crossing.set(before | {module} if crossing else before - {module})
    try:
        return forward(*args, **kwargs)
    finally:
        _crossing.set(before)
