"""Attention modules that the user taught: a function for each type that reads a `Record` off a call."""

from collections.abc import Callable

from torch import nn

from rollout.tape import Record

__all__ = ["Reader", "register_capture", "registered"]

Reader = Callable[..., Record | None]

_readers: dict[type[nn.Module], Reader] = {}


def register_capture(module_type: type[nn.Module], function: Reader | None) -> None:
    """Teach `capture` an attention module of your own, one that it refuses.

        def queries_and_keys(module, hidden, mask=None):       # called with what the module's forward is called with
            split = lambda x: x.unflatten(-1, (module.heads, -1)).transpose(1, 2)           # [B, H, S, D]
            return rollout.Record(queries=split(module.q(hidden)), keys=split(module.k(hidden)), key_mask=mask)

        rollout.register_capture(MyAttention, queries_and_keys)

    Args:
        module_type: the module, and subclasses that have no entry of their own.
        function: `(module, *args, **kwargs) -> Record`, or None for a call that is no self-attention (it is left out).
            It runs after the module's own forward, without gradients, and must not change anything. None removes
            the entry.

    Raises:
        TypeError: not a module type, or not callable.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_capture: module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if function is None:
        _readers.pop(module_type, None)
        return
    if not callable(function):
        raise TypeError(f"register_capture: function must be callable, got {type(function).__name__}")
    _readers[module_type] = function


def registered(module: nn.Module) -> Reader | None:
    """The function registered for a module's type, or for the nearest of its bases."""
    return next((_readers[kind] for kind in type(module).__mro__ if kind in _readers), None)
