"""`rollout.capture`: the queries and keys of a model's attention layers, recorded while it runs as it always does.

An adapter knows one family of attention modules. It is a function `adapter(model)` that gives, for each of its modules
in the model, what stands around its forward while the model runs, and tells the open captures. What no adapter knows is
seen as torch computes it (`rollout._capture.calls`). The model computes the same bits inside the context as outside,
and is as before after it, in every thread.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rollout._capture.patch import Around, around_call
from rollout._capture.readers import registered
from rollout._capture.recording import ATTENTION_LAYERS_ONLY, Recording, _recordings, recordings_of
from rollout._capture.refusals import ATTENTION, MIXER, refuse_dropout, refuse_opaque
from rollout._capture.running import raising_module
from rollout._capture.streams import stream_names
from rollout.errors import CaptureError
from rollout.tape import Record, Tape

__all__ = ["capture"]

# Module of the adapter → the package without which no model needs it.
ADAPTERS = {
    "rollout._capture.adapters.torch_nn": "torch",
    "rollout._capture.adapters.pyhealth": "pyhealth.models.transformer",
}


def capture(
    model: nn.Module,
    *,
    shared_layers: bool = False,
    allow: str | None = None,
    cross_attention: bool = False,
    gradients: bool = False,
    values: bool = False,
) -> "Capture":
    """Record what rollout needs of a forward pass, while the model keeps its fast attention.

        with rollout.capture(model) as tape, torch.inference_mode():
            model(**batch)
        tape.rollout(query=0)

    Of each self-attention layer the queries, keys and mask are kept, never a map. Outputs are those of the model
    without capture, bit for bit. Supported is every softmax attention that torch computes: fused by
    `scaled_dot_product_attention` or written out as softmax(scale·QKᵀ + bias)·V, `torch.nn.MultiheadAttention` and what
    is built of it, and modules given to `register_capture`.

    The first call of a model is looked at, which takes four to five times as long: whether anything but the recorded
    attentions mixes positions (state-space and recurrent layers, convolutions, pooling, attention that was not seen),
    whether each stands on the one below, whether its keys are of the same sequence. Later calls must run the same
    attentions and pay nothing.

    A stream is named by the path of the modules up to the layer index, e.g. `encoder.layers`; PyHealth's by the feature
    key. Cross-attention is left out, unless asked for: a stream is the self-attention of one sequence. Only calls of
    the model made in the block, in the thread that opened it, are recorded; a second call replaces the first. After the
    block, also after an exception, nothing is left on the model. Blocks may be nested, re-entered, and open on one
    model in several threads.

    Args:
        model: in eval mode, or without dropout.
        shared_layers: allow a module to attend more than once in one call of the model: its runs are consecutive
            layers that share weights (ALBERT, Universal Transformer). Runs that do not stand on each other are refused
            all the same.
        allow: `"attention_layers_only"` takes the chain over the attention layers although something else mixes
            positions in between, or layers do not stand on each other; `Tape.notes` then says what.
        cross_attention: record that, too, of a stream over the last state of another, for
            `Tape.encoder_decoder_rollout`.
        gradients: record what `Tape.take_gradients` goes back to: of each layer also the values [B, H_v, S, D_v], and
            its place in autograd's graph, which the tape then keeps. The model must be called with autograd on, and
            something that it embeds must require gradients.
        values: record what `value_norm` and `kobayashi` need: of each layer also the values [B, H_v, S, D_v], W_O
            [H, D_v, E] (a weight of the model, not copied, with the factors of a LayerScale in it) and the residual x
            [B, S, E] that W_O·A·v is added to. They are followed from the attention to that sum in every call; what
            does something else with its output in between is refused.

    Returns:
        A context manager that gives the `rollout.tape.Tape`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: `allow` is something else.
        CaptureError: on entry: dropout is on, or the model is compiled, scripted or quantised; in the model's call:
            nothing could be recorded, or the attention did something that cannot be recorded exactly.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: model must be a torch.nn.Module, got {type(model).__name__}")
    if allow not in (None, ATTENTION_LAYERS_ONLY):
        raise ValueError(f"capture: allow must be None or {ATTENTION_LAYERS_ONLY!r}, got {allow!r}")
    options = {"shared_layers": shared_layers, "allowed": allow is not None, "cross_attention": cross_attention}
    options |= {"gradients": gradients, "values": values}
    return Capture(model, **options)


class Capture(AbstractContextManager[Tape]):
    """What `capture` returns: enter it, again if need be, for a new tape."""

    def __init__(self, model: nn.Module, **options: bool) -> None:
        self._model, self._options = model, options
        self._open = threading.local()

    def __enter__(self) -> Tape:
        with ExitStack() as stack:
            tape = stack.enter_context(_capturing(self._model, **self._options))
            if not hasattr(self._open, "stacks"):
                self._open.stacks = []
            self._open.stacks.append(stack.pop_all())
        return tape

    def __exit__(self, *raised: Any) -> None:
        self._open.stacks.pop().__exit__(*raised)


def _through_root(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The captured model's own call: a pass begins and ends."""
    with ExitStack() as stack:
        for recording in _recordings.get():
            if recording.model is module:
                stack.enter_context(_refusing_compiled(recording))
                stack.enter_context(recording.running(args, kwargs))
        return call(*args, **kwargs)


@contextmanager
def _refusing_compiled(recording: Recording) -> Iterator[None]:
    """torch's compiler cannot trace what watches; it says so in terms of its own."""
    try:
        yield
    except Exception as error:
        if type(error).__module__ != "torch._dynamo.exc":
            raise
        raise CaptureError(
            f"capture: {recording.name(raising_module(recording.paths, error))} calls a function that torch compiles "
            f"(flex_attention does), in which nothing can be seen: use scaled_dot_product_attention with the mask, or "
            f"the function without torch.compile"
        ) from error


def _through_registered(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    reader = registered(module)
    if reader is None or not recordings_of(module):
        return call(*args, **kwargs)
    with ExitStack() as stack:
        for recording in recordings_of(module):
            stack.enter_context(recording.unheard())
        output = call(*args, **kwargs)
        with torch.no_grad():
            entry = reader(module, *args, **kwargs)
    if entry is not None and not isinstance(entry, Record):
        raise TypeError(
            f"register_capture: the function of {type(module).__name__} must return a rollout.Record or None, "
            f"got {type(entry).__name__}"
        )
    with torch._C.DisableTorchFunction():
        result = None if entry is None else _by_position(output, entry)
    for recording in recordings_of(module):
        if entry is None:
            recording.left_out(module)
        else:
            recording.attended(module, [entry.queries, entry.keys], result, partial(_same, entry))
    return output


def _same(entry: Record) -> Record:
    return entry


def _by_position(output: Any, entry: Record) -> Tensor | None:
    """What a module gave, as [B, 1, S, E]."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.dim() == 3 and leaf.is_floating_point():
            if leaf.shape[:2] == (entry.batch, entry.seq):
                return leaf.unsqueeze(1)
            if leaf.shape[:2] == (entry.seq, entry.batch):
                return leaf.transpose(0, 1).unsqueeze(1)
    return None


def _through_named(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module that by its name attends."""
    found = recordings_of(module)
    before = [recording.seen for recording in found]
    output = call(*args, **kwargs)
    for recording, seen in zip(found, before, strict=True):
        if recording.seen == seen:
            recording.unseen(module)
    return output


def _is_state(given: Any, axes: int) -> bool:
    return isinstance(given, Tensor) and not given.is_nested and given.dim() == axes and given.is_floating_point()


def _through_mixer(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module that by its name, or its own, attends or stands in the place of what does."""
    output = call(*args, **kwargs)
    for recording in recordings_of(module):
        if args and _is_state(args[0], 3):
            recording.given(module, args[0])
    return output


def _through_first(
    stream: str, axes: int, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A layer that a stack begins with, whose state has so many axes."""
    for recording in recordings_of(module):
        if args and _is_state(args[0], axes):
            recording.before_layer(stream, args[0])
    return call(*args, **kwargs)


def _through_last(stream: str, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The last layer of a stack."""
    output = call(*args, **kwargs)
    result = output[0] if isinstance(output, tuple) and output else output
    for recording in recordings_of(module):
        if _is_state(result, 3) or _is_state(result, 4):
            recording.after_layer(module, stream, result)
    return output


def _stacks(model: nn.Module) -> Iterator[dict[nn.Module, Around]]:
    """Watches what shows, in the call that is looked at, that something mixes positions beside the attentions."""
    modules = dict(model.named_modules())
    named = {path: module for path, module in modules.items() if ATTENTION.search(type(module).__name__)}
    yield dict.fromkeys(named.values(), _through_named)
    streams = stream_names(modules)
    mixers = {path: modules[path] for path in modules if path in named or MIXER.search(path.rpartition(".")[2])}
    yield dict.fromkeys(mixers.values(), _through_mixer)
    held = set(mixers.values())
    for stream in {streams[path][0] for path in mixers}:
        stack = modules.get(stream)
        if isinstance(stack, nn.ModuleList | nn.Sequential) and len(stack):
            yield {stack[0]: partial(_through_first, stream, 3)}
            # What comes before the first layer that attends makes the image into patches.
            attending = [layer for layer in stack if not held.isdisjoint(layer.modules())]
            yield {layer: partial(_through_first, stream, 4) for layer in attending[:1]}
            yield {stack[-1]: partial(_through_last, stream)}


def _registered_adapter(model: nn.Module) -> dict[nn.Module, Around]:
    return {module: _through_registered for module in model.modules() if registered(module) is not None}


def _watched(model: nn.Module) -> Iterator[dict[nn.Module, Around]]:
    yield _registered_adapter(model)
    for name, package in ADAPTERS.items():
        if package in sys.modules:  # else the model cannot have its modules
            yield importlib.import_module(name).adapter(model)


@contextmanager
def _capturing(model: nn.Module, **options: bool) -> Iterator[Tape]:
    refuse_opaque(model)
    refuse_dropout(model)
    recording = Recording(model, list(_watched(model)), partial(_stacks, model), **options)
    with ExitStack() as stack:
        stack.enter_context(around_call({model: _through_root}))
        _recordings.set((*_recordings.get(), recording))
        stack.callback(partial(_close, recording))
        yield recording.tape


def _close(recording: Recording) -> None:
    _recordings.set(tuple(other for other in _recordings.get() if other is not recording))
    recording.memo.clear()
