"""`attribute_cohort`: every sample of a dataset attributed into a folder, going on where an earlier run stopped."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollout.cohort.explain import Explain, PyHealthExplain, describe_method
from rollout.cohort.identity import model_identity
from rollout.cohort.plan import Plan
from rollout.cohort.session import Session, device_of, settled
from rollout.cohort.source import open_source
from rollout.cohort.store import Store
from rollout.cohort.summary import CohortRun
from rollout.cohort.work import Work
from rollout.data.collate import Collate
from rollout.errors import require
from rollout.method import get_method
from rollout_kernels import Method
from rollout_kernels._dispatch import BACKENDS


def attribute_cohort(
    model: nn.Module,
    dataset: Any,
    out: str | Path,
    *,
    method: str | Method = "rollout",
    batch_tokens: int = 8192,
    device: str | torch.device | None = None,
    workers: int = 1,
    client: Any = None,
    resume: bool = True,
    retry_failures: bool = False,
    readout: str = "model",
    backend: str = "auto",
    target_class: int | None = None,
    batch_samples: int = 256,
    part_samples: int = 2048,
    equal_lengths: bool | None = None,
    collate: Collate | None = None,
    vocabularies: Mapping[str, Mapping[str, int] | None] | None = None,
    padding_ids: Mapping[str, int | None] | None = None,
    explain: Explain | None = None,
    code_names: Mapping[str, Mapping[str, str]] | None = None,
    progress: bool | None = None,
) -> CohortRun:
    """Attribute every sample of a dataset and write the rows to a folder of Parquet parts.

    The folder gets ``attributions/`` (one row per real entry of a record), ``predictions/`` (one per sample),
    ``failures/`` where there are any, and ``manifest.json``. Each sample goes through the model once. Memory does not
    grow with the cohort: at most two parts' samples are held.

    Killed at any moment, the same call goes on: parts that are whole are kept, the others done again, and the rows are
    those of an unbroken run, on a CPU with the same number of threads bit for bit. A folder of another model, method,
    dataset or plan is refused, and so is one that another process is writing to.

    A model that does not mask the padding of a batch gives relevance to it, and gives a sample other numbers, its
    prediction too, beside longer ones: PyHealth's do for ``timeseries`` and ``stagenet_tensor`` features. Relevance is
    written as it came; ``padding_share`` in ``predictions/`` says how much of a sample's row lies on padding, per
    feature in the order of the manifest, and the manifest sums it up. ``equal_lengths`` gives exact numbers.

    A sample that cannot be attributed (it cannot be read or collated, the model raises, a number is not finite, a row
    does not sum to 1 though by the method it does) is written to ``failures/`` with its reason, and the rest goes on. A
    batch that runs out of memory is halved, which the manifest notes.

    Args:
        model: A PyHealth model with the attention readout methods; any module, with ``explain``. It is put back as it
            was: device, training mode, hooks.
        dataset: A PyHealth ``SampleDataset``; or anything with ``len`` and ``[i]`` that gives mappings, with
            ``vocabularies`` and ``collate``.
        out: New folder, or that of the same run.
        method: A name in ``rollout.METHODS`` or a ``rollout.Method``. Gradient-weighted ones are class-specific.
        batch_tokens: Most tokens in a batch, padding included, all features added; a longer sample goes alone.
        device: Where to run; None: where the model is (on workers, on a device of that type).
        workers: Processes on this machine, each with a model of its own and its share of the threads; 1: this one.
            With several GPUs and ``device="cuda"`` each worker takes one.
        client: A ``dask.distributed.Client``: the parts become its tasks. The dataset's files must be readable where
            its workers run; ``out`` is written here only.
        resume: Whether to go on with what ``out`` holds; False: it must be new or empty.
        retry_failures: Do the parts that have failures again.
        readout: ``"model"`` or ``"forward"``, as in ``rollout.pyhealth.AttentionRollout``.
        backend: As in ``rollout.attention_rollout``.
        target_class: Class to explain, for class-specific methods; None: the one predicted, per sample. It is written
            to ``predictions/`` as ``target_class``.
        batch_samples: Most samples in a batch.
        part_samples: Samples in a part: what is done again at most after a kill.
        equal_lengths: Batch only samples of equal length in every feature, so that none is padded: each gets the
            numbers it has alone, as with ``batch_samples=1``, and sooner. None: where the method needs it, because it
            looks at the whole map of a PyHealth model, padding included: ``discard``, or a head fusion of your own.
        collate: Samples → batch; default: PyHealth's.
        vocabularies: Feature → code → id for a dataset that is not PyHealth's; None for a numeric feature.
        padding_ids: Feature → the id that stands for no code, and gets no row; None when every id is a code. Needed
            where the vocabulary gives id 0 to a code and names no ``<pad>`` or ``[PAD]``; PyHealth's name theirs, 0.
        explain: (model, batch) → ``rollout.cohort.explain.Explained``, for models that are not PyHealth's; ``method``,
            ``readout`` and ``backend`` are then its own business, and are only written down.
        code_names: Feature → code → name, kept in ``code_names.json`` for reports.
        progress: Whether to show a bar; None: when stderr is a terminal.

    Returns:
        Counts, seconds and memory; ``failed`` says how many samples have no rows.

    Raises:
        ValueError, TypeError: If an argument is wrong, before any work; or ``out`` holds something else.
        CohortError: If another process has the folder, the disk is full, workers keep dying, or none of the first
            samples can be attributed.
    """
    for module in ("pyarrow", "tqdm"):
        require(module, "cohort")
    resolved = get_method(method, "attribute_cohort")
    whole_map = resolved.needs_whole_map and explain is None
    plan = Plan(batch_tokens, batch_samples, part_samples, whole_map if equal_lengths is None else equal_lengths)
    if whole_map and plan.pads:
        raise ValueError(
            "attribute_cohort: equal_lengths must not be False for a method that looks at the whole map: its numbers "
            "would depend on the padding of a batch; leave it out"
        )
    _check(model, workers, client, readout, backend, target_class)
    source = open_source(dataset, collate, vocabularies, padding_ids)
    where = _resolve_device(device, here=client is None)
    if where is None and (client is not None or workers > 1):
        where = torch.device(device_of(model).type)  # a worker has devices of its own
    if backend == "triton" and (where or device_of(model)).type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError("attribute_cohort: backend='triton' needs a CUDA device; use 'auto'")
    if explain is None:
        standard = PyHealthExplain(resolved, readout, backend, target_class)
        with settled(model, None):
            standard.check(model)
        explain = standard
    identity = {
        "model": model_identity(model),
        "dataset": source.description,
        "method": describe_method(method),
        "plan": vars(plan).copy(),
        "readout": readout,
        "backend": backend,
        "target_class": target_class,
        "explain": None if isinstance(explain, PyHealthExplain) else _name_of(explain),
    }
    work = Work(model, source, explain, plan, class_specific=resolved.gradients is not None)
    parts = plan.parts(len(source))
    store = Store(out, identity, len(parts), resume=resume, retry_failures=retry_failures)
    try:
        if code_names is not None:
            store.write_names(code_names)
        return Session(store, work, workers, client, where, progress).run()
    finally:
        store.close()


def _check(model: Any, workers: int, client: Any, readout: str, backend: str, target_class: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"attribute_cohort: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"attribute_cohort: workers must be an int, got {workers!r}")
    if workers < 1:
        raise ValueError(f"attribute_cohort: workers must be at least 1, got {workers}")
    if client is not None and workers != 1:
        raise ValueError("attribute_cohort: give workers (processes of this machine) or client (a cluster), not both")
    if client is not None and not hasattr(client, "submit"):
        raise TypeError(f"attribute_cohort: client must be a dask.distributed.Client, got {type(client).__name__}")
    if target_class is not None and (isinstance(target_class, bool) or not isinstance(target_class, int)):
        raise TypeError(f"attribute_cohort: target_class must be an int or None, got {target_class!r}")
    if target_class is not None and target_class < 0:
        raise ValueError(f"attribute_cohort: target_class must be at least 0, got {target_class}")
    if readout not in ("model", "forward"):
        raise ValueError(f"attribute_cohort: readout must be 'model' or 'forward', got {readout!r}")
    if backend not in BACKENDS:
        raise ValueError(f"attribute_cohort: backend must be one of {BACKENDS}, got {backend!r}")


def _resolve_device(device: str | torch.device | None, here: bool) -> torch.device | None:
    if device is None:
        return None
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"attribute_cohort: device must be a torch device such as cpu or cuda, got {device!r}"
        ) from error
    if here and wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"attribute_cohort: device {device!r} asked for, but torch sees no CUDA device; use cpu")
    return wanted


def _name_of(function: Any) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"
