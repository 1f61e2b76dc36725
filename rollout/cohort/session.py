"""One call of `attribute_cohort` at work: parts done, here or on workers, committed, counted."""

import datetime
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from rollout.cohort.memory import peak_gpu_memory, peak_memory, reset_peak_memory
from rollout.cohort.shares import NOTE, add_up_shares, padding_note
from rollout.cohort.store import Store, totals
from rollout.cohort.summary import CohortRun
from rollout.cohort.work import Part, Work, run_parts
from rollout.errors import CohortError, require
from rollout.results.layout import ATTRIBUTION_SCHEMA, FAILURE_SCHEMA, PREDICTION_SCHEMA, SCRATCH, TARGET

PACKAGES = ("attention-rollout", "torch", "triton", "numpy", "pyarrow", "pyhealth")
ENOUGH = 32
"""Samples of a first part that must not all fail: with fewer, all of them may be bad."""


class Session:
    """One call of ``attribute_cohort`` on a folder it has: what is left to do is done, and the manifest kept."""

    def __init__(
        self, store: Store, work: Work, workers: int, client: Any, device: torch.device | None, progress: bool | None
    ) -> None:
        self.store, self.work, self.workers, self.client = store, work, workers, client
        self.device, self.progress = device, progress
        parts = work.plan.parts(len(work.source))
        self.todo = [number for number in range(len(parts)) if number not in store.records]
        self.total = sum(len(parts[number]) for number in self.todo)
        self.result = CohortRun(store.path, len(work.source), parts=len(parts), kept=len(store.records))

    def run(self) -> CohortRun:
        """Do what is left to do."""
        if not self.todo:
            if not self.store.manifest["status"].startswith("complete"):
                self._close_manifest()
            return self._counted()
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        session: dict[str, Any] = {"started": started, "finished": None, **_surroundings(self)}
        self.store.manifest["status"] = "running"
        self.store.manifest["sessions"].append(session)
        self.store.write_manifest()
        reset_peak_memory()
        begun = time.perf_counter()
        try:
            with self._bar() as advance:
                for part in self._parts(advance):
                    self._commit(part)
        finally:
            self.result.elapsed = time.perf_counter() - begun
            self._measure_memory()
            session |= {
                "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "samples": self.result.done,
                "seconds": {stage: round(spent, 3) for stage, spent in self.result.seconds.items()},
                "elapsed": round(self.result.elapsed, 3),
                "peak_bytes": self.result.peak_bytes,
                "gpu_peak_bytes": self.result.gpu_peak_bytes,
            }
            self._close_manifest()
        return self._counted()

    def _parts(self, advance: Callable[[int], None]) -> Generator[Part]:
        if self.client is None and self.workers == 1:
            with settled(self.work.model, self.device):
                yield from run_parts(self.work, self.todo, advance)
            return
        from rollout.cohort.cluster import run_on_client, run_on_workers

        with settled(self.work.model, None):
            if self.client is not None:
                done = run_on_client(self.client, self.work, self.todo, self.device)
            else:
                scratch = self.store.path / SCRATCH
                done = run_on_workers(self.workers, self.work, self.todo, self.device, scratch)
            try:
                for part in done:
                    self.result.peak_bytes = max(self.result.peak_bytes, part.record.pop("peak_bytes", 0))
                    yield part
                    advance(part.record["samples"])
            finally:
                done.close()
                shutil.rmtree(self.store.path / SCRATCH, ignore_errors=True)

    def _commit(self, part: Part) -> None:
        record = part.record
        if not self.store.records and record["samples"] >= ENOUGH and record["failed"] == record["samples"]:
            raise CohortError(
                f"attribute_cohort: none of the first {record['samples']} samples could be attributed; the first one: "
                f"{part.first_failure}"
            )
        begun = time.perf_counter()
        self.store.commit(part.number, part.files, record)
        for stage, spent in record["seconds"].items():
            self.result.seconds[stage] = self.result.seconds.get(stage, 0.0) + spent
        self.result.seconds["write"] += time.perf_counter() - begun
        self.result.done += record["samples"]
        self.result.halved += len(record["halved"])
        for halving in record["halved"]:
            self.store.manifest["notes"].append(
                f"part {part.number}, batch {halving['batch']}: {halving['samples']} samples ran out of memory and "
                f"were done in halves ({halving['reason']})"
            )

    def _counted(self) -> CohortRun:
        for key, value in totals(self.store.records.values()).items():
            if key != "samples":
                setattr(self.result, key, value)
        return self.result

    def _close_manifest(self) -> None:
        records = [self.store.records[number] for number in sorted(self.store.records)]
        counts = totals(records)
        complete = len(records) == self.result.parts
        status = "running" if not complete else "complete with failures" if counts["failed"] else "complete"
        predicted = PREDICTION_SCHEMA.append(TARGET) if self.work.class_specific else PREDICTION_SCHEMA
        decoders = self.work.source.decoders
        shares = add_up_shares(records, list(decoders))
        note = padding_note(shares, self.work.plan.pads)
        notes = [one for one in self.store.manifest["notes"] if not one.startswith(NOTE)]
        self.store.manifest |= {
            "status": status,
            "notes": notes if note is None else [*notes, note],
            "granularity": {feature: decoder.granularity for feature, decoder in decoders.items()},
            "columns": {
                "attributions": ATTRIBUTION_SCHEMA.names,
                "predictions": predicted.names,
                "failures": FAILURE_SCHEMA.names,
            },
            "padding_share": shares,
            "counts": {**counts, "samples": self.result.samples, "parts": len(records)},
            "parts": [{key: record[key] for key in ("part", "start", "stop", "batches")} for record in records],
        }
        self.store.write_manifest()

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int], None]]:
        tqdm = require("tqdm", "cohort").tqdm
        hidden = None if self.progress is None else not self.progress
        with tqdm(total=self.total, desc="attribute", unit=" samples", disable=hidden, dynamic_ncols=True) as bar:
            yield bar.update

    def _measure_memory(self) -> None:
        self.result.peak_bytes = max(self.result.peak_bytes, peak_memory())
        self.result.gpu_peak_bytes = max(self.result.gpu_peak_bytes, peak_gpu_memory())


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
