"""The folder of a cohort run as a reader finds it: its manifest, its parts, the names of its codes, each checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from rollout.results.layout import ATTRIBUTION_SCHEMA, FAILURE_SCHEMA, PREDICTION_SCHEMA, SCHEMA_VERSION, STATUSES

ATTRIBUTIONS = pl.DataFrame(pl.from_arrow(ATTRIBUTION_SCHEMA.empty_table()))
PREDICTIONS = pl.DataFrame(pl.from_arrow(PREDICTION_SCHEMA.empty_table()))
FAILURES = pl.DataFrame(pl.from_arrow(FAILURE_SCHEMA.empty_table()))
COUNTED = {"attributions": "rows", "predictions": "attributed"}
KINDS = {"attributions": ATTRIBUTIONS, "predictions": PREDICTIONS, "failures": FAILURES}

Names = dict[str, dict[str, str]]


class RunFolder:
    """A checked folder of ``rollout attribute``; its rows stay on disk.

    Attributes:
        path: The folder.
        manifest: Of the run.
        names: Feature → code → name; empty when the folder has none.
        files: ``attributions`` | ``predictions`` | ``failures`` → its committed parts, in order.
        rows: Of the same, how many rows they have.
        granularity: Feature → ``code``, ``visit``, ``feature`` or ``step``, in the order of the dataset. A run writes
            it at its end; of one that is not complete it is found from the rows.

    Args:
        path: The folder.
        names: Further names, or the path of a JSON file of them; they go before the folder's own.

    Raises:
        ValueError: If there is no such folder, no manifest, or one that is damaged or of another schema version; if
            parts are damaged, of other columns, or fewer than a complete run has; if the names are not names.
    """

    def __init__(self, path: str | Path, names: str | Path | Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            what = "that is a file" if self.path.exists() else "no such folder"
            raise ValueError(f"path must be the folder of a cohort run, got {self.path}: {what}")
        self.manifest = _read_manifest(self.path)
        own = self.path / "code_names.json"
        self.names = _read_names(own) if own.is_file() else {}
        for feature, codes in _names(names).items():
            self.names[feature] = {**self.names.get(feature, {}), **codes}
        self.files = {kind: _parts(self.path, kind) for kind in KINDS}
        self.rows = {kind: self._checked_rows(kind, empty) for kind, empty in KINDS.items()}
        self.granularity: dict[str, str] = self.manifest.get("granularity") or self._found_granularity()

    @property
    def complete(self) -> bool:
        """Whether the run came to its end; failed samples may still lack."""
        return self.manifest["status"] != "running"

    def scan(self, kind: str) -> pl.LazyFrame:
        """All committed rows of ``attributions``, ``predictions`` or ``failures``, lazily; an empty frame for none."""
        files = self.files[kind]
        return pl.scan_parquet(files) if files else KINDS[kind].lazy()

    def twin(self, kind: str, part: Path) -> pl.LazyFrame:
        """The rows of a kind for the samples of one part: those of the part of the same name, else all."""
        same = self.path / kind / part.name
        return pl.scan_parquet(same) if same in self.files[kind] else self.scan(kind)

    def _found_granularity(self) -> dict[str, str]:
        found = self.scan("attributions").group_by("feature").agg(
            visits=pl.col("visit").is_not_null().any(), codes=pl.col("code").is_not_null().any()
        ).collect(engine="streaming")  # fmt: skip
        kinds = {feature: "visit" if visits else "code" if codes else "step" for feature, visits, codes in found.rows()}
        data = self.manifest["identity"].get("dataset")
        named = data.get("features") if isinstance(data, dict) else None
        order = [feature for feature in named if feature in kinds] if isinstance(named, list) else []
        return {feature: kinds[feature] for feature in [*order, *sorted(set(kinds) - set(order))]}

    def _checked_rows(self, kind: str, empty: pl.DataFrame) -> int:
        try:
            found = int(self.scan(kind).select(pl.len()).collect().item())
            columns = self.scan(kind).collect_schema()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ValueError(
                f"{kind}/ in {self.path} has a part that cannot be read ({_first_line(error)}); run the same "
                "attribution again on the folder: it redoes what is damaged"
            ) from error
        wrong = [name for name, dtype in empty.schema.items() if columns.get(name) != dtype]
        if wrong:
            raise ValueError(
                f"{kind}/ in {self.path} must have the columns {', '.join(empty.columns)} as a cohort run writes "
                f"them; missing or of another type: {', '.join(wrong)}"
            )
        expected = self.manifest["counts"].get(COUNTED.get(kind))
        if self.complete and expected is not None and found != expected:
            raise ValueError(
                f"{kind}/ in {self.path} must have {expected:,} rows, as its manifest says, got {found:,}: parts "
                "were removed or added; run the same attribution again on the folder"
            )
        return found


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"path must be the folder of a cohort run (out of attribute_cohort), got {folder}: it has no manifest.json"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({_first_line(error)}); run the same attribution again on the folder"
        ) from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version is not None and version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} must be of schema version {SCHEMA_VERSION}, got {version!r}: it was written by another version of "
            "attention-rollout; read it with that one"
        )
    lacking = [key for key, kind in _MANIFEST.items() if version is None or not isinstance(manifest.get(key), kind)]
    if lacking or manifest["status"] not in STATUSES:
        what = f"no {', '.join(lacking)}" if lacking else f"status {manifest['status']!r}"
        raise ValueError(f"{path} must be the manifest of a cohort run, got one with {what}; is it another file?")
    if manifest["status"] != "running":
        lacking = [key for key in ("granularity", "counts") if not isinstance(manifest.get(key), dict)]
        if lacking:
            raise ValueError(f"{path} is damaged: it has no {', '.join(lacking)}; run the same attribution again")
    return {**manifest, "counts": manifest.get("counts") or {}}


_MANIFEST = {"schema_version": int, "status": str, "identity": dict}


def _parts(folder: Path, kind: str) -> list[Path]:
    """The parts of a kind, without those a running or broken run has not committed yet."""
    commits = folder / "parts"
    done = {path.stem for path in commits.glob("part-*.json")} if commits.is_dir() else None
    found = sorted((folder / kind).glob("part-*.parquet"))
    return [path for path in found if done is None or path.stem in done]


def _names(names: str | Path | Mapping[str, Mapping[str, str]] | None) -> Mapping[str, Mapping[str, str]]:
    if names is None:
        return {}
    return _read_names(Path(names).expanduser()) if isinstance(names, str | Path) else _checked(names, "names")


def _read_names(path: Path) -> Names:
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ValueError(f"names must be a JSON file, got {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"names must be a JSON file, got {path}: {_first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"names must be a JSON file in UTF-8, got {path}: {_first_line(error)}") from error


def _checked(names: Any, source: str) -> Names:
    good = isinstance(names, Mapping) and all(
        isinstance(codes, Mapping) and all(isinstance(name, str) for name in codes.values()) for codes in names.values()
    )
    if not good:
        raise ValueError(f"{source} must be {{feature: {{code: name}}}}, every name a string; got something else")
    return {
        _text(feature): {_text(code): _text(name) for code, name in codes.items()} for feature, codes in names.items()
    }


def _text(value: Any) -> str:
    """As UTF-8 can hold it: half of a surrogate pair, which JSON can say, becomes a question mark."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
