"""Folders of a run with one file mutated, and signed again."""

import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.results.manifest import signed
from tests.support.mutations import json_of, mutate_json, mutate_parquet, mutate_text
from tests.support.written_run import edit


def mutated(draw: random.Random, folder: Path) -> str:
    """Change one file of a folder, and sign it and what names it again, so that what lies behind is reached."""
    kinds = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and path.name != "parts" and any(path.iterdir())
    )
    kind = draw.choice(("manifest", "manifest", "record", "names", *kinds, *kinds))
    if kind in kinds:
        path = draw.choice(sorted((folder / kind).iterdir()))
        path.write_bytes(mutate_parquet(draw, path.read_bytes()))
        _record_file(folder, kind, path)
        return f"{kind}/{path.name}"
    named = kind == "names" and (folder / "code_names.json").exists()
    path = folder / ("code_names.json" if named else "manifest.json")
    path = draw.choice(sorted((folder / "parts").iterdir())) if kind == "record" else path
    _change_json(draw, path)
    if named:
        edit(folder / "manifest.json", names=hashlib.sha256(path.read_bytes()).hexdigest())
    elif path.name == "manifest.json" and draw.random() < 0.6:
        _name_run_again(folder)
    return path.name


def _change_json(draw: random.Random, path: Path) -> None:
    if draw.random() < 0.2:
        path.write_bytes(mutate_text(draw, path.read_bytes()))
        return
    value = json.loads(path.read_bytes())
    told = value.pop("sha256", None)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = mutate_json(draw, value)
    path.write_bytes(json_of(value) if told is None or not isinstance(value, dict) else signed(value))


def _record_file(folder: Path, kind: str, path: Path) -> None:
    """The commit record of a part says what its file holds now; its number of rows too, where that fits."""
    record = folder / "parts" / f"{path.stem}.json"
    content = path.read_bytes()
    files = json.loads(record.read_bytes())["files"]
    files[kind] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    more = {}
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError):
        rows = files[kind]["rows"]
    if kind in ("attributions", "faithfulness") and 0 <= rows < 2**53 and rows != files[kind]["rows"]:
        files[kind]["rows"] = more["rows"] = rows
        counts = json.loads((folder / "manifest.json").read_bytes())["counts"]
        counts["rows"] += rows - json.loads(record.read_bytes())["rows"]
        edit(folder / "manifest.json", counts=counts)
    edit(record, files=files, **more)


def _name_run_again(folder: Path) -> None:
    """The commit records are of the run that the manifest is of now."""
    try:
        identity = json.loads((folder / "manifest.json").read_bytes())["identity"]
        identity["dataset"].pop("content", None)
        run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    for path in (folder / "parts").iterdir():
        edit(path, run=run)
