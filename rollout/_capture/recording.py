"""`rollout.capture`: the queries and keys of a model's attention layers, recorded while it runs as it always does.

An adapter knows one family of attention modules. It is a function `adapter(model) -> context manager or None`: None
when the model has none of its modules; else a context in which each of their runs calls `record(module, Record(...))`.
It refuses with `CaptureError`, before or while the model runs, what it cannot record exactly. The model must compute
the same numbers inside the context as outside, and be as before after it, in every thread.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from rollout._capture.patch import around_forward
from rollout._capture.refusals import ATTENTION, nothing_found, refuse_dropout, refuse_opaque
from rollout._capture.streams import stream_names
from rollout.errors import CaptureError
from rollout.tape import Record, Tape

__all__ = ["CaptureError", "capture", "is_recording", "memo", "record", "register_capture", "registered"]

Adapter = Callable[[nn.Module], AbstractContextManager[None] | None]
Reader = Callable[..., Record | None]

# Module of the adapter → the package without which no model needs it.
ADAPTERS = {
    "rollout._capture.adapters.torch_nn": "torch",
    "rollout._capture.adapters.hugging_face": "transformers",
    "rollout._capture.adapters.timm": "timm",
    "rollout._capture.adapters.pyhealth": "pyhealth.models.transformer",
}
_readers: dict[type[nn.Module], Reader] = {}


def register_capture(module_type: type[nn.Module], function: Reader | None) -> None:
    """Teach `capture` an attention module of your own.

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


def capture(model: nn.Module, *, shared_layers: bool = False) -> "Capture":
    """Record what rollout needs of a forward pass, while the model keeps its fast attention.

        with rollout.capture(model) as tape, torch.inference_mode():
            model(**batch)
        tape.rollout(query=0)

    Of each self-attention layer the queries, keys and mask are kept, never a map. Outputs are those of the model
    without capture, to rounding. Supported: torch.nn.MultiheadAttention and what is built of it
    (torch.nn.TransformerEncoder, torchvision's ViT), Hugging Face models whose attention goes through transformers'
    attention interface, timm's `Attention`, PyHealth's models, and modules given to `register_capture`.

    A stream is named by the path of the modules up to the layer index, e.g. `encoder.layers`; PyHealth's by the feature
    key. Cross-attention of known modules is left out: a stream is the self-attention of one sequence. Only calls made
    in the block, in the thread that opened it, are recorded; a second call of the model replaces the first. After the
    block, also after an exception, nothing is left on the model. Blocks may be nested, re-entered, and open on one
    model in several threads.

    Args:
        model: in eval mode, or without dropout.
        shared_layers: allow a module to attend more than once in one call of the model: its runs are consecutive
            layers that share weights (ALBERT, Universal Transformer). Without it that is refused, because a module
            run on two inputs looks the same.

    Returns:
        A context manager that gives the `rollout.tape.Tape`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        CaptureError: on entry: nothing in the model can be captured (the message names the attention modules found),
            dropout is on, or it is compiled, scripted or quantised; in the model's call: the attention did something
            that cannot be recorded exactly.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: model must be a torch.nn.Module, got {type(model).__name__}")
    return Capture(model, shared_layers)


class Capture(AbstractContextManager[Tape]):
    """What `capture` returns: enter it, again if need be, for a new tape."""

    def __init__(self, model: nn.Module, shared_layers: bool) -> None:
        self._model, self._shared_layers = model, shared_layers
        self._open = threading.local()

    def __enter__(self) -> Tape:
        with ExitStack() as stack:
            tape = stack.enter_context(_capturing(self._model, self._shared_layers))
            if not hasattr(self._open, "stacks"):
                self._open.stacks = []
            self._open.stacks.append(stack.pop_all())
        return tape

    def __exit__(self, *raised: Any) -> None:
        self._open.stacks.pop().__exit__(*raised)


class Recording:
    """One open capture: its tape, and where the model is in its forward pass."""

    def __init__(self, model: nn.Module, shared_layers: bool) -> None:
        self.model = model
        self.tape = Tape(type(model).__name__)
        self.paths = {module: path for path, module in model.named_modules()}
        self.shared_layers = shared_layers
        self.depth = 0
        self.memo: dict[tuple[int, Any], tuple[Tensor, Any]] = {}
        self.ran: set[tuple[str, nn.Module]] = set()

    @cached_property
    def streams(self) -> dict[str, tuple[str, str]]:
        """Path of a module → the name of its stream, and the path below it."""
        return stream_names({path: module for module, path in self.paths.items()})

    def start(self) -> None:
        """A forward pass begins: what an earlier one recorded is replaced."""
        if self.depth == 0:
            self.restart()
        self.depth += 1

    def restart(self) -> None:
        refuse_dropout(self.model)
        self.tape.clear()
        self.memo.clear()
        self.ran.clear()

    def finish(self) -> None:
        """The outermost forward pass ended: refuse a stream that has other attention beside what was recorded."""
        self.memo.clear()
        kinds = {self.streams[self.paths[module]]: type(module) for _, module in self.ran}
        for module, path in self.paths.items():
            kind = kinds.get(self.streams[path], type(module))
            if kind is not type(module) and ATTENTION.search(type(module).__name__) and registered(module) is None:
                raise CaptureError(
                    f"capture: the layers of stream {self.streams[path][0]!r} must all be of a known kind, got "
                    f"{kind.__name__} and, at {path}, {type(module).__name__}: give rollout.register_capture a "
                    f"function for the latter"
                )

    def add(self, module: nn.Module, entry: Record, stream: str | None) -> None:
        path = self.paths[module]
        stream = self.streams[path][0] if stream is None else stream
        if (stream, module) in self.ran and not self.shared_layers:
            raise CaptureError(
                f"capture: a module must attend once in a call of the model, {path or type(module).__name__} did "
                f"twice: pass shared_layers=True when its runs are layers that share weights; call the model, not a "
                f"part of it; capture a part that runs on two inputs one input at a time"
            )
        self.ran.add((stream, module))
        self.tape.add(stream, path, entry)


_recordings: ContextVar[tuple[Recording, ...]] = ContextVar("rollout_recordings", default=())


def is_recording(module: nn.Module) -> bool:
    """Whether this thread is inside a capture of a model that has the module."""
    return any(module in recording.paths for recording in _recordings.get())


def record(module: nn.Module, entry: Record, stream: str | None = None) -> None:
    """Put a layer on the tape of every open capture of this thread whose model has the module.

    Args:
        module: that attended just now.
        entry: its queries, keys and masks.
        stream: its stream; by default the path of the module up to the layer index.

    Raises:
        CaptureError: the module attended before in this call of the model.
        ValueError: (B, S) is not that of the stream's other layers.
    """
    for recording in _recordings.get():
        if module in recording.paths:
            recording.add(module, entry, stream)


def name_of(module: nn.Module) -> str:
    """Type and path of a module, for messages."""
    for recording in reversed(_recordings.get()):
        if module in recording.paths:
            return f"{type(module).__name__} at {recording.paths[module] or 'the root'}"
    return type(module).__name__


def owners(module: nn.Module) -> list[nn.Module]:
    """The module and what holds it, up to the captured model."""
    for recording in reversed(_recordings.get()):
        if module in recording.paths:
            parts = recording.paths[module].split(".")
            return [recording.model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
    return [module]


def memo(tensor: Tensor, what: Any, compute: Callable[[], Any]) -> Any:
    """`compute()`, once per tensor object and forward pass: masks are shared by the layers of a model."""
    open_ones = _recordings.get()
    if not open_ones:
        return compute()
    held, key = open_ones[-1].memo, (id(tensor), what)
    if key not in held:
        held[key] = (tensor, compute())  # the tensor is kept so that its id stays its own
    return held[key][1]


def _through_root(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The captured model's own forward: marks where a pass begins and ends."""
    started = [recording for recording in _recordings.get() if recording.model is module]
    for recording in started:
        recording.start()
    try:
        output = forward(*args, **kwargs)
    finally:
        for recording in started:
            recording.depth -= 1
    for recording in started:
        if recording.depth == 0:
            recording.finish()
    return output


def _through_registered(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    reader = registered(module)
    if reader is not None and is_recording(module):
        with torch.no_grad():
            entry = reader(module, *args, **kwargs)
        if entry is not None:
            if not isinstance(entry, Record):
                raise TypeError(
                    f"register_capture: the function of {type(module).__name__} must return a rollout.Record or None, "
                    f"got {type(entry).__name__}"
                )
            record(module, entry)
    return output


def _registered_adapter(model: nn.Module) -> AbstractContextManager[None] | None:
    found = [module for module in model.modules() if registered(module) is not None]
    return around_forward(dict.fromkeys(found, _through_registered)) if found else None


def _contexts(model: nn.Module) -> Iterator[AbstractContextManager[None]]:
    adapters: list[Adapter] = [_registered_adapter]
    for name, package in ADAPTERS.items():
        if package in sys.modules:  # else the model cannot have its modules
            adapters.append(importlib.import_module(name).adapter)
    for adapter in adapters:
        context = adapter(model)
        if context is not None:
            yield context


@contextmanager
def _capturing(model: nn.Module, shared_layers: bool) -> Iterator[Tape]:
    refuse_opaque(model)
    refuse_dropout(model)
    contexts = list(_contexts(model))
    if not contexts:
        raise CaptureError(nothing_found(model))
    recording = Recording(model, shared_layers)
    with ExitStack() as stack:
        stack.enter_context(around_forward({model: _through_root}))
        for context in contexts:
            stack.enter_context(context)
        _recordings.set((*_recordings.get(), recording))
        stack.callback(partial(_close, recording))
        yield recording.tape


def _close(recording: Recording) -> None:
    _recordings.set(tuple(other for other in _recordings.get() if other is not recording))
    recording.memo.clear()
