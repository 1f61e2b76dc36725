"""The adapter for every attention that is computed by torch: fused by `scaled_dot_product_attention`, or written out.

A `TorchFunctionMode`, in force while the captured model runs in this thread, sees the calls; no module is touched. Of a
fused call it takes the arguments; of one written out it follows the scores (`rollout._capture.scores`). What is done to
them that is not known is refused at the moment they would be used, by the name of the operation.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

from rollout._capture import scores
from rollout._capture.scores import Map, Scores
from rollout._capture.seen import Heads, Seen
from rollout._capture.shadow import Lockstep, _has_storage, written
from rollout.errors import CaptureError

__all__ = ["Watch", "unwatched"]

PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
SOFTMAX = {"softmax"}
# Attributes and questions, which make no tensor of scores.
PASSED = {"__get__", "size", "dim", "stride", "numel", "is_floating_point", "is_complex", "element_size", "__len__"}


class Watch(TorchFunctionMode):
    """Follows the calls of one model, for one open capture."""

    def __init__(self, seer: Any) -> None:
        super().__init__()
        self._seer = seer
        self._held: dict[int, tuple[weakref.ref[Tensor], Scores | Map]] = {}
        self._folded: dict[int, tuple[weakref.ref[Tensor], Heads]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in PASSED or self._seer.muted:
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._fused(func, *args, **kwargs)
        if func is functional.multi_head_attention_forward:
            self._seer.refuse_call("torch.nn.functional.multi_head_attention_forward", args[0], args[1])
        at, held = self._operand(args)
        if isinstance(held, Map):
            mixed = self._mix(func, name, args, kwargs, at, held)
            if mixed is not None:
                return mixed
        with torch._C.DisableTorchFunction():
            for tensor in written(func, name, args, kwargs):
                self._seer.before_write(tensor)
        output = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._note(name, args, kwargs, at, held, output)
        return output

    def _note(self, name: str, args: Any, kwargs: Any, at: int, held: Scores | Map | None, output: Any) -> None:
        """What is known of a result from what is known of the arguments."""
        if held is not None and not (isinstance(held, Scores) and name in PRODUCTS):
            self._carry(name, args, kwargs, at, held, output)
        elif name in PRODUCTS and isinstance(output, Tensor):
            made = scores.product(name, args, kwargs, output)
            if made is not None:
                self._hold(output, made)
        elif name in ("view", "reshape", "flatten") and isinstance(output, Tensor) and output.dim() == 3:
            before = args[0].shape
            if len(before) == 4 and output.shape == (before[0] * before[1], *before[2:]):
                self._fold(output, Heads(before[1]))
            elif len(before) == 3 and len(output) == before[0] and before[2] > output.shape[2]:
                self._fold(output, Heads(before[2] // output.shape[2], behind=True))
        elif name == "transpose" and args[1:] in ((0, 1), (1, 0)) and isinstance(output, Tensor):
            found = self._folded.get(id(args[0]))
            if found is not None and found[0]() is args[0] and found[1].behind:
                self._fold(output, Heads(found[1].number))
        elif name in ("cat", "concat", "concatenate") and isinstance(output, Tensor) and output.dim() == 3:
            given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
            if given.get("dim", 0) in (0, -3) and _are_slices(given["tensors"]):
                self._fold(output, Heads(len(given["tensors"]), first=True))

    def _operand(self, args: Any) -> tuple[int, Scores | Map | None]:
        """The argument that is followed, a map or scores, and its number."""
        if self._held:
            given = args[0] if args and isinstance(args[0], tuple | list) else args
            for at, value in enumerate(given):
                if isinstance(value, Tensor):
                    held = self._held.get(id(value))
                    if held is not None and held[0]() is value and not self._is_bias(args, at, held[1]):
                        return at, held[1]
        return 0, None

    def _is_bias(self, args: Any, at: int, held: Scores | Map) -> bool:
        """Whether a broken operand stands beside one that is whole: what is added to scores may have been scores."""
        if at != 0 or len(args) < 2 or held.broken is None or not isinstance(args[1], Tensor):
            return False
        other = self._held.get(id(args[1]))
        return other is not None and other[0]() is args[1] and other[1].broken is None

    def _carry(self, name: str, args: Any, kwargs: Any, at: int, held: Scores | Map, output: Any) -> None:
        if name == "__setitem__":
            output = args[0]
        for leaf in tree_leaves(output):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                continue
            if isinstance(held, Map):
                self._hold(leaf, scores.apply_to_map(name, args, kwargs, held, at, leaf))
            elif name in SOFTMAX:
                self._hold(leaf, scores.softmax(name, args, kwargs, held, leaf))
            else:
                self._hold(leaf, scores.apply(name, args, kwargs, held, at, leaf))

    def _hold(self, tensor: Tensor, held: Scores | Map) -> None:
        key = id(tensor)
        self._held[key] = weakref.ref(tensor, lambda _: self._held.pop(key, None)), held

    def _fold(self, batch: Tensor, heads: Heads) -> None:
        """[B, H, S, D] made [B·H, S, D], slices of [B, S, H·D] made [H·B, S, D], or [S, B, H·D] made [S, B·H, D] and
        turned: the one sign of heads there is."""
        key = id(batch)
        self._folded[key] = weakref.ref(batch, lambda _: self._folded.pop(key, None)), heads

    def _fused(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        with self._seer.aside():
            output = func(query, key, value, attn_mask, **options)
        if dropout_p:
            raise CaptureError(
                f"capture: the model must be in eval mode, got attention dropout {dropout_p} on in "
                f"{self._seer.name()}: call model.eval()"
            )
        with torch._C.DisableTorchFunction():
            heads = self._heads(query, key)
            self._seer.saw(Seen(query, key, value, output, scale=scale, mask=attn_mask, causal=is_causal, heads=heads))
        return output

    def _heads(self, *tensors: Tensor) -> Heads | None:
        """The heads of batches of matrices, where they were seen."""
        found = (self._folded.get(id(tensor)) for tensor in tensors)
        return next(
            (
                held[1]
                for held, tensor in zip(found, tensors, strict=True)
                if held and held[0]() is tensor and not held[1].behind
            ),
            None,
        )

    def _mix(self, func: Any, name: str, args: Any, kwargs: Any, at: int, held: Map) -> Any:
        """A map times values: the end of an attention written out. None when it is another operation."""
        if name not in PRODUCTS:
            return None
        with self._seer.aside():
            output = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._finish(name, args, at, held, output)
        return output

    def _finish(self, name: str, args: Any, at: int, held: Map, output: Tensor) -> None:
        found = scores.mixes(name, args, at, output)
        if found is None:
            self._hold(output, Map(held.scores, held.values, held.broken or name))
            return
        values, rows = found
        product, broken = held.scores, held.broken
        if product.sinks is not None and held.values.shape[-1] != product.keys.shape[-2]:
            broken = broken or "values for a sink"
        heads = self._heads(product.queries, product.keys)
        if heads is None and product.queries.dim() == 3 and held.values.dim() == 4:
            heads = Heads(held.values.shape[1])
        self._seer.saw(
            Seen(
                product.queries,
                product.keys,
                values,
                output.movedim(rows, -2),
                scores=product,
                maps=held.values,
                broken=broken,
                heads=heads,
                given=output,
                rows=rows,
            )
        )


def _are_slices(tensors: Any) -> bool:
    """Whether these are the channels of one tensor, cut in parts of one size, in their order."""
    if len(tensors) < 2 or not all(map(_has_storage, tensors)):
        return False
    first = tensors[0]
    width = first.shape[-1] * first.stride(-1)
    return all(
        (part.shape, part.stride(), part.untyped_storage().data_ptr(), part.storage_offset())
        == (first.shape, first.stride(), first.untyped_storage().data_ptr(), first.storage_offset() + at * width)
        for at, part in enumerate(tensors)
    )


@contextmanager
def unwatched() -> Iterator[None]:
    """No capture follows what runs in the block, and torch does not notice one: its fast paths are as ever."""
    if not any(isinstance(mode, Watch | Lockstep) for mode in _stack()):
        yield
        return
    before = _take_all()
    _put_all([mode for mode in before if not isinstance(mode, Watch | Lockstep)])
    try:
        yield
    finally:
        _take_all()
        _put_all(before)


def _stack() -> list[Any]:
    modes = _take_all()
    _put_all(modes)
    return modes


def _take_all() -> list[Any]:
    return [_pop_mode() for _ in range(_len_torch_function_stack())][::-1]


def _put_all(modes: list[Any]) -> None:
    for mode in modes:
        _push_mode(mode)
