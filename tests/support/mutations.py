"""Seeded mutations of JSON values and of Parquet files, as damage and as malice would make them."""

import io
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Draw = random.Random
TEXTS = (
    "",
    " ",
    "0",
    "nan",
    "\x00",
    "\ud800",
    "é" * 40,
    "x" * 5000,
    "../..",
    "<b>",
    "a\nb\r\nc",
    "\x1b[31m",
    "{}",
    "None",
)
NUMBERS = (0, 1, -1, 2, 2**31 - 1, 2**31, 2**53, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"),
           float("inf"), float("-inf"))  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], {"": None}, [None], {"sha256": "0"})
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, float("nan"), float("inf"), float("-inf"), None)
WHOLE = (0, -1, 1, 5, 10**6, 2**31 - 1, -(2**31), None)


def nested(depth: int, draw: Draw) -> Any:
    """Lists or objects within each other."""
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if draw.random() < 0.5 else [value]
    return value


def mutate_json(draw: Draw, value: Any) -> Any:
    """The value with one thing changed, anywhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.75:
            return {**value, key: mutate_json(draw, value[key])}
        return _other_keys(draw, value, key)
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        if draw.random() < 0.7:
            return [*value[:at], mutate_json(draw, value[at]), *value[at + 1 :]]
        return draw.choice((value[:at], value[at:], value * 2, value[::-1], [*value, draw.choice(value)]))
    return _other_value(draw, value)


def _other_keys(draw: Draw, value: dict[str, Any], key: str) -> dict[str, Any]:
    kept = {name: entry for name, entry in value.items() if name != key}
    how = draw.choice(("gone", "renamed", "more", "moved"))
    if how == "gone":
        return kept
    if how == "renamed":
        return {**kept, draw.choice((key.upper(), f"{key} ", *TEXTS)): value[key]}
    return (
        {**value, draw.choice(TEXTS): draw.choice((*NUMBERS, *OTHERS))} if how == "more" else {**kept, key: value[key]}
    )


def _other_value(draw: Draw, value: Any) -> Any:
    choices: list[Any] = [draw.choice(TEXTS), draw.choice(NUMBERS), draw.choice(OTHERS), [value], {"value": value}]
    if isinstance(value, str):
        choices += [value.upper(), value[:-1], f"{value}0", value[::-1]]
    if isinstance(value, int | float):
        choices += [str(value), float(value), -value, value + 1, not value]
    choices.append(nested(draw.choice((5, 60, 400)), draw))
    return draw.choice(choices)


def mutate_text(draw: Draw, text: bytes) -> bytes:
    """JSON as no writer of ours makes it, or bytes that are damaged."""
    how = draw.choice(("twice", "constant", "deep", "digits", "space", "bytes", "bytes", "cut", "other", "mark"))
    at = draw.randrange(len(text) + 1)
    if how == "twice":
        return text.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    if how in ("constant", "deep", "digits"):
        colons = [i for i, byte in enumerate(text) if byte == ord(":")]
        at = draw.choice(colons or [0]) + 1
        new = {
            "constant": draw.choice((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"undefined")),
            "deep": draw.choice((b"[", b'{"a":')) * 100_000,
            "digits": b"9" * 5000,
        }[how]
        return text[:at] + new + b"," + text[at:]
    if how == "space":
        return text.replace(b"\n", draw.choice((b"\r\n", b"\n\n", b"\t")))
    if how == "mark":
        return draw.choice((b"\xef\xbb\xbf" + text, text.decode(errors="replace").encode("utf-16"), text + b"\0"))
    if how == "other":
        return draw.choice((b"", b"null", b"[]", b"0", b'"x"', b"\xff\xfe", b"[" * 100_000, b"{}"))
    return text[:at] if how == "cut" else flip_bytes(draw, text)


def mutate_toml(draw: Draw, text: bytes) -> bytes:
    """TOML with a line changed, or damaged."""
    lines = text.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    key = lines[at].split(b"=")[0].strip() or b"x"
    value = draw.choice((b"0x10", b"1_000", b"1e3", b"inf", b"nan", b"-0", b"2026-01-01", b"07:32:00", b"\'\'", b"true",
                         b"[[1], 'a']", b"{a = {b = 1}}", b"[" * 50_000, b"9" * 5000, b'"\\u0000"', b'"\\ud800"', b"",
                         b"18446744073709551616", b'"""a\nb"""'))  # fmt: skip
    new = draw.choice((
        [lines[at], lines[at]], [], [key + b" = " + value + b"\n"], [key + b" = " + value + b"\n"],
        [lines[at].replace(b" = ", b"." + key + b" = ")], [b"[" + key + b"]\n", lines[at]], [b"[[run]]\n", lines[at]],
        [b"# \x00\n", lines[at]], [lines[at].rstrip(b"\n"), b"\r"], [b"[dataset]\n", lines[at]],
    ))  # fmt: skip
    changed = b"".join([*lines[:at], *new, *lines[at + 1 :]])
    return draw.choice((changed, changed, changed, flip_bytes(draw, text), b"\xef\xbb\xbf" + changed))


def flip_bytes(draw: Draw, content: bytes) -> bytes:
    """One to six bytes changed, anywhere; or a piece taken out, or doubled."""
    changed = bytearray(content)
    if not changed:
        return content
    at = draw.randrange(len(changed))
    how = draw.random()
    if how < 0.7:
        for _ in range(draw.randint(1, 6)):
            changed[draw.randrange(len(changed))] ^= draw.randint(1, 255)
    elif how < 0.85:
        del changed[at : at + draw.randint(1, 40)]
    else:
        changed[at:at] = changed[at : at + draw.randint(1, 40)]
    return bytes(changed)


def mutate_parquet(draw: Draw, content: bytes) -> bytes:
    """A Parquet file with a cell, a column, its rows, its form or its bytes changed."""
    how = draw.random()
    if how < 0.2:
        return flip_bytes(draw, content)
    table = pq.read_table(io.BytesIO(content))
    if how < 0.4:
        return _encoded(draw, table)
    return parquet_of(draw.choice((_cell, _cell, _cell, _column, _columns, _rows))(draw, table))


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    """A table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _encoded(draw: Draw, table: pa.Table) -> bytes:
    """The same rows in another form."""
    options: dict[str, Any] = draw.choice((
        {"compression": "none"}, {"compression": "gzip"}, {"compression": "snappy"}, {"use_dictionary": False},
        {"row_group_size": 1}, {"row_group_size": 2}, {"write_statistics": False}, {"data_page_version": "2.0"},
        {"data_page_size": 8}, {"store_schema": False}, {"version": "1.0"}, {"write_page_index": True},
        {"use_dictionary": False, "use_byte_stream_split": ["attribution"]}, {"write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": {"sample": "DELTA_BINARY_PACKED"}},
    ))  # fmt: skip
    if "attribution" in str(options) and "attribution" not in table.column_names:
        options = {}
    return parquet_of(table, **options)


def _cell(draw: Draw, table: pa.Table) -> pa.Table:
    at = draw.randrange(table.num_columns)
    values, kind = table.column(at).to_pylist(), table.schema.types[at]
    if not values:
        return table
    values[draw.randrange(len(values))] = _value(draw, kind)
    if pa.types.is_string(kind) and draw.random() < 0.2:
        return table.set_column(at, table.field(at), _not_utf8(len(values)))
    return table.set_column(at, table.field(at), pa.array(values, kind))


def _value(draw: Draw, kind: pa.DataType) -> Any:
    if pa.types.is_string(kind):
        return draw.choice((None, *(text for text in TEXTS if text.isprintable() or text.isascii())))
    if pa.types.is_list(kind):
        few = [draw.choice(FLOATS) for _ in range(draw.choice((0, 1, 2, 3, 1000)))]
        return draw.choice((None, few, few))
    if pa.types.is_boolean(kind):
        return draw.choice((True, False, None))
    return draw.choice(FLOATS if pa.types.is_floating(kind) else WHOLE)


def _not_utf8(count: int) -> pa.Array:
    ends = pa.py_buffer(np.arange(0, 2 * count + 1, 2, dtype=np.int32).tobytes())
    return pa.Array.from_buffers(pa.string(), count, [None, ends, pa.py_buffer(b"\xff\xfe" * count)])


def _column(draw: Draw, table: pa.Table) -> pa.Table:
    """One column all null, constant, or of another type."""
    at = draw.randrange(table.num_columns)
    field, values = table.field(at), table.column(at)
    how = draw.random()
    if how < 0.3:
        return table.set_column(at, field, pa.nulls(table.num_rows, field.type))
    if how < 0.6:
        return table.set_column(at, field, pa.array([_value(draw, field.type)] * table.num_rows, field.type))
    kinds = [pa.int64(), pa.int8(), pa.float64(), pa.large_string(), pa.binary(), pa.list_(pa.string()), pa.bool_(),
             pa.dictionary(pa.int32(), pa.string()), pa.struct([("a", pa.int32())]), pa.timestamp("ns")]  # fmt: skip
    kind = draw.choice(kinds)
    try:
        made = values.cast(kind)
    except (pa.ArrowException, NotImplementedError):
        made = pa.nulls(table.num_rows, kind)
    return table.set_column(at, pa.field(field.name, kind), made)


def _columns(draw: Draw, table: pa.Table) -> pa.Table:
    """Columns missing, more, renamed, in another order."""
    names = table.column_names
    at = draw.randrange(len(names))
    makers: tuple[Callable[[], pa.Table], ...] = (
        lambda: table.remove_column(at),
        lambda: table.append_column(draw.choice(("", "age", names[at].upper())), pa.nulls(table.num_rows, pa.int32())),
        lambda: table.append_column(names[at], table.column(at)),
        lambda: table.rename_columns([name if i != at else draw.choice(TEXTS[:5]) for i, name in enumerate(names)]),
        lambda: table.select(draw.sample(names, len(names))),
        lambda: table.select([]),
    )
    return draw.choice(makers)()


def _rows(draw: Draw, table: pa.Table) -> pa.Table:
    """Rows missing, twice, in another order, of another sample."""
    count = table.num_rows
    order = list(range(count))
    draw.shuffle(order)
    return draw.choice((
        lambda: table.slice(0, draw.randrange(count + 1)),
        lambda: table.slice(draw.randrange(count + 1)),
        lambda: pa.concat_tables([table, table]),
        lambda: table.take(pa.array(order, pa.int64())),
        lambda: table.take(pa.array([0] * count, pa.int64())),
        lambda: table.set_column(0, table.field(0), pa.array([draw.choice((0, 1, 99, -1, 2**40))] * count, pa.int64()))
        if "sample" in table.column_names
        else table,
    ))()  # fmt: skip


def json_of(value: Any) -> bytes:
    """JSON of whatever there is, NaN and halves of surrogate pairs too."""
    return json.dumps(value, indent=1).encode()
