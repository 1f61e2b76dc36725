"""The work itself: parts of a cohort read ahead of the model, done batch by batch, and turned into files.

A batch that runs out of memory is halved. A batch that fails for another reason is halved too, down to the sample that
makes it fail: that sample is recorded with its reason, and the others go on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rollout.cohort.draft import Draft, Part, Task
from rollout.cohort.plan import Plan
from rollout.cohort.prefetch import ReadBatch, collate_or_error, read_ahead, reason_of
from rollout.cohort.source import Source
from rollout.errors import CohortError

__all__ = ["Part", "Work", "run_parts"]

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
_LOST = ("device-side assert", "illegal memory access", "unspecified launch failure")


@dataclass
class Work:
    """What is done to which samples: all a worker needs.

    Attributes:
        model: On its device, in evaluation mode.
        source: The samples.
        task: What is done.
        plan: How they are cut into parts and batches.
        without: Sample → reason, of those that are failures already and are not read.
    """

    model: Any
    source: Source
    task: Task
    plan: Plan
    without: Mapping[int, str] = field(default_factory=dict)


def run_parts(
    work: Work, numbers: Iterable[int], advance: Callable[[int], None] = lambda samples: None
) -> Iterator[Part]:
    """Do the parts with these numbers, in order; reading and collating go ahead in a thread.

    Args:
        work: Of which cohort.
        numbers: Parts to do.
        advance: Called with the number of samples after each batch.
    """
    with read_ahead(work.source, work.plan, numbers, work.without) as items:
        draft = work.task.begin(work.source)
        for item in items:
            if isinstance(item, ReadBatch):
                _run_batch(work, draft, item)
                draft.batches.append(len(item.samples))
                advance(len(item.samples))
            else:
                advance(len(item.unread))
                yield draft.finish(item)
                draft = work.task.begin(work.source)


def _run_batch(work: Work, draft: Draft, batch: ReadBatch) -> None:
    """Have a batch done and added to its part; halve it where that fails."""
    try:
        draft.run(work.model, batch)
        return
    except Exception as error:
        failed, reason = _out_of_memory(error), reason_of(error)
        if _device_lost(error):
            raise CohortError(
                f"attribute_cohort: the GPU can no longer be used, after samples {int(batch.index[0])} … of part "
                f"{batch.part}: {reason}. The parts written so far are good; the same call goes on in a new process, "
                "and with device='cpu' the sample at fault is set apart"
            ) from error
        size = len(batch.samples)
        if size == 1:
            draft.failures[int(batch.index[0])] = reason
            return
    # Outside the handler, so that the traceback no longer holds the tensors of the failed attempt.
    if failed:
        draft.halved.append({"batch": len(draft.batches), "samples": size, "reason": reason})
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    for half in (slice(None, size // 2), slice(size // 2, None)):
        samples = batch.samples[half]
        _run_batch(
            work, draft, ReadBatch(batch.part, batch.index[half], samples, collate_or_error(work.source, samples))
        )


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or not."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in _NO_MEMORY)


def _device_lost(error: Exception) -> bool:
    """Whether a GPU answers every further call with an error, as after an index out of range in a kernel."""
    if any(word in str(error) for word in _LOST):
        return True
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
