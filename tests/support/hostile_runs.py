"""Seeded folders as an attacker would send them: hostile strings and numbers in sound files, and files that are not."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.written_run import Record, Run, edit, write_run

CANARY = "zqcanary"
"""In every payload: wherever the page is not text, it must not stand."""
PAYLOADS = tuple(
    text.replace("@", CANARY)
    for text in (
        "<script>@()</script>", "</script><script src=//@.example></script>", "<img src=x onerror=@()>",
        "\"><svg onload=@()>", "'><iframe srcdoc='<script>@()</script>'>", "</style><style>*{background:url(//@)}",
        "</title><base href=//@.example>", "<svg><animate onbegin=@() attributeName=x dur=1s>", "--><!--@", "]]><@>",
        "<a href=javascript:@()>go</a>", "javascript:@()", "data:text/html,<script>@()</script>",
        "<meta http-equiv=refresh content='0;url=//@.example'>", "{{ @.__class__ }}{% raw %}{# @ #}", "${@()}<%=@%>",
        "<form action=//@><input name=@ autofocus onfocus=@()>", '" style="background:url(//@)" onmouseover="@()',
        "&lt;script&gt;@()&lt;/script&gt;", "&#60;script&#62;@&#60;/script&#62;", "<math><mi xlink:href=//@>@</mi>",
        "<bdi class=@></bdi></td></tr></table>@", "</article></section></main>@", "<![CDATA[<script>@()</script>]]>",
        "\u202e@\u202d\u2066<b>\u2069", "\u200f@\u061c\u2028\u2029\ufeff", "\x00@\x08\x0b\x1b[31m\x7f\x9b31m",
        "@\r\n\r\n<html>", "<@", "@'\"`<>&", "\ufffd@", "@" * 40, f"<{'@' * 30_000}>", "א@ب診断😀", "+ADw-script+AD4-@",
        "<scr\x00ipt>@</scr\x00ipt>", "＜script＞@", "expression(@)", "@;color:red}body{display:none",
    )
)  # fmt: skip
NUMBERS = (0.0, 1.0, -0.0, -0.5, 1e-30, 1e30, -1e30, 3e38, float("nan"), float("inf"), float("-inf"))
SCALES = (None, True, -1, 0, 1e308, -1e308, 10**400, "", [], {}, [[]], {"a": {"b": []}})


def nested(depth: int, brackets: str = "[]") -> str:
    opening, closing = brackets
    return f"{opening}{'"a":' if opening == '{' else ''}" * depth + "0" + closing * depth


@dataclass(frozen=True)
class Hostile:
    """A folder, what to ask of it, and what was done to it."""

    folder: Path
    patient: str | None
    names: Path | None
    done: tuple[str, ...]


def write_hostile_run(root: Path, seed: int) -> Hostile:
    """Write the folder of a seed: always hostile strings, often hostile numbers, every third time damaged files."""
    draw = random.Random(seed)
    records = [_record(draw, i) for i in range(draw.randint(1, 5))]
    done, names = [], None
    if draw.random() < 0.4:
        change = draw.choice(CHANGES)
        done.append(change.__name__)
        run = _run(draw, records, lambda rows: change(draw, rows))
    else:
        run = _run(draw, records, list)
    folder = write_run(root / "run", records, run, part_samples=draw.randint(1, 3))
    if draw.random() < 0.3:
        damage = draw.choice(DAMAGES)
        done.append(damage.__name__)
        damage(draw, folder)
    if draw.random() < 0.2:
        names = root / "names.json"
        names.write_bytes(_names_file(draw))
        done.append("names file")
    patient = draw.choice([None] * 5 + [records[0].patient] * 4 + [draw.choice([*PAYLOADS, "../../etc/passwd"])])
    return Hostile(folder, patient, names, tuple(done))


def _record(draw: random.Random, number: int) -> Record:
    hostile = lambda: draw.choice(PAYLOADS)  # noqa: E731
    score = lambda: draw.choice(NUMBERS[:4]) if draw.random() < 0.2 else draw.random()  # noqa: E731
    makers: dict[str, Callable[[], tuple[Any, ...]]] = {
        "flat": lambda: (hostile(), score()),
        "nested": lambda: ([hostile() for _ in range(draw.randint(1, 3))], score()),
        "timed": lambda: (None, score(), draw.choice([*NUMBERS, None, 1.5, 2.5])),
        "coded": lambda: (hostile(), score(), draw.choice([*NUMBERS, None, 3.5])),
    }
    features = {}
    for kind in draw.sample(list(makers), draw.randint(1, 3)):
        features[kind + hostile()[:200]] = [makers[kind]() for _ in range(draw.randint(1, 6))]
    value = lambda: draw.choice([*NUMBERS, None, 0.25, 0.75, 1.0]) if draw.random() < 0.4 else draw.random()  # noqa: E731
    prob = [value() for _ in range(draw.choice([0, 1, 1, 1, 3]))]
    truths = [0.0, 1.0, 0.0, 1.0, 2.0, -1.0, 1e30, 0.5, float("nan"), float("inf"), None]
    true = [draw.choice(truths[: draw.choice([4, 5, 11])]) for _ in range(draw.choice([1, 1, 1, 3]))]
    patient = f"{hostile()}{number}"
    return Record(patient, features, prob, draw.choice([true, true, true, None, []]), draw.choice([hostile(), None]))  # type: ignore[arg-type]


def _run(draw: random.Random, records: list[Record], change: Callable[[list], list]) -> Run:
    codes = {str(entry[0]) for record in records for part in record.features.values() for entry in part}
    named = {feature: {code: draw.choice(PAYLOADS) for code in codes} for feature in records[0].features}
    failing = draw.random() < 0.3 and len(records) > 1
    return Run(
        status="complete with failures" if failing else draw.choice(["complete", "complete", "running"]),
        model=draw.choice(["a.Transformer", "a.StageAttentionNet", f"m.{draw.choice(PAYLOADS)}"]),
        failures={len(records) - 1: draw.choice(PAYLOADS)} if failing else {},
        names=draw.choice([named, None]),
        notes=[draw.choice(PAYLOADS) for _ in range(draw.randint(0, 20))],
        dataset=draw.choice(PAYLOADS),
        task=draw.choice(PAYLOADS),
        change=change,
    )


def not_a_number(draw: random.Random, rows: list[tuple]) -> list[tuple]:
    return _at_one(draw, rows, 8, draw.choice([float("nan"), float("inf"), float("-inf"), None]))


def far_away(draw: random.Random, rows: list[tuple]) -> list[tuple]:
    return _at_one(draw, rows, draw.choice([4, 5]), draw.choice([2**31 - 1, 2**31 - 2, 10**9, -1, -(2**31)]))


def no_feature(draw: random.Random, rows: list[tuple]) -> list[tuple]:
    return _at_one(draw, rows, 3, None)


def other_ids(draw: random.Random, rows: list[tuple]) -> list[tuple]:
    return _at_one(draw, rows, draw.choice([1, 2]), draw.choice([None, *PAYLOADS]))


def negative(draw: random.Random, rows: list[tuple]) -> list[tuple]:
    return [(*row[:8], -row[8] if draw.random() < 0.6 else row[8]) for row in rows]


def enormous(draw: random.Random, rows: list[tuple]) -> list[tuple]:
    return [(*row[:8], row[8] * draw.choice([1e-38, 1e30, 3e38])) for row in rows]


def no_rows(draw: random.Random, rows: list[tuple]) -> list[tuple]:
    return []


def same_twice(draw: random.Random, rows: list[tuple]) -> list[tuple]:
    return [*rows, *draw.sample(rows, min(len(rows), 3))]


CHANGES = (not_a_number, far_away, no_feature, other_ids, negative, enormous, no_rows, same_twice)


def _at_one(draw: random.Random, rows: list[tuple], column: int, value: Any) -> list[tuple]:
    at = draw.randrange(len(rows))
    return [(*row[:column], value, *row[column + 1 :]) if i == at else row for i, row in enumerate(rows)]


def cut_file(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_files(folder))
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) or 1)])


def flip_bytes(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_files(folder))
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] ^= draw.randint(1, 255)
    path.write_bytes(bytes(content))


def other_content(draw: random.Random, folder: Path) -> None:
    texts = [
        "",
        "null",
        "[]",
        "0",
        '"<script>"',
        nested(100_000),
        nested(100_000, "{}"),
        "{" * 50,
        draw.choice(PAYLOADS),
    ]
    draw.choice(_files(folder)).write_text(draw.choice(texts), encoding="utf-8", errors="replace")


def remove_file(draw: random.Random, folder: Path) -> None:
    draw.choice(_files(folder)).unlink()


def hostile_field(draw: random.Random, folder: Path) -> None:
    """One field of the manifest, anywhere in it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    key = draw.choice(
        ["identity", "identity", "sessions", "notes", "granularity", "counts", "status", "schema_version"]
    )
    if key in manifest:
        edit(path, **{key: _poisoned(draw, manifest[key])})


def deep_field(draw: random.Random, folder: Path) -> None:
    edit(folder / "manifest.json", notes=json.loads(nested(draw.choice([50, 400, 900]), draw.choice(["[]", "{}"]))))


DAMAGES = (cut_file, flip_bytes, other_content, remove_file, hostile_field, hostile_field, hostile_field, deep_field)


def _poisoned(draw: random.Random, value: Any) -> Any:
    """The value with one thing in it replaced, or itself."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        return {**value, key: _poisoned(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        return [*value[:at], _poisoned(draw, value[at]), *value[at + 1 :]]
    return draw.choice([*SCALES, *PAYLOADS])


def _names_file(draw: random.Random) -> bytes:
    text = draw.choice(PAYLOADS)
    sound = {feature: dict.fromkeys(PAYLOADS, text) for feature in ("flat", "nested", text)}
    unsound = [nested(100_000), nested(5000, "{}"), '{"a": {"b": 1}}', "[1]", text, "\\ud800"]
    texts = [*[json.dumps(sound)] * 6, *unsound]
    return draw.choice(texts).encode("utf-8", "replace")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
