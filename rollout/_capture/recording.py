"""One open capture: what it has recorded, and every attention of a call judged before it is recorded.

Adapters call `attended` when a module they know has attended, and the `Watch` of the generic one `Recording.saw`. In a
model's first call a `Study` says what each attention is; later calls must run the same attentions in the same order,
and are taken to be as the first one was.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rollout._capture.calls import Watch, unwatched
from rollout._capture.patch import Around, around_forward
from rollout._capture.plans import Plans, Site, batch_sizes, plans_of
from rollout._capture.probe import CROSS, SELF, STALE, Study
from rollout._capture.refusals import nothing_found, refuse_dropout
from rollout._capture.running import running_module
from rollout._capture.seen import Heads, Seen, batched, check, make_record
from rollout._capture.streams import stream_names
from rollout.errors import CaptureError
from rollout.tape import Record, Tape
from rollout.tape.handed import Handed, Slope

__all__ = [
    "ATTENTION_LAYERS_ONLY",
    "Recording",
    "is_recording",
    "memo",
    "name_of",
    "recordings_of",
    "whole",
]

ATTENTION_LAYERS_ONLY = "attention_layers_only"


class Recording:
    """One open capture: its tape, and where the model is in its forward pass."""

    def __init__(
        self,
        model: nn.Module,
        watched: list[dict[nn.Module, Around]],
        looked_at: Callable[[], Iterable[dict[nn.Module, Around]]],
        *,
        shared_layers: bool,
        allowed: bool,
        cross_attention: bool,
        gradients: bool,
    ) -> None:
        self.model = model
        self.tape = Tape(type(model).__name__)
        self.paths = {module: path for path, module in model.named_modules()}
        self.shared_layers, self.allowed, self.cross_attention = shared_layers, allowed, cross_attention
        self.gradients = gradients
        self._watched, self._looked_at = watched, looked_at
        self.depth, self.muted = 0, 0
        self.memo: dict[Any, tuple[Any, Any]] = {}
        self.study: Study | None = None
        self._plans, self._sites, self._batches = Plans(), list[Site](), frozenset[int]()
        self._ran: set[tuple[str, nn.Module, bool]] = set()

    @cached_property
    def streams(self) -> dict[str, tuple[str, str]]:
        """Path of a module → the name of its stream, and the path below it."""
        return stream_names({path: module for module, path in self.paths.items()})

    @contextmanager
    def running(self, args: Any, kwargs: Any) -> Iterator[None]:
        """The captured model's own call: a pass begins, what an earlier one recorded is replaced, and it ends."""
        if self.depth:  # the model calls itself
            yield
            return
        refuse_dropout(self.model)
        self._forget()
        self._plans = plans_of(self.model, args, kwargs, self.cross_attention)
        self._batches = batch_sizes((args, kwargs))
        self.study = Study(self.model, (args, kwargs)) if self._plans.wanted else None
        self.depth += 1
        try:
            with ExitStack() as stack:
                if self.study is not None:
                    stack.enter_context(self.study.lockstep)
                stack.enter_context(Watch(self))
                for modules in (*self._watched, *(self._looked_at() if self.study is not None else ())):
                    stack.enter_context(around_forward(modules))
                yield
            self._finish()
        finally:
            self.depth -= 1
            self.memo.clear()
            self.study = None

    def _forget(self) -> None:
        self.tape.clear()
        self.memo.clear()
        self._ran.clear()
        self._sites = []

    def _finish(self) -> None:
        """The pass ended: refuse one that recorded nothing."""
        if not self.tape.streams:
            raise CaptureError(nothing_found(self.model, self.tape.left_out))
        if self.study is None:
            self.tape.notes = self._plans.notes(self._sites)
            self._refuse_findings(self.tape.notes)
        elif self.study.conclusive:
            self._plans.add(self._sites, self.study.findings)

    def name(self, module: nn.Module | None = None) -> str:
        """Type and path of a module, by default the one that is running, for messages."""
        module = module or running_module(self.paths) or self.model
        return f"{type(module).__name__} at {self.paths[module] or 'the root'}"

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs in the block is one operation to this capture."""
        self.muted += 1
        try:
            if self.study is None:
                yield
            else:
                with self.study.lockstep.paused():
                    yield
        finally:
            self.muted -= 1

    def give(self, output: Any) -> None:
        """What a module that ran as one operation gave, beside what it was altered in: constants to the probe."""
        if self.study is not None:
            with torch._C.DisableTorchFunction():
                self.study.lockstep.know(output)

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Attention that runs in the block is not the model's."""
        self.muted += 1
        try:
            yield
        finally:
            self.muted -= 1

    def saw(self, seen: Seen) -> None:
        """An attention that torch computed, fused or written out, has run."""
        module = running_module(self.paths) or self.model
        states = [batched(tensor, seen.heads) for tensor in (seen.queries, seen.keys, seen.values)]

        def make() -> Record:
            where = self.name(module)
            if seen.broken is not None:
                raise CaptureError(
                    f"capture: {where} does something to its scores or maps that cannot be recorded exactly "
                    f"({seen.broken}): give rollout.register_capture a function for it"
                )
            self._refuse_shape(where, seen.queries, seen.heads)
            entry = make_record(seen, module, self.memoized)
            if self.study is not None:
                check(seen, entry, where)
            return entry

        self.attended(module, states, batched(seen.output, seen.heads), make, handed=seen.handed)

    def _refuse_shape(self, where: str, queries: Tensor, heads: Heads | None) -> None:
        if queries.dim() > 4:
            raise CaptureError(
                f"capture: {where} must attend in [B, H, S, D], got queries {list(queries.shape)}: it attends within "
                f"parts of a sequence, which other layers cut differently"
            )
        sizes = sorted(self._batches)
        batch = len(batched(queries, heads))
        if queries.dim() > 2 and batch != 1 and sizes and batch not in self._batches:
            raise CaptureError(
                f"capture: {where} must attend over one sequence for each sample of the batch, got {batch} "
                f"sequences for inputs of {' or '.join(map(str, sizes))}: it attends within parts of a sample "
                f"(windows, axes, frames), or over heads folded into the batch in a way that was not seen"
            )

    def attended(
        self,
        module: nn.Module,
        states: Sequence[Tensor],
        output: Tensor | None,
        make: Callable[[], Record | None],
        stream: str | None = None,
        crossing: bool = False,
        standing: bool = False,
        handed: Handed | None = None,
    ) -> None:
        """A module attended: judge it, and record it when it is the self-attention of a stream, or cross-attention
        that is asked for.

        Args:
            module: that attended just now.
            states: queries and keys, or what they were made of, and more that its output is made of, [B, *, S, *].
            output: of the attention, [B, *, S, *]; None when it cannot be followed.
            make: gives the record, or None for an attention to be left out.
            stream: what the tape calls its stream; by default the path of the module up to the layer index.
            crossing: it is known to attend over another sequence.
            standing: it is known to stand on the one before, of a stack that ran as one operation.
            handed: what gradients are taken of; None where that is not known.
        """
        if self.depth:
            with torch._C.DisableTorchFunction():
                self._attended(module, states, output, make, stream, crossing, standing, handed)

    def _attended(
        self,
        module: nn.Module,
        states: Sequence[Tensor],
        output: Tensor | None,
        make: Callable[[], Record | None],
        stream: str | None,
        crossing: bool,
        standing: bool,
        handed: Handed | None,
    ) -> None:
        path, name = self.paths[module], stream
        stream = self.streams[path][0]
        site = self._site(Site(path, stream), states, crossing, standing)
        crosses, entry = site.kind == CROSS, None
        if not crosses:
            self._refuse_lengths(module, states)
        if not crosses or self.cross_attention:
            self._refuse_again(module, stream, crosses, states[0])
            with torch.no_grad():
                entry = make()
        if self.study is not None:
            site = self._judge(module, site, states, output, entry, standing)
        self._sites.append(site)
        if entry is None:
            self.tape.left_out += (path,)
        else:
            self._ran.add((stream, module, crosses))
            slope = None
            if self.gradients and not crosses:
                entry, slope = self._with_gradients(module, entry, handed)
            self.tape.add(stream if name is None else name, path, entry, site.source, slope)

    def _with_gradients(self, module: nn.Module, entry: Record, handed: Handed | None) -> tuple[Record, Slope]:
        """The record with its values, and where the gradient of the output arrives."""
        where = self.name(module)
        if handed is None:
            raise CaptureError(
                f"capture: gradients are taken at the output of an attention, and what {where} hands on is not known, "
                f"as of a function of one's own, or of torch's fast path of an encoder layer that is frozen: leave "
                f"gradients=True out, or call requires_grad_() on the model"
            )
        slope = handed.slope(where)
        with torch.no_grad():
            return replace(entry, values=handed.values()), slope

    def _site(self, site: Site, states: Sequence[Tensor], crossing: bool, standing: bool) -> Site:
        if self.study is None:
            return self._plans.known(self._sites, site)
        if standing:
            return site._replace(kind=SELF)
        return site._replace(kind=CROSS if crossing else self.study.kind(site.stream, states[0], states[1]))

    def _judge(
        self,
        module: nn.Module,
        site: Site,
        states: Sequence[Tensor],
        output: Tensor | None,
        entry: Record | None,
        standing: bool,
    ) -> Site:
        study, where, stream = self.study, self.name(module), site.stream
        assert study is not None
        if entry is not None:
            if site.kind == STALE:
                study.findings.append(f"{where} attends to keys made of an earlier layer's state, not of its own")
            if site.kind == CROSS:
                site = site._replace(source=study.source(stream, where, states, entry.key_mask))
                self._refuse_no_source(where, site)
            elif standing:
                study.stand(stream)
            else:
                study.arrive(stream, where, states, entry.key_mask)
            self._refuse_findings(study.findings)
            self.tape.notes = tuple(study.findings)
        if output is not None:
            recorded = entry is not None and site.kind != CROSS
            study.leave(stream, where, states[0], output, recorded=recorded)
        return site

    def _refuse_no_source(self, where: str, site: Site) -> None:
        if site.source is None:
            raise CaptureError(
                f"capture: cross-attention must be over the last state of a stream that was recorded, that of {where} "
                f"is over something else: call the whole model, or leave cross_attention out"
            )

    def _refuse_findings(self, findings: Sequence[str]) -> None:
        if findings and not self.allowed:
            raise CaptureError(
                f"capture: the chain of a stream's attentions must be all that mixes its positions; {findings[0]}. "
                f"capture(model, allow={ATTENTION_LAYERS_ONLY!r}) takes the attention layers alone, and says so on the "
                f"tape"
            )

    def unseen(self, module: nn.Module) -> None:
        """A module that by its name attends has run, and nothing of it was seen."""
        if self.study is not None and not self.muted:
            self.study.findings.append(
                f"{self.name(module)} ran, and no softmax attention of it was seen, softmax(QKᵀ)·V"
            )
            self._refuse_findings(self.study.findings)
            self.tape.notes = tuple(self.study.findings)

    @property
    def seen(self) -> int:
        """How many attentions of this pass were seen."""
        return len(self._sites)

    def left_out(self, module: nn.Module) -> None:
        """A module that its own function says is no self-attention has run."""
        path = self.paths[module]
        self._sites.append(Site(path, self.streams[path][0], CROSS))
        self.tape.left_out += (path,)

    def _refuse_lengths(self, module: nn.Module, states: Sequence[Tensor]) -> None:
        queries, keys = (state.shape[-2] for state in states[:2])
        if queries == keys:
            return
        why = (
            "run the whole sequence at once, without a filled key-value cache (use_cache=False); generation steps "
            "cannot be recorded, nor keys of a shortened sequence"
        )
        if 1 in (queries, keys):
            why += (
                "; where it pools a sequence into one position, capture the part of the model that holds the other "
                "attentions, and call the model"
            )
        raise CaptureError(
            f"capture: {self.name(module)} must attend over the positions it is given, got {queries} queries and "
            f"{keys} keys: {why}"
        )

    def _refuse_again(self, module: nn.Module, stream: str, crosses: bool, state: Tensor) -> None:
        if (stream, module, crosses) not in self._ran or self.shared_layers:
            return
        advice = "pass shared_layers=True when its runs are layers that share weights"
        if self.study is not None and not self.study.stands(stream, state):
            advice = (
                "the second does not stand on the first: parts of one attention (differential attention, chunks, "
                "several images) cannot be recorded exactly; capture what runs on two inputs one input at a time"
            )
        raise CaptureError(
            f"capture: a module must attend once in a call of the model, {self.paths[module] or self.name(module)} "
            f"did twice: {advice}"
        )

    def given(self, module: nn.Module, hidden: Tensor) -> None:
        """A module that attends was called with [B, S, E] or [S, B, E]: it must have attended over S positions."""
        if self.study is None or self.muted:
            return
        for path, entry, source in (layer for layers in self.tape._layers.values() for layer in layers):
            if path == self.paths[module] and source is None and entry.seq not in hidden.shape[:2]:
                self.study.findings.append(
                    f"{self.name(module)} attends over {entry.seq} positions, and is given {list(hidden.shape)}"
                )
        self._refuse_findings(self.study.findings)
        self.tape.notes = tuple(self.study.findings)

    def before_layer(self, stream: str, hidden: Tensor) -> None:
        """The first layer of a stack is about to run."""
        if self.study is not None and not self.muted and hidden.shape[0] in self._batches:
            with torch._C.DisableTorchFunction():
                self.study.begin(stream, hidden)

    def after_layer(self, module: nn.Module, stream: str, hidden: Tensor) -> None:
        """The last layer of a stack has run: what came after its last attention counts too."""
        if self.study is not None and not self.muted:
            with torch._C.DisableTorchFunction():
                self.study.end(stream, self.name(module), hidden)
            self._refuse_findings(self.study.findings)
            self.tape.notes = tuple(self.study.findings)

    def refuse_call(self, what: str, query: Tensor, key: Tensor) -> None:
        """A call that hides an attention."""
        if query is key:
            raise CaptureError(
                f"capture: {self.name()} calls {what} itself: use a torch.nn.MultiheadAttention, or give "
                f"rollout.register_capture a function for it"
            )

    def before_write(self, tensor: object) -> None:
        """A tensor is about to be changed in place: the tape keeps the numbers there are."""
        if isinstance(tensor, Tensor):
            self.tape.keep_from(tensor)

    def memoized(self, tensors: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """`compute()`, once per tensor objects and pass: masks are shared by the layers of a model."""
        key = tuple(map(id, tensors))
        if key not in self.memo:
            self.memo[key] = (tensors, compute())  # the tensors are kept so that their ids stay their own
        return self.memo[key][1]


_recordings: ContextVar[tuple[Recording, ...]] = ContextVar("rollout_recordings", default=())


def recordings_of(module: nn.Module) -> list[Recording]:
    """The open captures of this thread whose model has the module, and is running."""
    return [recording for recording in _recordings.get() if module in recording.paths and recording.depth]


def is_recording(module: nn.Module) -> bool:
    """Whether this thread is inside a capture of a model that has the module."""
    return any(module in recording.paths for recording in _recordings.get())


def name_of(module: nn.Module) -> str:
    """Type and path of a module, for messages."""
    found = [recording for recording in _recordings.get() if module in recording.paths]
    return found[-1].name(module) if found else type(module).__name__


@contextmanager
def whole(module: nn.Module) -> Iterator[list[Recording]]:
    """A module whose call is one operation to every capture that is open on it: they are given."""
    with ExitStack() as stack:
        found = recordings_of(module)
        for recording in found:
            stack.enter_context(recording.aside())
        stack.enter_context(unwatched())
        yield found


def memo(tensor: Tensor, what: Any, compute: Callable[[], Any]) -> Any:
    """`compute()`, once per tensor object, question and pass."""
    open_ones = _recordings.get()
    if not open_ones:
        return compute()
    held, key = open_ones[-1].memo, (id(tensor), what)
    if key not in held:
        held[key] = (tensor, compute())
    return held[key][1]
