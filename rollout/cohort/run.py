"""`attribute_cohort`: every sample of a dataset attributed into a folder, going on where an earlier run stopped."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollout.cohort.attributing import Attribute
from rollout.cohort.captured import entries_of, explain_of, reading_of
from rollout.cohort.code import python_version
from rollout.cohort.explain import Explain, chain_of, describe_method
from rollout.cohort.identity import function_identity, model_identity, read_state
from rollout.cohort.plan import Plan
from rollout.cohort.session import Session, device_of, settled
from rollout.cohort.settings import check_count, check_device, check_word, class_specific
from rollout.cohort.source import Source, open_source
from rollout.cohort.store import Store
from rollout.cohort.summary import CohortRun
from rollout.cohort.work import Work
from rollout.data.collate import Collate, pyhealth_collate
from rollout.errors import require
from rollout.results.manifest import Manifest
from rollout_kernels import Method


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
    query: int | None = None,
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

    The folder gets `attributions/` (one row per real entry of a record), `predictions/` (one per sample),
    `failures/` where there are any, and `manifest.json`. Each sample goes through the model once. Memory does not
    grow with the cohort: at most two parts' samples are held.

    Killed at any moment, the same call goes on: parts that are whole are kept, the others done again, and the rows are
    those of an unbroken run, on a CPU with the same number of threads bit for bit. A folder of another run is refused
    by name of what differs, and so is one that another process is writing to, and one with links in it. What tells a
    run:

    - the model's weights, buffers, classes and plain settings, private ones too, and the code of classes that no
      installed package brings;
    - `explain`, `collate` and a method's own head fusion: their code and that of what they name, globals, defaults,
      what they close over. What is looked up as they run cannot be known. A setting that changes as the run is at work,
      such as a counter of calls, is found out and does not count;
    - method, plan, vocabularies, the number of samples, and what samples hold. When a run goes on, 64 samples spread
      over the dataset are read again, and 1,024 drawn from the parts that are done (every one, if there are no more),
      and each sample of a part that is done again; so a dataset of which one sample in a hundred was replaced is taken
      for the same once in 29,000 times, and a single sample among a million most likely goes unseen.
      `rollout verify` reads every sample.

    Another version of a library or of Python is noted in the manifest, not refused.

    A model that does not mask the padding of a batch gives relevance to it, and gives a sample other numbers, its
    prediction too, beside longer ones: PyHealth's do for `timeseries` and `stagenet_tensor` features. Relevance is
    written as it came; `padding_share` in `predictions/` says how much of a sample's row lies on padding, per
    feature in the order of the manifest, and the manifest sums it up. `equal_lengths` gives exact numbers.

    A sample that cannot be attributed (it cannot be read or collated, the model raises, a number is not finite, a row
    does not sum to 1 though by the method it does) is written to `failures/` with its reason, and the rest goes on. A
    batch that runs out of memory is halved, which the manifest notes.

    Args:
        model: A PyHealth model that `rollout.pyhealth` explains; any module, with `explain`. It is put back as it was:
            device, training mode, hooks.
        dataset: A PyHealth `SampleDataset`; or anything with `len` and `[i]` that gives mappings, with
            `vocabularies` and `collate`, such as a `rollout.data.meds.MedsDataset`. A feature that its mapping
            `time_units` names is a pair of times and values.
        out: New folder, or that of the same run.
        method: A name in `rollout.METHODS`, a `rollout.Method`, or "frozen_gradient", which is no chain
            (`rollout.pyhealth.FrozenGradient`) and signed. It and gradient-weighted ones are class-specific.
        batch_tokens: Most tokens in a batch, padding included, all features added; a longer sample goes alone.
        device: Where to run; None: where the model is (on workers, on a device of that type).
        workers: Processes on this machine, each with a model of its own and its share of the threads; 1: this one.
            With several GPUs and `device="cuda"` each worker takes one. With 1, a sample that kills its process kills
            this one; with more, it is found and set apart in `failures/`.
        client: A `dask.distributed.Client`: the parts become its tasks. The dataset's files must be readable where
            its workers run; `out` is written here only.
        resume: Whether to go on with what `out` holds; False: it must be new or empty.
        retry_failures: Do the parts that have failures again.
        readout: `"model"` or `"forward"`, as in `rollout.pyhealth.AttentionRollout`.
        backend: As in `rollout.attention_rollout`.
        target_class: Class to explain, for class-specific methods; None: the one predicted, per sample. It is written
            to `predictions/` as `target_class`.
        query: Of PyHealth's models whose every position predicts (TransformerDeID, GPT2, HALO) the position whose
            relevance is wanted, as in `rollout.pyhealth.AttentionRollout`: −1 is each record's last. `predictions/` has
            what is predicted from there (of HALO nothing), and no label.
        batch_samples: Most samples in a batch.
        part_samples: Samples in a part: what is done again at most after a kill.
        equal_lengths: Batch only samples of equal length in every feature, so that none is padded: each gets the
            numbers it has alone, as with `batch_samples=1`, and sooner. None: where the method needs it, because it
            looks at the whole map of a PyHealth model, padding included: `discard`, or a head fusion of your own.
        collate: Samples → batch; default: PyHealth's.
        vocabularies: Feature → code → id for a dataset that is not PyHealth's; None for a numeric feature.
        padding_ids: Feature → the id that stands for no code, and gets no row; None when every id is a code. Needed
            where the vocabulary gives id 0 to a code and names no `<pad>` or `[PAD]`; PyHealth's name theirs, 0.
        explain: (model, batch) → `rollout.cohort.explain.Explained`, for models that are not PyHealth's; `method`,
            `readout` and `backend` are then its own business, and are only written down.
        code_names: Feature → code → name, kept in `code_names.json` for reports.
        progress: Whether to show a bar; None: when stderr is a terminal.

    Returns:
        Counts, seconds and memory; `failed` says how many samples have no rows.

    Raises:
        ValueError, TypeError: If an argument is wrong, before any work; or `out` holds something else.
        CohortError: If another process has the folder, the disk is full, workers keep dying, or none of the first
            samples can be attributed.
    """
    for module in ("pyarrow", "tqdm"):
        require(module, "cohort")
    chosen = {"workers": workers, "readout": readout, "backend": backend, "target_class": target_class}
    _check({**chosen, "query": query})
    where = check_where(model, device, client, workers)
    chain = chain_of(method)
    whole_map = chain is not None and chain.needs_whole_map and explain is None
    plan = Plan(batch_tokens, batch_samples, part_samples, whole_map if equal_lengths is None else equal_lengths)
    if whole_map and plan.pads:
        raise ValueError(
            "attribute_cohort: equal_lengths must not be False for a method that looks at the whole map: its numbers "
            "would depend on the padding of a batch; leave it out"
        )
    reading = reading_of(model) if explain is None else None
    entries = entries_of(model, reading)
    if entries and vocabularies is not None:
        raise ValueError(
            f"attribute_cohort: vocabularies must be left out for a {type(model).__name__}, which makes the entries of "
            f"{', '.join(entries)} itself"
        )
    source = open_source(dataset, collate, vocabularies, padding_ids, entries)
    if backend == "triton" and (where or device_of(model)).type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise ValueError("attribute_cohort: backend='triton' needs a CUDA device; use 'auto'")
    functions = _functions_of_the_caller(source, chain, explain)
    if explain is None:
        ours = explain_of(reading, chain, readout, backend, target_class, query)
        with settled(model, None):
            ours.check(model)
        explain = ours
    elif query is not None:
        raise ValueError(f"attribute_cohort: query is not handed to explain, which says what it explains; got {query}")
    work = Work(model, source, Attribute(explain, class_specific(chain)), plan)
    identity = {
        "model": model_identity(model),
        "dataset": source.description,
        "method": describe_method(method),
        "plan": vars(plan).copy(),
        **{key: value for key, value in chosen.items() if key != "workers"},
        **({} if query is None else {"query": query}),
        **{name: function_identity(function, [model, dataset]) for name, function in functions.items()},
        "python": python_version(),
    }
    state = partial(read_state, model, functions, [model, dataset])
    each = chain is None or (reading is not None and reading.each)
    begun = Manifest.of(
        identity,
        class_specific(chain),
        state=state(),
        granularity={feature: _scored(decoder.granularity, each) for feature, decoder in source.decoders.items()},
        time=source.time,
        labels=source.labels,
    )
    parts = len(plan.parts(len(source)))
    store = Store(out, begun, parts, dataset, resume=resume, retry_failures=retry_failures)
    try:
        if code_names is not None:
            store.write_names(code_names)
        return Session(store, work, state, workers, client, where, progress).run()
    finally:
        store.close()


def _scored(granularity: str, each: bool) -> str:
    """What has a score of its own: every code where a position is no visit, as where there is no chain."""
    return "code" if granularity == "visit" and each else granularity


def _check(settings: Mapping[str, Any]) -> None:
    for key in ("target_class", "query"):
        if settings[key] is not None:
            check_count(key, settings[key], _named(key))
    for key in ("readout", "backend"):
        check_word(key, settings[key], _named(key))


def _named(key: str) -> str:
    return f"attribute_cohort: {key}"


def check_where(model: Any, device: str | torch.device | None, client: Any, workers: int) -> torch.device | None:
    """Where the model is to be moved; None: it stays. A worker has devices of its own.

    Raises:
        ValueError, TypeError: no such device; workers and a client at once; a model or client that is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attribute_cohort: model must be a torch.nn.Module, got {type(model).__name__}")
    check_count("workers", workers, _named("workers"))
    if client is not None and workers != 1:
        raise ValueError("attribute_cohort: give workers (processes of this machine) or client (a cluster), not both")
    if client is not None and not hasattr(client, "submit"):
        raise TypeError(f"attribute_cohort: client must be a dask.distributed.Client, got {type(client).__name__}")
    if device is not None:
        return check_device(device, _named("device"), here=client is None)
    return torch.device(device_of(model).type) if client is not None or workers > 1 else None


def _functions_of_the_caller(source: Source, method: Method | None, explain: Explain | None) -> dict[str, Any]:
    """Argument → function, of those that are not this package's."""
    collate = None if source.collate is pyhealth_collate else source.collate
    fusion = method.head_fusion if method is not None and callable(method.head_fusion) else None
    functions = {"explain": explain, "collate": collate, "head_fusion": fusion}
    return {name: function for name, function in functions.items() if function is not None}
