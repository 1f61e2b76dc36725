"""One call of `attribute_cohort` or `evaluate_cohort` at work: parts done, here or on workers, committed, counted."""

import datetime
import os
import platform
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from rollout.cohort.identity import State
from rollout.cohort.local import run_on_workers
from rollout.cohort.memory import peak_gpu_memory, peak_memory, reset_peak_memory
from rollout.cohort.store import Store
from rollout.cohort.summary import CohortRun
from rollout.cohort.work import Part, Work, run_parts
from rollout.errors import CohortError, require
from rollout.results.layout import RUNNING
from rollout.results.manifest import SessionEntry, totals

PACKAGES = ("attention-rollout", "torch", "triton", "numpy", "pyarrow", "pyhealth")
ENOUGH = 32
"""Samples of a first part that must not all fail: with fewer, all of them may be bad."""


class Session:
    """One call on a folder it has: what is left to do is done, and the manifest kept.

    Args:
        store: The folder.
        work: What is done to which samples.
        state: Gives what model and functions hold now.
        workers, client, device, progress: As in `attribute_cohort`.
    """

    def __init__(
        self,
        store: Store,
        work: Work,
        state: State,
        workers: int,
        client: Any,
        device: torch.device | None,
        progress: bool | None,
    ) -> None:
        self.store, self.work, self.state, self.workers, self.client = store, work, state, workers, client
        self.device, self.progress = device, progress
        parts = work.plan.parts(len(work.source))
        self.todo = [number for number in range(len(parts)) if number not in store.records]
        self.total = sum(len(parts[number]) for number in self.todo)
        self.result = CohortRun(store.path, len(work.source), work.task.done, parts=len(parts), kept=len(store.records))

    def run(self) -> CohortRun:
        """Do what is left to do."""
        if not self.todo:
            if self.store.manifest.status == RUNNING:
                self._close_manifest()
            return self._counted()
        session: SessionEntry = {"started": _now(), "finished": None, **_surroundings(self)}  # type: ignore[typeddict-item]
        self._note_versions(session)
        self.store.manifest.status = RUNNING
        self.store.manifest.sessions.append(session)
        self.store.write_manifest()
        reset_peak_memory()
        self._begun_with, begun = self.state(), time.perf_counter()
        try:
            with self._bar() as advance:
                for done, part in enumerate(self._parts(advance)):
                    if done == 0:
                        self._note_volatile()
                    self._commit(part)
        finally:
            self.result.elapsed = time.perf_counter() - begun
            self._measure_memory()
            self._note_volatile()
            session["finished"], session["samples"] = _now(), self.result.done
            session["seconds"] = {stage: round(spent, 3) for stage, spent in self.result.seconds.items()}
            session["elapsed"] = round(self.result.elapsed, 3)
            session["peak_bytes"], session["gpu_peak_bytes"] = self.result.peak_bytes, self.result.gpu_peak_bytes
            self._close_manifest()
        return self._counted()

    def _note_versions(self, session: SessionEntry) -> None:
        """Say what is of another version than in the session before: it may change the last bits of a number."""
        if not self.store.manifest.sessions:
            return
        before, now = ({**one.get("versions", {}), "python": one.get("python", "")} for one in
                       (self.store.manifest.sessions[-1], session))  # fmt: skip
        self.store.manifest.notes += [
            f"session {len(self.store.manifest.sessions) + 1}: {name} {before.get(name) or 'none'} → "
            f"{now.get(name) or 'none'}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        ]

    def _note_volatile(self) -> None:
        """Find the settings that change as the run is at work, such as a counter of calls."""
        now, before = self.state(), self._begun_with
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if set(names) - set(self.store.manifest.volatile):
            self.store.set_volatile(names)

    def _parts(self, advance: Callable[[int], None]) -> Generator[Part]:
        if self.client is None and self.workers == 1:
            with settled(self.work.model, self.device):
                yield from run_parts(self.work, self.todo, advance)
            return
        with settled(self.work.model, None), closing(self._elsewhere()) as done:
            for part in done:
                self.result.peak_bytes = max(self.result.peak_bytes, part.record.pop("peak_bytes"))
                notes = part.record.pop("notes")
                yield part
                self.store.manifest.notes += notes
                advance(part.record["samples"])

    def _elsewhere(self) -> Generator[Part]:
        if self.client is None:
            return run_on_workers(self.workers, self.work, self.todo, self.device)
        from rollout.cohort.cluster import run_on_client

        return run_on_client(self.client, self.work, self.todo, self.device)

    def _commit(self, part: Part) -> None:
        record = part.record
        if not self.store.records and record["samples"] >= ENOUGH and record["failed"] == record["samples"]:
            raise CohortError(
                f"attribute_cohort: none of the first {record['samples']} samples could be {self.result.what}; the "
                f"first one: {part.first_failure}"
            )
        begun = time.perf_counter()
        made = self.store.commit(part.number, part.files, record)
        for stage, spent in made.seconds.items():
            self.result.seconds[stage] = self.result.seconds.get(stage, 0.0) + spent
        self.result.seconds["write"] = self.result.seconds.get("write", 0.0) + time.perf_counter() - begun
        self.result.done += made.samples
        self.result.halved += len(made.halved)
        self.store.manifest.notes += [
            f"part {part.number}, batch {halving.batch}: {halving.samples} samples ran out of memory and were done in "
            f"halves ({halving.reason})"
            for halving in made.halved
        ]

    def _counted(self) -> CohortRun:
        for key, value in totals(self.store.records.values()).items():
            if key != "samples":
                setattr(self.result, key, value)
        return self.result

    def _close_manifest(self) -> None:
        self.store.manifest.count(self.store.records.values(), self.result.parts)
        self.store.write_manifest()

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int], None]]:
        tqdm = require("tqdm", "cohort").tqdm
        hidden = None if self.progress is None else not self.progress
        with tqdm(total=self.total, desc=self.result.what, unit=" samples", disable=hidden, dynamic_ncols=True) as bar:
            yield bar.update

    def _measure_memory(self) -> None:
        self.result.peak_bytes = max(self.result.peak_bytes, peak_memory())
        self.result.gpu_peak_bytes = max(self.result.gpu_peak_bytes, peak_gpu_memory())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: its first tensor, or the CPU."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


@contextmanager
def settled(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The model in evaluation mode and on its device; as it was on leaving."""
    training = [module for module in model.modules() if module.training]
    first = device_of(model)
    move = device is not None and first != device
    try:
        model.eval()
        if move:
            model.to(device)
        yield
    finally:
        if move:
            model.to(first)
        for module in training:
            module.training = True


def _surroundings(session: Session) -> dict[str, Any]:
    """On what a session ran; nothing that names the machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = session.device or device_of(session.work.model)
    named = device.type == "cuda" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(device) if named else device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "workers": "client" if session.client is not None else session.workers,
        "python": platform.python_version(),
        "versions": versions,
    }
