"""How it was run: the formula of the method, model, data, plan, versions, sessions, notes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rollout.report.bounds import MANIFEST, NOTES, SESSIONS
from rollout.report.text import DASH, count, finite, moment, seconds, size
from rollout.results.attributions import CohortAttributions
from rollout.results.faithfulness import CohortFaithfulness
from rollout.results.layout import EVALUATION_STAGES, STAGES

PHASES = tuple(dict.fromkeys((*EVALUATION_STAGES[:-1], *STAGES)))


def run(cohort: CohortAttributions | CohortFaithfulness) -> dict[str, Any]:
    """Facts of the manifest in words, and the manifest itself."""
    manifest = cohort.manifest
    identity = manifest["identity"]
    sessions = [one for one in _list(manifest.get("sessions")) if isinstance(one, Mapping)]
    notes = _list(manifest.get("notes"))
    whole = json.dumps({k: v for k, v in manifest.items() if k != "parts"}, indent=1, ensure_ascii=False, default=str)
    model, data, method = (_mapping(identity.get(key)) for key in ("model", "dataset", "method"))
    return {
        "title": " · ".join(str(data[key]) for key in ("name", "task") if data.get(key)) or "cohort",
        "model": str(model.get("class") or "a model").rpartition(".")[2],
        "method": method.get("name"),
        "status": manifest["status"],
        "complete": cohort.complete,
        "formula": formula(method),
        "signed": isinstance(method.get("formula"), list),
        "facts": [(name, value) for name, value in _facts(identity) if value not in (None, "", {})],
        "sessions": [_session(one) for one in sessions[-SESSIONS:]],
        "sessions_in_all": len(sessions),
        "versions": _versions(sessions),
        "notes": [note if isinstance(note, str) else json.dumps(note, ensure_ascii=False) for note in notes[:NOTES]],
        "notes_in_all": len(notes),
        "manifest": whole[:MANIFEST],
        "manifest_cut": len(whole) > MANIFEST,
    }


def formula(method: Mapping[str, Any]) -> list[str]:
    """How a layer's matrix is formed, and the chain, as lines of text."""
    if not method or isinstance(method.get("formula"), list):  # what is no chain says its own
        return [str(line) for line in method.get("formula") or []]
    residual = method.get("residual", 0.5)
    attention = method.get("attention")
    weight = 1.0 - kept if attention is None and (kept := finite(residual)) is not None else attention
    lines = _matrix(method, _weight(residual), _weight(weight))
    if method.get("renormalize"):
        lines.append("each row of M(l) divided by its sum")
    start = method.get("start_layer") or 0
    lines.append(f"R = M(L) · … · M({start + 1 if isinstance(start, int) else start}); the row that the model reads")
    if method.get("own_path") is False:
        lines.append("without what the row keeps for itself by the one path that never attends; divided by its sum")
    return lines


def _matrix(method: Mapping[str, Any], residual: str, weight: str) -> list[str]:
    """How M(l) is made of the attention, before its rows are divided."""
    handed_on = "of the attention A(l) × W_O · v of each key"
    if method.get("values") == "norm_then_sum":
        return [
            f"F(l) = sum over heads of the lengths {handed_on}",
            f"M(l) = {residual}‖x(l)‖ on the diagonal + {weight}F(l); x(l): what the residual adds",
        ]
    if method.get("values") == "sum_then_norm":
        return [
            f"f(l) = sum over heads {handed_on}, a vector for each entry",
            f"M(l) = ‖{weight}f(l) + {residual}x(l) on the diagonal‖; x(l): what the residual adds",
        ]
    lines = [f"F(l) = {_fused(method)}"]
    if discarded := finite(method.get("discard_ratio")):
        lines.append(f"the lowest {discarded:.0%} of the entries of F(l) set to 0")
    if method.get("normalize_attention"):
        lines.append("each row of F(l) divided by its sum")
    return [*lines, f"M(l) = {residual}I + {weight}F(l)"]


def _fused(method: Mapping[str, Any]) -> str:
    fusion, gradients = method.get("head_fusion", "mean"), method.get("gradients")
    name = fusion if isinstance(fusion, str) and len(fusion) < 20 else "weighted sum"
    if gradients == "clamp_then_fuse":
        return f"{name} over heads of max(A(l) ∘ ∇A(l), 0)"
    if gradients == "fuse_then_clamp":
        return f"max({name} over heads of A(l) ∘ ∇A(l), 0)"
    return f"{name} over heads of the attention A(l)"


def _weight(value: Any) -> str:
    return "" if value == 1 else f"{value} · "


def _facts(identity: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    model, data, method = (_mapping(identity.get(key)) for key in ("model", "dataset", "method"))
    parameters = model.get("parameters")
    yield "Method", method.get("name")
    yield "Source", method.get("paper")
    yield "Model", model.get("class")
    yield "Parameters", count(parameters) if isinstance(parameters, int) else parameters
    yield "Model fingerprint", model.get("fingerprint")
    yield "Data", data.get("name")
    yield "Task", data.get("task")
    yield "Data fingerprint", data.get("fingerprint")
    yield "Row read out", identity.get("readout")
    yield "Backend", identity.get("backend")
    yield "Target class", identity.get("target_class")
    for name, key in (("Evaluation", "evaluation"), ("Batches", "plan")):
        settings = _mapping(identity.get(key)).items()
        yield name, ", ".join(f"{word.replace('_', ' ')} {value}" for word, value in settings if value is not None)


def _session(one: Mapping[str, Any]) -> dict[str, Any]:
    spent, elapsed, samples = _mapping(one.get("seconds")), finite(one.get("elapsed")), finite(one.get("samples"))
    return {
        "started": moment(one.get("started")),
        "samples": count(samples),
        "elapsed": seconds(elapsed),
        "rate": f"{samples / elapsed:,.1f}" if samples is not None and elapsed else DASH,
        "phases": [(name, seconds(spent[name])) for name in PHASES if name in spent],
        "memory": size(one.get("peak_bytes")),
        "where": ", ".join(
            f"{one[key]} {key}" if key != "device" else str(one[key])
            for key in ("device", "threads", "workers")
            if one.get(key) is not None
        ),
    }


def _versions(sessions: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Package → the versions it had, over the sessions in order."""
    seen: dict[str, list[str]] = {}
    for one in sessions:
        for name, version in _mapping(one.get("versions")).items():
            had = seen.setdefault(str(name), [])
            if str(version) not in had:
                had.append(str(version))
    return [(name, ", then ".join(had)) for name, had in seen.items()]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
