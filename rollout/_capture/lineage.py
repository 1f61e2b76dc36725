"""Which tensor was made of which, by torch's functions, in one call of a model."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rollout._capture.shadow import _has_storage

__all__ = ["Lineage", "Node"]


@dataclass(eq=False)
class Node:
    """One state of a tensor.

    Attributes:
        number: of no other; what it was made of has smaller ones.
        parents: what it was made of.
        root: the first that has the same numbers, in whatever shape and order of dimensions, and but for a factor.
    """

    number: int
    parents: tuple["Node", ...] = ()
    root: "Node" = field(init=False)

    def __post_init__(self) -> None:
        self.root = self

    def is_made_of(self, other: "Node") -> bool:
        """Whether it was made of what has the other's numbers."""
        wanted, seen, left = other.root, {self}, [self]
        while left:
            node = left.pop()
            if node.root is wanted:
                return True
            new = {each for each in node.parents if each.number >= wanted.number} - seen
            seen |= new
            left += new
        return False


class Lineage:
    """The tensors of a call that are still about; one that is met for the first time is made of nothing."""

    def __init__(self) -> None:
        self._count = 0
        self._nodes: dict[int, tuple[weakref.ref[Tensor], Node]] = {}

    def node(self, tensor: Tensor) -> Node:
        """The state a tensor is in."""
        held = self._nodes.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else self._put(tensor, ())

    def note(
        self,
        given: Sequence[Tensor],
        parents: tuple[Node, ...],
        changed: Sequence[Tensor],
        made: Sequence[Tensor],
        same: bool,
    ) -> None:
        """A function has run.

        Args:
            given: its arguments.
            parents: their nodes before it ran.
            changed: those that it wrote: they and their views are in a new state.
            made: what it gave.
            same: that has the numbers of the first argument, in the sense of `Node.root`.
        """
        storages = {tensor.untyped_storage()._cdata for tensor in changed}
        for reference, node in list(self._nodes.values()) if storages else ():
            alias = reference()
            if alias is not None and _has_storage(alias) and alias.untyped_storage()._cdata in storages:
                self._put(alias, (node, *parents))
        for tensor in made:
            if not any(tensor is each for each in given):
                node = self._put(tensor, parents)
                node.root = parents[0].root if same else node

    def _put(self, tensor: Tensor, parents: tuple[Node, ...]) -> Node:
        self._count += 1
        node, key = Node(self._count, parents), id(tensor)
        self._nodes[key] = weakref.ref(tensor, lambda _: self._nodes.pop(key, None)), node
        return node
