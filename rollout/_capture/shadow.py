"""What would change, and what depends on what: every operation run a second time on altered numbers, in lockstep.

A `Lockstep` follows storages. Each has a `Trace`: whether it depends on the model's inputs, and on which attentions'
outputs; and, once something it depends on was altered, a second storage with the numbers it would have then (its
shadow). An operation that reads a shadow runs again on the shadows. The model's own numbers are never touched, nor how
they are computed: it is torch's functions that are seen, not what they are made of.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Lockstep", "Trace", "written"]

# They draw numbers: run again they would draw others, and so would what comes after them.
RANDOM = {
    "bernoulli",
    "bernoulli_",
    "cauchy_",
    "exponential_",
    "geometric_",
    "multinomial",
    "normal",
    "normal_",
    "poisson",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "random_",
    "randperm",
    "uniform_",
}
# They may write their buffers.
STATEFUL = {"batch_norm", "instance_norm"}
# Memory nobody has written yet.
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass
class Trace:
    """What a storage depends on.

    Attributes:
        inputs: the model's inputs, by number, that it depends on.
        layers: per stream the last attention that it depends on, counted from 0.
        shadow: its numbers, had the attentions given other outputs; None when they would be the same.
        unwritten: nothing that torch shows has written it.
    """

    inputs: frozenset[int] = frozenset()
    layers: dict[str, int] = field(default_factory=dict)
    shadow: torch.UntypedStorage | None = None
    unwritten: bool = False


def join(traces: list[Trace]) -> Trace:
    """What depends on all of these, without their shadows."""
    layers: dict[str, int] = {}
    for trace in traces:
        for stream, layer in trace.layers.items():
            layers[stream] = max(layer, layers.get(stream, -1))
    return Trace(frozenset().union(*(trace.inputs for trace in traces)), layers)


class Lockstep(TorchFunctionMode):
    """Runs beside a model from the inputs on.

    Args:
        model: its own tensors are constants.
        inputs: what it is called with.

    Attributes:
        lost: operations whose effect on the shadows is not known, in order.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.lost: list[str] = []
        self._off = 0
        self._traces: dict[int, tuple[StorageWeakRef, Trace]] = {}
        self._batches = {leaf.shape[0] for leaf in tree_leaves(inputs) if _has_storage(leaf) and leaf.dim()}
        for tensor in _own_tensors(model):
            self._put(tensor, Trace())
        for number, tensor in enumerate(leaf for leaf in tree_leaves(inputs) if _has_storage(leaf)):
            self._put(tensor, Trace(frozenset({number})))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operations in the block are not followed."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def trace(self, tensor: Tensor) -> Trace:
        """What the tensor depends on."""
        found = self._find(tensor)
        return Trace() if found is None else found

    def shadow(self, tensor: Tensor) -> Tensor:
        """The tensor with its shadow's numbers; the tensor itself when it has none."""
        found = self._find(tensor)
        return tensor if found is None or found.shadow is None else _view(tensor, found.shadow)

    def alter(self, tensor: Tensor, numbers: Tensor, trace: Trace) -> None:
        """From now on the tensor depends on what `trace` says, and its shadow has these numbers."""
        with self.paused():
            trace.shadow = _copied(tensor)
            _view(tensor, trace.shadow).copy_(numbers)
            self._put(tensor, trace)

    def know(self, output: Any) -> None:
        """Tensors that nothing is known of are constants."""
        for tensor in tree_leaves(output):
            if _has_storage(tensor) and self._find(tensor) is None:
                self._put(tensor, Trace())

    def _find(self, tensor: Tensor) -> Trace | None:
        held = self._traces.get(tensor.untyped_storage()._cdata) if _has_storage(tensor) else None
        return None if held is None or held[0].expired() else held[1]

    def _put(self, tensor: Tensor, trace: Trace) -> None:
        storage = tensor.untyped_storage()
        self._traces[storage._cdata] = StorageWeakRef(storage), trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._off or name == "__get__":
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            given, again, traces, changed = self._before(func, name, args, kwargs)
        output = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            other = None if again is None else self._run(func, name, *again)
            self._follow(name, given, traces, changed, output, other)
        return output

    def _before(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, ...]:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)]
        traces = [self._known(name, tensor) for tensor in given]
        changed = written(func, name, args, kwargs)
        return given, self._again(args, kwargs, traces, changed), traces, changed

    def _known(self, name: str, tensor: Tensor) -> Trace:
        """The trace of an argument; what came from nowhere may hide anything."""
        trace = self._find(tensor)
        if trace is None:
            if tensor.is_floating_point() and tensor.dim() > 2 and tensor.shape[0] in self._batches:
                self.lost.append(f"{name} of a tensor that none of torch's functions gave")
            trace = Trace()
            self._put(tensor, trace)
        return trace

    def _again(self, args: Any, kwargs: Any, traces: list[Trace], changed: list[Tensor]) -> Any:
        """The arguments with shadows in their place, made before anything is written; None when there are none."""
        if all(trace.shadow is None for trace in traces):
            return None
        if any(not (tensor.is_floating_point() or tensor.is_complex()) for tensor in changed):
            return None  # integers are routing, which is taken as it is
        for tensor in changed:
            trace = self._find(tensor) or Trace()
            if trace.shadow is None:
                trace.shadow = _copied(tensor)
                self._put(tensor, trace)
        return tree_map(lambda leaf: self.shadow(leaf) if _has_storage(leaf) else leaf, (args, kwargs))

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in RANDOM or (name in STATEFUL and any(leaf is True for leaf in tree_leaves((args, kwargs)))):
            self.lost.append(name)
            return None
        try:
            return func(*args, **kwargs)
        except Exception:
            self.lost.append(name)
            return None

    def _follow(
        self, name: str, given: list[Tensor], traces: list[Trace], changed: list[Tensor], output: Any, other: Any
    ) -> None:
        """Note what the results depend on, and their shadows."""
        joined = join(traces)
        for tensor in changed:
            trace = self._find(tensor) or Trace()
            trace.inputs, trace.layers, trace.unwritten = joined.inputs, joined.layers, False
            self._put(tensor, trace)
        mine = {tensor.untyped_storage()._cdata for tensor in given}
        results = [leaf for leaf in tree_leaves(output) if _has_storage(leaf)]
        others = [leaf for leaf in tree_leaves(other) if _has_storage(leaf)]
        fresh = [(at, leaf) for at, leaf in enumerate(results) if leaf.untyped_storage()._cdata not in mine]
        for at, tensor in fresh:
            trace = Trace(joined.inputs, dict(joined.layers), unwritten=name in UNWRITTEN and tensor.numel() > 0)
            if len(others) == len(results) and (tensor.is_floating_point() or tensor.is_complex()):
                trace.shadow = self._keep(name, tensor, others[at])
            self._put(tensor, trace)
        reads = fresh and not changed and name not in UNWRITTEN and not name.endswith("_like")
        if reads and any(trace.unwritten for trace in traces):
            self.lost.append(f"{name} of memory written by something else than torch's functions")

    def _keep(self, name: str, tensor: Tensor, other: Tensor) -> torch.UntypedStorage | None:
        """The storage of a result's shadow, laid out as the result is."""
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            self.lost.append(name)
            return None
        storage = other.untyped_storage()
        alike = (tensor.stride(), tensor.storage_offset()) == (other.stride(), other.storage_offset())
        if alike and storage.nbytes() == tensor.untyped_storage().nbytes() and self._find(other) is None:
            return storage
        copied = _copied(tensor)
        _view(tensor, copied).copy_(other)
        return copied


def _has_storage(leaf: object) -> bool:
    return (
        isinstance(leaf, Tensor)
        and type(leaf) in (Tensor, nn.Parameter, nn.Buffer)
        and leaf.layout == torch.strided
        and not leaf.is_meta
        and not leaf.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(leaf)
    )


def _own_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and tensors in attributes, lists and dicts of a model's modules."""
    return [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if _has_storage(leaf)]


def _copied(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage().clone()


def _view(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def written(func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operation writes."""
    if not kwargs and not name.endswith("_") and not isinstance(func, OPERATIONS):
        return []  # most calls: nothing says that they write
    schema = getattr(func, "_schema", None)
    if schema is not None:
        found = [
            args[at] if at < len(args) else kwargs.get(argument.name)
            for at, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    elif name == "__setitem__" or kwargs.get("inplace") is True or name in IN_PLACE or _ends_in_place(name):
        found = [args[0] if args else kwargs.get("input")]
    else:
        found = [kwargs.get("out")]
    return [leaf for leaf in tree_leaves(found) if _has_storage(leaf)]


OPERATIONS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor", "mod")}


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
