"""What a capture makes of a user's own model: which modules it records, which it leaves out or refuses, and why."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rollout._capture import capture
from rollout._capture.recording import ATTENTION_LAYERS_ONLY
from rollout._capture.refusals import ATTENTION
from rollout.errors import CaptureError
from rollout.runfile.entry_point import call_entry, find_entry
from rollout.tape import Tape

__all__ = ["examine"]

Line = tuple[str, bool]


def examine(entry: str) -> Iterator[Line]:
    """The report on a model line by line, each with whether it is good.

    The model is called without gradients, as it is and with a capture.

    Args:
        entry: `package.module:function`; the current folder can be imported from. Called without arguments, it returns
            the model, or `(model, batch)`. A batch that is a mapping is handed over as keyword arguments, a tuple or a
            list as positional ones, anything else as the one argument. Without a batch only what is refused before a
            model runs can be said.

    Raises:
        ValueError: there is no such function, or it returns something else.
        RuntimeError: it, or importing it, or the model without a capture raises.
    """
    made = call_entry(find_entry(entry, "--model"), entry, "--model")
    model, batch = made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"--model {entry} must return a torch.nn.Module, or (model, batch), got {type(made).__name__}"
            + (f" with {type(model).__name__} first" if model is not made else "")
        )
    yield f"{type(model).__name__} of {entry}", True
    yield from _interpreter(model)
    yield from _report(model, batch, entry)


def _interpreter(model: nn.Module) -> Iterator[Line]:
    """How the drop-in for PyHealth's interpreter runs a model, where it can; a copy, because it evaluates."""
    if hasattr(model, "get_relevance_tensor"):
        from rollout.pyhealth import AttentionRollout

        path = AttentionRollout(copy.deepcopy(model)).describe_path()
        yield f"rollout.pyhealth.AttentionRollout runs it {path}", True


def _report(model: nn.Module, batch: Any, entry: str) -> Iterator[Line]:
    if batch is None:
        yield from _before_it_runs(model)
        return
    args, kwargs = _arguments(batch)
    with torch.no_grad():
        try:
            plain = model(*args, **kwargs)
        except Exception as error:
            raise RuntimeError(
                f"--model {entry}: the model, called with the batch, raised {type(error).__name__}: {error}"
            ) from error
        tape, refusal = _captured(model, args, kwargs)
        if refusal is None:
            yield from _told(model, tape)
            yield from _same(plain, _again(model, args, kwargs))
            yield _measured(model, args, kwargs)
            return
        yield f"refused: {refusal}", False
        tape, other = _captured(model, args, kwargs, ATTENTION_LAYERS_ONLY)
    if other is None:
        yield f"with allow={ATTENTION_LAYERS_ONLY!r}, less than the model:", True
        yield from _told(model, tape)
        for note in tape.notes:
            yield f"  let pass: {note}", True


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def _before_it_runs(model: nn.Module) -> Iterator[Line]:
    try:
        with capture(model):
            pass
    except CaptureError as error:
        yield f"refused: {error}", False
        return
    yield "nothing that is refused before a model runs; what is captured shows in a call: return (model, batch)", True
    for path, module in _named(model).items():
        yield f"  attends by its name: {_where(path, module)}", True


def _captured(model: nn.Module, args: Any, kwargs: Any, allow: str | None = None) -> tuple[Tape, CaptureError | None]:
    """The tape of one call, and what refused it."""
    tape = Tape()
    try:
        with capture(model, allow=allow) as tape:
            model(*args, **kwargs)
    except CaptureError as error:
        return tape, error
    return tape, None


def _again(model: nn.Module, args: Any, kwargs: Any) -> Any:
    with capture(model):
        return model(*args, **kwargs)


def _measured(model: nn.Module, args: Any, kwargs: Any) -> Line:
    """Whether there is what the value-aware methods need, too."""
    try:
        with capture(model, values=True):
            model(*args, **kwargs)
    except CaptureError as error:
        return f"value_norm and kobayashi are not for it: {error}", True
    return "value_norm and kobayashi can be had: capture(model, values=True)", True


def _told(model: nn.Module, tape: Tape) -> Iterator[Line]:
    """What is on a tape, layer by layer, and what is not."""
    modules = dict(model.named_modules())
    heard = {*tape.left_out}
    for stream in tape.streams:
        records, paths = tape.layers(stream), tape.modules(stream)
        heard |= {*paths}
        yield (
            f"stream {stream}: {len(records)} layers over {records[0].seq} positions, {records[0].batch} samples",
            True,
        )
        for at, (path, record) in enumerate(zip(paths, records, strict=True)):
            heads, size = record.queries.shape[1], record.queries.shape[3]
            yield f"  {at}  {_where(path, modules[path])}, {heads} heads of {size}{_masks(record)}", True
    for path in dict.fromkeys(tape.left_out):
        yield f"left out, attention over another sequence: {_where(path, modules[path])}", True
    for path, module in _named(model).items():
        if not any(f"{other}.".startswith(f"{path}.") or f"{path}.".startswith(f"{other}.") for other in heard):
            yield f"did not attend in this call: {_where(path, module)}", True


def _masks(record: Any) -> str:
    said = [name for name in ("key_mask", "query_mask", "bias") if getattr(record, name) is not None]
    said += ["causal"] if record.causal else []
    said += [f"window {record.window}"] if record.window is not None else []
    return f", {', '.join(said)}" if said else ""


def _same(plain: Any, captured: Any) -> Iterator[Line]:
    """Whether the capture changed what the model gives."""
    pairs = [tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output) for output in (plain, captured)]
    pairs = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in pairs]
    alike = len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(*pairs, strict=True)
    )
    yield f"its output with a capture is {'' if alike else 'NOT '}the same, bit for bit", alike


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that attend by the name of their type, and hold no other such."""
    named = {path: module for path, module in model.named_modules() if ATTENTION.search(type(module).__name__)}
    return {
        path: module
        for path, module in named.items()
        if not any(other != path and other.startswith(f"{path}." if path else "") for other in named)
    }


def _where(path: str, module: nn.Module) -> str:
    return f"{path or 'the root'} ({type(module).__name__})"
