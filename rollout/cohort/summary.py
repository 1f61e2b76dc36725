"""What a cohort run did, in numbers and in words."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class CohortRun:
    """What a call of `attribute_cohort` or `evaluate_cohort` did; `str` gives the summary.

    Attributes:
        out: The folder.
        samples: In the dataset.
        what: Was done to them: "attributed" or "evaluated".
        attributed, failed, rows, tokens: Of all parts, those of earlier calls too.
        parts, kept: Parts in all, and those that earlier calls had done.
        halved: Batches that ran out of memory and were halved, in this call.
        done: Samples of this call.
        seconds: Stage → seconds of this call, added over workers: `collate` (read and pad), `forward` (the model,
            without the chain), `chain` (the rollout), `write` (rows, Parquet, disk). Collating overlaps the others. Of
            an evaluation `attribute` (every method) and `predict` (of what is left of the records) stand between.
        elapsed: Seconds of this call.
        peak_bytes: Most memory resident in one process (0 where the system does not tell).
        gpu_peak_bytes: Most memory of a GPU in use, 0 without one.
    """

    out: Path
    samples: int
    what: str = "attributed"
    attributed: int = 0
    failed: int = 0
    rows: int = 0
    tokens: int = 0
    parts: int = 0
    kept: int = 0
    halved: int = 0
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    peak_bytes: int = 0
    gpu_peak_bytes: int = 0

    def __str__(self) -> str:
        if not self.done:
            text = f"{self.samples:,} samples, all done before: {self.attributed:,} {self.what}, {self.rows:,} rows"
            return text + self._failures() + f"\n{self.out}"
        rate = self.done / self.elapsed if self.elapsed else 0.0
        spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        memory = f"peak memory {self.peak_bytes / 2**20:,.0f} MiB"
        if self.gpu_peak_bytes:
            memory += f", GPU {self.gpu_peak_bytes / 2**20:,.0f} MiB"
        kept = f" ({self.samples - self.done:,} done before)" if self.kept else ""
        lines = [
            f"{self.attributed:,} of {self.samples:,} samples {self.what}{kept}: {self.rows:,} rows, "
            f"{self.tokens:,} tokens" + self._failures(),
            f"{rate:,.0f} samples/s over {self.elapsed:.1f} s; {spent} s; {memory}",
        ]
        if self.halved:
            lines.append(f"{self.halved} batches ran out of memory and were halved; manifest.json says which")
        return "\n".join([*lines, str(self.out)])

    def _failures(self) -> str:
        return f"; {self.failed:,} FAILED, reasons in failures/" if self.failed else ""
