"""What an attention's output is multiplied by and added to, x + W_O·o: followed from the output to that sum.

The value-aware methods need W_O and x. They are what the model computes with, whatever its modules are called: each use
of a tensor that comes of an attention's output is known here, exactly, or refused by its name. Of what is added, x is
what the queries were made of. Another term, as of an MLP that runs beside the attention, is left out, as that of an
MLP that runs after it is.

Source: Kobayashi et al. 2021 (EMNLP), arXiv:2109.07152, for x + W_O·o, of which biases are left out.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rollout._capture.lineage import Lineage, Node
from rollout._capture.seen import rounding
from rollout._capture.uses import ADD, Use
from rollout.errors import CaptureError
from rollout.tape.handed import Handed

__all__ = ["Residuals"]

Place = Callable[[Tensor, Tensor], None]


@dataclass(eq=False)
class Path:
    """An attention whose output is followed.

    Attributes:
        where: its module, for messages.
        size: (B, S).
        queries: the node of what they were made of.
        heads: gives its output by heads, [B, H, S, D_v], until it is multiplied.
        place: given W_O [H, D_v, E] and x [B, S, E] when they are known.
        found: they are.
    """

    where: str
    size: tuple[int, int]
    queries: Node
    heads: Callable[[], Tensor] | None
    place: Place
    found: bool = False

    def refuse(self, what: str) -> CaptureError:
        return CaptureError(
            f"capture: with values=True an attention must be seen to be multiplied by one W_O and added to a residual, "
            f"x + W_O·o, and {self.where} {what}: leave values=True out"
        )


@dataclass(frozen=True)
class Held:
    """A tensor that comes of an attention's output.

    Attributes:
        path: of the attention.
        weights: W_O [H, D_v, E] that it was multiplied by; None before that.
        added: it has x in it.
        seq_first: its rows are in the order [S, B], not [B, S].
        expected: its numbers [B, S, E] in float64, where they are looked at.
        read: what has been made of its numbers, in whatever shape they are; but one thing may.
    """

    path: Path
    weights: Tensor | None = None
    added: bool = False
    seq_first: bool = False
    expected: Tensor | None = None
    read: list[str] = field(default_factory=list)

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor shaped as this one is, as [B, S, E]."""
        batch, seq = self.path.size
        return tensor.reshape(seq, batch, -1).transpose(0, 1) if self.seq_first else tensor.reshape(batch, seq, -1)


class Residuals:
    """Follows the attentions' outputs of one call of a model.

    Args:
        looked_at: whether the sums are compared with what is recorded.
    """

    def __init__(self, looked_at: bool) -> None:
        self._lineage, self._looked_at = Lineage(), looked_at
        self._paths: list[Path] = []
        self._held: dict[int, tuple[weakref.ref[Tensor], list[Held]]] = {}

    def begin(self, where: str, size: tuple[int, int], handed: Handed | None, place: Place) -> None:
        """An attention has run.

        Raises:
            CaptureError: what it hands on is not known.
        """
        known = None if handed is None else handed.projected
        if known is not None and known.inputs is not None:
            place(known.weights(), known.inputs())
            return
        if handed is None or handed.output is None or handed.queries is None:
            raise CaptureError(
                f"capture: values=True needs what an attention hands on, and that of {where} is not known, as of a "
                f"function of one's own, or of an encoder layer of torch that runs fused with parts that are not its "
                f"own: leave values=True out"
            )
        output = handed.output
        heads = partial(handed.by_heads, output) if known is None else None
        path = Path(where, size, self._lineage.node(handed.queries), heads, place)
        self._paths.append(path)
        held = Held(path)
        if known is not None:
            held = replace(held, weights=known.weights(), seq_first=known.seq_first)
            held = replace(held, expected=held.rows(output).double() if self._looked_at else None)
        self._hold(output, held)

    def finish(self) -> None:
        """The call has ended.

        Raises:
            CaptureError: an output was not added to anything that its queries were made of.
        """
        for path in self._paths:
            if not path.found:
                raise path.refuse("was not seen to be added to what its queries are made of")

    def before(self, name: str, args: Any, kwargs: Any, changed: list[Tensor]) -> Callable[[Any], None]:
        """A function is about to run; what is returned is called with what it gave.

        Raises:
            CaptureError: it uses an output in a way that would make the record wrong.
        """
        plain = name.strip("_") if name.startswith("__") else name.rstrip("_")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        use = Use(plain, args, kwargs, given, changed)
        parents = tuple(self._lineage.node(tensor) for tensor in given)
        steps = [self._step(use, tensor, held) for tensor, held in self._among(given)]
        return partial(self._after, use, parents, steps)

    def enter(self, name: str, given: Any) -> None:
        """A module that runs as one operation is about to.

        Raises:
            CaptureError: it is handed an output.
        """
        for _, held in self._among(tree_leaves(given)):
            if not held.added:
                raise held.path.refuse(f"hands what it gives to {name}")

    def _among(self, given: Iterable[Any]) -> list[tuple[Tensor, Held]]:
        """What is held of these."""
        tensors: dict[int, Tensor] = {id(tensor): tensor for tensor in given}
        return [(tensor, held) for tensor in tensors.values() for held in self._of(tensor)]

    def _of(self, tensor: Tensor) -> list[Held]:
        reference, held = self._held.get(id(tensor), (None, []))
        return held if reference is not None and reference() is tensor else []

    def _after(self, use: Use, parents: tuple[Node, ...], steps: list[Held | CaptureError | None], output: Any) -> None:
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in made if leaf.is_floating_point() or leaf.is_complex()]
        same = use.keeps or use.scales or use.turns
        self._lineage.note(use.given, parents, use.changed, made, same)
        for step in steps if made or use.changed else ():
            if isinstance(step, CaptureError):
                raise step
            if step is not None:
                self._compare(step, made[0])
                self._hold(made[0], step)

    def _hold(self, tensor: Tensor, held: Held) -> None:
        key = id(tensor)
        kept = [each for each in self._of(tensor) if each.path is not held.path]
        self._held[key] = weakref.ref(tensor, lambda _: self._held.pop(key, None)), [*kept, held]

    def _step(self, use: Use, tensor: Tensor, held: Held) -> Held | CaptureError | None:
        """What a function makes of a tensor that is held; None is nothing that matters."""
        if use.keeps:
            return held if use.given[0] is tensor else None
        if held.added:
            return self._step_of_sum(use, tensor, held)
        if held.read:
            return held.path.refuse(f"hands what it gives to {held.read[0]} and to {use.name}")
        if held.weights is None:
            return held if use.turns else self._project(use, tensor, held)
        if use.turns and use.swaps_rows:
            return replace(held, seq_first=not held.seq_first)
        if use.name in ADD:
            return self._add(use, tensor, held)
        factor = use.factor(tensor, held.weights.shape[-1])
        if factor is None:
            return held.path.refuse(f"hands W_O·o to {use.name} before it is added to what its queries are made of")
        held.read.append(use.name)
        row = factor.detach().reshape(-1) if isinstance(factor, Tensor) else factor
        expected = None if held.expected is None else held.expected * row
        return replace(held, weights=held.weights * row, expected=expected, read=[])

    def _step_of_sum(self, use: Use, tensor: Tensor, held: Held) -> Held | CaptureError | None:
        other = use.beside(tensor) if use.name in ADD else None
        if isinstance(other, Tensor) and held.path.queries.is_made_of(self._lineage.node(other)):
            return held.path.refuse("is added to two things that its queries are made of")
        return held if use.scales and use.args[0] is tensor else None

    def _project(self, use: Use, tensor: Tensor, held: Held) -> Held | CaptureError:
        """The output of the heads is multiplied by W_O."""
        found = use.map(tensor)
        if found is None or held.path.heads is None:
            return held.path.refuse(f"hands the output of its heads to {use.name} before any W_O")
        held.read.append(use.name)
        (matrix, bias), heads = found, held.path.heads()
        held.path.heads = None
        seq_first = _seq_first(tensor, heads)
        if seq_first is None:
            return held.path.refuse(f"hands to {use.name} other numbers than its heads, side by side in their order")
        weights = matrix.unflatten(0, (heads.shape[1], heads.shape[3]))
        expected = None
        if self._looked_at:
            expected = torch.einsum("bhsd,hde->bse", heads.double(), weights.double())
            expected = expected if bias is None else expected + bias.double()
        return replace(held, weights=weights, seq_first=seq_first, expected=expected, read=[])

    def _add(self, use: Use, tensor: Tensor, held: Held) -> Held | CaptureError:
        """W_O·o is added to something: x, or a term that is left out."""
        other = use.beside(tensor)
        if not isinstance(other, Tensor) or torch.broadcast_shapes(other.shape, tensor.shape) != tensor.shape:
            return held.path.refuse(f"hands W_O·o {list(tensor.shape)} to an {use.name} that is not of two such things")
        held.read.append(use.name)
        expected = None if held.expected is None else held.expected + held.rows(other.expand_as(tensor))
        held = replace(held, expected=expected, read=[])
        if not held.path.queries.is_made_of(self._lineage.node(other)):
            return held
        if other.shape != tensor.shape:
            return held.path.refuse(f"is {list(tensor.shape)} and is added to {list(other.shape)}")
        assert held.weights is not None
        written = {each.untyped_storage()._cdata for each in use.changed}
        inputs = other.clone() if written and other.untyped_storage()._cdata in written else other
        held.path.found = True
        held.path.place(held.weights, held.rows(inputs))
        return replace(held, added=True)

    def _compare(self, held: Held, made: Tensor) -> None:
        """Whether a sum is what is recorded, in a call that is looked at."""
        if not held.added or held.expected is None:
            return
        got, wanted = held.rows(made).double(), held.expected
        assert held.weights is not None
        bound = rounding({made.dtype, held.weights.dtype}, made.device)
        size = float(wanted.nan_to_num(0.0, 0.0, 0.0).abs().max())
        wrong = (got - wanted).abs() > bound * max(size, 1e-30)
        if bool((wrong | (got.isnan() != wanted.isnan())).any()):
            raise held.path.refuse("gives another sum")


def _seq_first(given: Tensor, heads: Tensor) -> bool | None:
    """Whether [.., H·D] has the numbers of heads [B, H, S, D] with S in front of B; None when it has others."""
    batch, count, seq, size = heads.shape
    if given.shape[-1] != count * size or given.numel() != heads.numel():
        return None
    wanted = heads.to(given.dtype)
    for first in (False, True):
        rows = given.reshape(seq, batch, count, size) if first else given.reshape(batch, seq, count, size)
        found = rows.permute(1, 2, 0, 3) if first else rows.transpose(1, 2)
        if bool(((found == wanted) | (found.isnan() & wanted.isnan())).all()):
            return first
    return None
