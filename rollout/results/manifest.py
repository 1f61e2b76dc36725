"""What `manifest.json` and the commit records in `parts/` hold: their fields, checked as they are read.

A folder may come from anyone, and any byte of it may be damaged. So each file is read through its model here, once:
what lacks, has another type or is out of range is an error that names the file, the field and what was expected, and
everything after may trust what it is given. Fields that are not known here are kept and mean nothing.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Self, TypedDict

import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)

from rollout.files import as_json, plain, read_json
from rollout.results.identities import (
    CHAIN,
    FORMULA,
    STRICT,
    Count,
    Digest,
    EvaluationIdentity,
    Identity,
    Plain,
    Seconds,
)
from rollout.results.layout import (
    COMPLETE,
    EVALUATION_SCHEMAS,
    EVALUATOR,
    RUNNING,
    SCHEMA_VERSION,
    WITH_FAILURES,
    part_name,
    schemas,
)
from rollout.results.padding import NOTE, PaddingShare, ShareCount, add_up_shares, padding_note, pads

CONTENT = "content"
SHOWN = 3
"""Problems of one file that an error lists."""


class OtherVersionError(ValueError):
    """A folder written by another version of the package."""


@with_config(STRICT)
class SessionEntry(TypedDict):
    """One call that worked on the folder: when, on what, how long; without its end if it was killed."""

    started: str
    finished: str | None
    device: NotRequired[str]
    threads: NotRequired[Count]
    cores: NotRequired[Count | None]
    workers: NotRequired[Count | str]
    python: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    samples: NotRequired[Count]
    seconds: NotRequired[dict[str, Seconds]]
    elapsed: NotRequired[Seconds]
    peak_bytes: NotRequired[Count]
    gpu_peak_bytes: NotRequired[Count]


@with_config(STRICT)
class Counts(TypedDict):
    """Sums over the parts; `samples` is of the dataset."""

    samples: Count
    attributed: Count
    failed: Count
    rows: Count
    tokens: NotRequired[Count]
    parts: Count


@with_config(STRICT)
class PartPlan(TypedDict):
    """The samples `start` … `stop` - 1 of a part, and how many of them went into each batch."""

    part: Count
    start: Count
    stop: Count
    batches: list[Count]


class _File(BaseModel):
    """A JSON file that is one of our models, with the SHA-256 of what it says as its last field."""

    model_config = STRICT

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check the file.

        Raises:
            ValueError: naming the file, its field, what was expected and what came.
            OSError: If it cannot be read.
        """
        value = read_json(path)
        if not isinstance(value, dict):
            raise ValueError(f"{path} must be an object of fields, got {type(value).__name__}")
        cls._check_version(value, path)
        told = value.pop("sha256", None)
        model = cls.checked(value, str(path))
        if told != _digest(value):
            raise ValueError(f"{path} is damaged, or was edited: it does not hold what was written")
        return model

    @classmethod
    def checked(cls, value: Any, source: str) -> Self:
        """The model of plain values; `source` is what an error calls them."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{source}: {_problems(error)}") from None

    @classmethod
    def _check_version(cls, value: dict[str, Any], path: Path) -> None:
        """Refuse a file of another version, before its fields."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in the file."""
        return self.model_dump(exclude_unset=True)

    def as_bytes(self) -> bytes:
        """The content of the file."""
        return signed(plain(self.as_dict()))


def signed(value: Mapping[str, Any]) -> bytes:
    """Fields as the content of a file, with the SHA-256 of what they say."""
    return as_json({**value, "sha256": _digest(value)})


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(as_json(value)).hexdigest()


class Manifest(_File):
    """What was run on what, how far it is, and what its columns mean.

    Attributes:
        schema_version: Of the folder.
        written_by: The function that did.
        status: `running`, `complete` or `complete with failures`.
        identity: What is run on what.
        state: Settings of the model, and what the caller's functions hold beside their code, by name: part of what a
            run is, but for those in `volatile`.
        volatile: Of `state`, what changed while the run was at work, such as a counter of calls.
        sessions: The calls that worked on the folder.
        notes: What a reader should know: halved batches, changed versions.
        granularity: Feature → what has a score of its own: `code`, `visit`, `feature` or `step`.
        time: Feature with times → what they are counted in; None where that is not known.
        names: SHA-256 of `code_names.json`; None without one.
        labels: Output of the dataset → its label names by number, None for a number without one.
        columns: Kind of file → its columns.
        padding_share: Feature → how much of a row lies on padding.
        counts: Sums over the parts.
        parts: Which samples went into which part and batch.
    """

    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)]
    written_by: Literal["rollout.attribute_cohort"]
    status: Literal["running", "complete", "complete with failures"]
    identity: Identity
    state: dict[str, Plain]
    volatile: list[str]
    sessions: list[SessionEntry]
    notes: list[str]
    granularity: dict[str, Literal["code", "visit", "feature", "step"]]
    time: dict[str, str | None]
    names: Digest | None
    labels: dict[str, list[str | None]]
    columns: dict[str, list[str]]
    padding_share: dict[str, PaddingShare]
    counts: Counts
    parts: list[PartPlan]

    @classmethod
    def _check_version(cls, value: dict[str, Any], path: Path) -> None:
        version = value.get("schema_version")
        if isinstance(version, int) and version != SCHEMA_VERSION:
            raise OtherVersionError(
                f"{path}: schema_version must be {SCHEMA_VERSION}, got {version!r}: it was written by another version "
                "of attention-rollout; read it, and go on with it, by that one"
            )

    @classmethod
    def of(cls, identity: Mapping[str, Any], class_specific: bool = False, **facts: Any) -> Self:
        """The manifest of a run that begins.

        Args:
            identity: What is run on what.
            class_specific: Whether predictions have the class that is explained.
            **facts: Fields that are known beforehand; the others are empty.
        """
        samples = identity["dataset"]["samples"]
        writer = cls.model_fields["written_by"].annotation.__args__[0]  # type: ignore[union-attr]
        empty: dict[str, Any] = {"state": {}, "volatile": [], "sessions": [], "notes": [], "names": None}
        empty |= {"granularity": {}, "time": {}, "labels": {}, "padding_share": {}, "parts": []}
        empty["columns"] = _names_of(cls._schemas(class_specific))
        empty["counts"] = {"samples": samples, "attributed": 0, "failed": 0, "rows": 0, "tokens": 0, "parts": 0}
        first = {"schema_version": SCHEMA_VERSION, "written_by": writer, "status": RUNNING, "identity": dict(identity)}
        return cls.checked(plain({**first, **empty, **facts}), "manifest.json")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        counts = self.counts
        done = counts["attributed"] + counts["failed"]
        if self.status != RUNNING and done != counts["samples"]:
            raise ValueError(
                f"counts of a complete run must add up to its {counts['samples']} samples, got {counts['attributed']} "
                f"attributed and {counts['failed']} failed"
            )
        if self.columns not in [_names_of(self._schemas(specific)) for specific in (False, True)]:
            raise ValueError(f"columns must be those a cohort run writes, got {reprlib.repr(self.columns)}")
        return self

    @property
    def run(self) -> str:
        """A digest of the identity but for the sampled content, which need not be readable each time."""
        identity = dict(self.identity)
        identity["dataset"] = {key: value for key, value in self.identity["dataset"].items() if key != CONTENT}
        return hashlib.sha256(json.dumps(plain(identity), sort_keys=True).encode()).hexdigest()

    @property
    def class_specific(self) -> bool:
        """Whether predictions have the class that was explained."""
        return self.columns == _names_of(schemas(True))

    @property
    def schemas(self) -> Mapping[str, pa.Schema]:
        """Kind → the columns of its files, in order."""
        return self._schemas(self.class_specific)

    @classmethod
    def _schemas(cls, class_specific: bool) -> Mapping[str, pa.Schema]:
        return schemas(class_specific)

    def count(self, records: Iterable["PartRecord"], parts: int) -> None:
        """Bring `status`, `counts`, `padding_share` with its note, and `parts` up to what the commit records say, of
        `parts` parts in all."""
        done = sorted(records, key=lambda record: record.part)
        sums = totals(done)
        self.counts = {
            "samples": self.identity["dataset"]["samples"],
            "attributed": sums["attributed"],
            "failed": sums["failed"],
            "rows": sums["rows"],
            "tokens": sums["tokens"],
            "parts": len(done),
        }
        self.padding_share = add_up_shares([record.padding for record in done], self.identity["dataset"]["features"])
        note = padding_note(self.padding_share, pads(self.identity["plan"]))
        self.notes = [one for one in self.notes if not one.startswith(NOTE)] + ([] if note is None else [note])
        self.parts = [{"part": r.part, "start": r.start, "stop": r.stop, "batches": r.batches} for r in done]
        self.status = RUNNING if len(done) < parts else WITH_FAILURES if sums["failed"] else COMPLETE


def _names_of(columns: Mapping[str, pa.Schema]) -> dict[str, list[str]]:
    return {kind: schema.names for kind, schema in columns.items()}


class EvaluationManifest(Manifest):
    """What was evaluated on what; otherwise as `Manifest`."""

    written_by: Literal["rollout.evaluate_cohort"]  # type: ignore[assignment]
    identity: EvaluationIdentity  # type: ignore[assignment]

    @classmethod
    def _schemas(cls, class_specific: bool) -> Mapping[str, pa.Schema]:
        return EVALUATION_SCHEMAS


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a folder of either kind; raises as `Manifest.read`."""
    value = read_json(path)
    kind = EvaluationManifest if isinstance(value, dict) and value.get("written_by") == EVALUATOR else Manifest
    return kind.read(path)


class PartFile(BaseModel):
    """A Parquet file of a part: its size, the SHA-256 of its bytes, its rows."""

    model_config = STRICT
    bytes: Count
    sha256: Digest
    rows: Count


class Halving(BaseModel):
    """A batch that ran out of memory and was done in halves."""

    model_config = STRICT
    batch: Count
    samples: Count
    reason: str


class PartRecord(_File):
    """The commit record of a part, written last: what has none does not count.

    Attributes:
        run: Digest of the identity of the run it is of.
        part: Number of the part.
        start, stop: Its samples are `start` … `stop` - 1.
        samples, attributed, failed: How many.
        rows, tokens: Of its attributions; real entries that went through the model.
        batches: Samples of each batch.
        halved: Batches that ran out of memory.
        seconds: Stage → seconds.
        padding: Feature → its relevance on padding, counted.
        content: What each sample held, 4 bytes each in base64: see `rollout.cohort.content`; empty if not known.
        files: Kind → its file.
    """

    run: Digest
    part: Count
    start: Count
    stop: Count
    samples: Count
    attributed: Count
    failed: Count
    rows: Count
    tokens: Count
    batches: list[Count]
    halved: list[Halving]
    seconds: dict[str, Seconds]
    padding: dict[str, ShareCount] = Field(default_factory=dict)
    content: str = ""
    files: dict[str, PartFile]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.samples != self.stop - self.start or self.attributed + self.failed != self.samples:
            raise ValueError("start, stop, samples, attributed and failed must agree with one another")
        main = "faithfulness" if "faithfulness" in self.files else "attributions"
        wanted = {main: self.rows, "predictions": self.attributed}
        if self.failed:
            wanted["failures"] = self.failed
        found = {kind: file.rows for kind, file in self.files.items() if kind != "scores"}
        if found != wanted:
            raise ValueError(f"files must have the rows {wanted}, got {found}")
        return self

    @property
    def name(self) -> str:
        """Of its files, without their ending."""
        return part_name(self.part)


def totals(records: Iterable[PartRecord]) -> dict[str, int]:
    """Sums over parts: what the manifest counts."""
    kept = list(records)
    return {key: sum(getattr(r, key) for r in kept) for key in ("samples", "attributed", "failed", "rows", "tokens")}


_NAMES = TypeAdapter(dict[str, dict[str, str]], config=ConfigDict(strict=True))


def check_names(value: Any, source: str) -> dict[str, dict[str, str]]:
    """Names of codes, feature → code → name, from plain values.

    Raises:
        ValueError: If they are something else; `source` is what the error calls them.
    """
    try:
        return _NAMES.validate_python(plain(value))
    except (ValidationError, TypeError, RecursionError, ValueError):
        raise ValueError(
            f"{source} must be {{feature: {{code: name}}}}, every name a string; got something else"
        ) from None


def _problems(error: ValidationError) -> str:
    """In words: `identity.model must be a valid dictionary, got 'x'`."""
    found = error.errors(include_url=False)
    lines = []
    for one in found[:SHOWN]:
        where = ".".join(str(part) for part in one["loc"] if part not in (CHAIN, FORMULA))[:200]
        if one["type"] == "value_error":
            lines.append(str(one["ctx"]["error"]))
        elif one["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            wanted = one["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
            lines.append(f"{where} must be {wanted}, got {reprlib.repr(one['input'])}")
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(lines) + more
