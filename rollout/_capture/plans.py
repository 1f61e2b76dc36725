"""What is known of a model from calls that were looked at: which attentions run, in which order, and what they are."""

import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rollout._capture.patch import foreign_forward
from rollout._capture.readers import registered
from rollout.errors import CaptureError

__all__ = ["Plans", "Site", "batch_sizes", "plans_of"]


class Site(NamedTuple):
    """An attention in a pass: the path of its module, its stream, what kind it is, and the stream it attends over when
    that is another and asked for."""

    path: str
    stream: str
    kind: str = ""
    source: str | None = None


@dataclass
class Plans:
    """The passes of a model that were looked at, for calls of one form.

    Attributes:
        passes: the attentions of each, and what makes the chain over them alone wrong.
        wanted: the next call must be looked at.
    """

    passes: dict[tuple[Site, ...], tuple[str, ...]] = field(default_factory=dict)
    wanted: bool = True

    def add(self, sites: list[Site], findings: list[str]) -> None:
        self.passes[tuple(sites)] = tuple(findings)
        self.wanted = False

    def known(self, before: list[Site], site: Site) -> Site:
        """The attention that runs now, after those `before`, as it was found to be.

        Raises:
            CaptureError: no pass that was looked at went so.
        """
        at = len(before)
        found = {
            sites[at]
            for sites in self.passes
            if len(sites) > at and list(sites[:at]) == before and sites[at][:2] == site[:2]
        }
        if len(found) != 1:
            self._refuse(f"at {site.path or 'the root'}")
        return found.pop()

    def notes(self, sites: list[Site]) -> tuple[str, ...]:
        """What was found of a pass, at its end.

        Raises:
            CaptureError: no pass that was looked at ended so.
        """
        if tuple(sites) not in self.passes:
            self._refuse("at the end")
        return self.passes[tuple(sites)]

    def _refuse(self, where: str) -> None:
        self.wanted = True
        raise CaptureError(
            f"capture: the model must run the attentions it ran when it was first captured, {where} it runs others: "
            f"call it again, that call will be looked at afresh"
        )


_lock = threading.Lock()
_known: WeakKeyDictionary[nn.Module, dict[Any, Plans]] = WeakKeyDictionary()


def plans_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], asked: tuple[bool, ...]) -> Plans:
    """What is known of calls of this form, of the model as it is now, `asked` for the same."""
    kinds = tuple((type(module), foreign_forward(module) is not None, registered(module)) for module in model.modules())
    options = tuple(sorted((name, _form(value)) for name, value in kwargs.items()))
    form = (kinds, tuple(map(_form, args)), options, asked)
    with _lock:
        return _known.setdefault(model, {}).setdefault(hash(form), Plans())


def _form(value: Any) -> str:
    """What of an argument may change which attentions run."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.dim()} {value.is_nested}"
    if isinstance(value, bool | int | str) or value is None:
        return repr(value)
    if isinstance(value, dict):
        return repr([(key, _form(part)) for key, part in value.items()])
    return type(value).__name__


def batch_sizes(inputs: Any) -> frozenset[int]:
    """How many samples a call may have, from the sizes of its tensors; empty when they do not tell."""
    sizes: set[int] = set()
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and not leaf.is_nested and leaf.dim():
            sizes |= {leaf.shape[0]} | ({leaf.shape[1]} if 2 <= leaf.dim() <= 3 else set())
            if leaf.dim() == 5 or (leaf.dim() == 3 and not leaf.is_floating_point()):
                sizes.add(leaf.shape[0] * leaf.shape[1])
        elif isinstance(leaf, Tensor) and leaf.is_nested:
            return frozenset()
    return frozenset(sizes)
