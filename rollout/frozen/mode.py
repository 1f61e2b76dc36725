"""The forward pass that is linear in the embedding: what is held, and what is not known to be linear.

A `TorchFunctionMode` sees every operation of the model in this thread. Attention weights, norm statistics and gates are
held (detached); an activation becomes a product with a held number. What remains is linear in the embedding, so that
gradient × input there is a sum of parts. An operation that is not known to be, and depends on the embedding, is
remembered with its result and everything made of that; a target made of it is refused.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from rollout.errors import CaptureError
from rollout.frozen import rules


class State(NamedTuple):
    """What is known of a tensor that depends on the embedding.

    Attributes:
        wrong: why it is not linear in the embedding; "" when it is.
        held: what made it a constant, "" where it is a signal: a constant may weight a signal, and be none itself.
        activated: it came out of an activation, so that in a product with another signal it is the gate.
    """

    wrong: str = ""
    held: str = ""
    activated: bool = False


class Frozen(TorchFunctionMode):
    """Holds weights, statistics and gates of what runs in it; `names` is the path of modules that run.

    The model's parameters are constants: every operation is given them detached, and they stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = {id(each): each for each in model.parameters()}
        self.names: list[str] = []
        self._thread = threading.get_ident()
        self._states: Any = WeakTensorKeyDictionary()

    @property
    def here(self) -> bool:
        """Whether this thread is the one whose pass this is."""
        return threading.get_ident() == self._thread

    def begin(self, leaf: Tensor) -> None:
        """`leaf` is the embedding, or one of several."""
        self._states[leaf] = State()

    def check(self, target: Tensor) -> None:
        """Raises CaptureError unless the target is linear in the embedding as far as this saw."""
        state = self._state(target)
        if state is None or state.held:
            made = state.held if state else "nothing that depends on the embedding"
            raise CaptureError(
                f"frozen_gradient: the target must be a logit, a signal of the model, got what is held, made by "
                f"{made}: take it before softmax or sigmoid"
            )
        if state.wrong:
            raise CaptureError(
                f"frozen_gradient: the target must be linear in the embedding once weights, statistics and gates are "
                f"held: {state.wrong}"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if any(id(leaf) in self._parameters for leaf in tree_leaves((args, kwargs))):
            if name == "__get__":  # its T, its requires_grad
                found = func(*args, **kwargs)
                return found.detach() if isinstance(found, Tensor) else found
            if name not in rules.ATTRIBUTES:
                args, kwargs = tree_map(self._detached, (args, kwargs))
        if name in rules.QUESTIONS or name in rules.NEW:
            return func(*args, **kwargs)
        read = args[:1] if name in rules.SHAPED_AS else (args, kwargs)
        given = [leaf for leaf in tree_leaves(read) if isinstance(leaf, Tensor)]
        with torch._C.DisableTorchFunction():
            found = [(leaf, self._state(leaf)) for leaf in given]
            signals = [(leaf, state) for leaf, state in found if state is not None]
        if not signals:
            return func(*args, **kwargs)
        output, state = self._run(func, name, args, kwargs, signals)
        with torch._C.DisableTorchFunction():
            self._note(output, state)
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                self._written(args[0], name, state)
        return output

    def _detached(self, leaf: Any) -> Any:
        if id(leaf) not in self._parameters or not leaf.requires_grad:
            return leaf
        with torch._C.DisableTorchFunction():
            return leaf.detach()

    def _state(self, tensor: Tensor) -> State | None:
        state = self._states.get(tensor)
        if tensor.requires_grad and (state is None or state.held):
            return State(
                f"{self._where()} uses a tensor made by code that torch does not show, as a custom autograd function"
            )
        return state

    def _where(self) -> str:
        return self.names[-1] if self.names else "the model"

    def _run(
        self, func: Any, name: str, args: Any, kwargs: Any, signals: list[tuple[Tensor, State]]
    ) -> tuple[Any, State]:
        """The result, and what is known of it."""
        wrong = next((state.wrong for _, state in signals if state.wrong), "")
        alive = [state for leaf, state in signals if leaf.requires_grad]
        held = next((state.held for _, state in signals if state.held), "")
        fixed = State(wrong, held or f"{name} in {self._where()}")
        if func is functional.scaled_dot_product_attention:
            return self._attend(func, args, kwargs, fixed)
        if func is functional.multi_head_attention_forward:
            query, key, value, *rest = args
            return func(query.detach(), key.detach(), value, *rest, **kwargs), self._states.get(value, fixed)
        if func in rules.REPLACED:
            return rules.REPLACED[func](*args, **kwargs), State(wrong)
        if name in rules.WEIGHTS | rules.STATISTICS or (name in rules.POWERS and args[1] in (0.5, -0.5)):
            return func(*args, **kwargs).detach(), fixed._replace(wrong="")  # whatever it was made of
        if name in rules.ACTIVATIONS and alive:
            return rules.activate(func, *args, **kwargs), State(wrong, activated=True)
        if name == "detach" or not alive:
            return func(*args, **kwargs), fixed
        if name in rules.PRODUCTS or name in rules.QUOTIENTS:
            return self._multiply(func, name, args, kwargs, len(alive), wrong)
        output = func(*args, **kwargs)
        if (
            name not in rules.LINEAR | rules.SHAPED_AS
            or kwargs.get("training")
            or (name == "batch_norm" and True in args[5:6])
        ):
            wrong = wrong or f"{name} in {self._where()} is not known to be linear"
        elif held:
            wrong = wrong or f"{name} in {self._where()} makes a signal of what is held, of {held}"
        return output, State(wrong, activated=name == "__getitem__" and alive[0].activated)

    def _attend(self, func: Any, args: Any, kwargs: Any, fixed: State) -> tuple[Any, State]:
        """Attention with queries, keys and mask held: linear in the values."""
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        rest, value = args[4:], named["value"]
        held = [named.pop(part).detach() for part in ("query", "key")]
        del named["value"]
        if isinstance(named.get("attn_mask"), Tensor):
            named["attn_mask"] = named["attn_mask"].detach()
        mask = [named.pop("attn_mask", None)] if rest else []
        return func(*held, value, *mask, *rest, **named), self._states.get(value, fixed)

    def _multiply(self, func: Any, name: str, args: Any, kwargs: Any, alive: int, wrong: str) -> tuple[Any, State]:
        """A product with one signal is linear; of two, what came out of an activation is the gate, and held."""
        factors = [at for at, leaf in enumerate(args) if isinstance(leaf, Tensor) and leaf.requires_grad]
        over = name in rules.QUOTIENTS
        gates = [at for at in factors if self._states.get(args[at], State()).activated]
        if alive == 2 == len(factors) and len(gates) == 1 and not over:
            args = tuple(each.detach() if at == gates[0] else each for at, each in enumerate(args))
        elif alive != 1 or (over and factors != [0]):
            wrong = wrong or f"{name} in {self._where()} multiplies or divides by what depends on the embedding"
        return func(*args, **kwargs), State(wrong)

    def activate(self, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The result of an activation made of several operations."""
        with torch._C.DisableTorchFunction():
            state = self._state(x)
            if state is None:
                return function(x)
            output = rules.activate(function, x) if x.requires_grad else function(x)
            self._note(output, state._replace(activated=True))
            return output

    def _note(self, output: Any, state: State) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                cut = not leaf.requires_grad and not state.held
                self._states[leaf] = state._replace(held=f"no_grad in {self._where()}") if cut else state

    def _written(self, tensor: Tensor, name: str, state: State) -> None:
        """What is written into may be seen through other views, of which nothing is known."""
        if state.wrong:
            raise CaptureError(
                f"frozen_gradient: {name} in {self._where()} must write what is linear in the embedding: {state.wrong}"
            )
        self._states[tensor] = state
