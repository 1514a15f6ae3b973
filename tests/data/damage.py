"""Rows with parts taken out, swapped or replaced, and files of every kind that hold them."""

import csv
import io
import json
import random
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.conftest import ASSETS
from yrunner.data.conversation import Conversation

DAMAGES = [
    None, 0, -1.5, 10**30, float("nan"), True, "", " ", "\x00", "\ud800", "<|im_end|>", [], {},
    [[]], ["q", "a"], [["q", "a"]], {"role": "user"}, [None], b"\xff", "[[1]]", "{}", "x" * 300,
]  # fmt: skip
KEYS = ["x", "role", "from", "content", "text", "history", "weight", "thinking", "tools", "\ud800"]
ORDER = re.compile(r"s?(ua(t+a)*)+|t")
TURN = pa.struct([(key, pa.string()) for key in ("role", "content", "from", "value", "thinking")])
TYPES = {
    "history": pa.list_(pa.list_(pa.string())),
    **dict.fromkeys(("conversations", "messages"), pa.list_(TURN)),
}
"""What a parquet file can hold of a column; all others are texts."""


def sound_rows(format_name: str) -> list[dict[str, Any]]:
    lines = (ASSETS / f"{format_name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["row"] for line in lines]


def damaged(value: Any, chance: random.Random) -> Any:
    """The value with some of its parts taken out, swapped or replaced."""
    fate = chance.random()
    if fate < 0.05:
        return chance.choice(DAMAGES)
    if isinstance(value, dict):
        return {
            (chance.choice(KEYS) if fate > 0.97 else key): damaged(part, chance)
            for key, part in value.items()
            if chance.random() > 0.03
        }
    if isinstance(value, list):
        parts = [damaged(part, chance) for part in value if chance.random() > 0.03]
        return parts + parts[:1] if fate > 0.95 else parts
    if isinstance(value, str) and fate > 0.97:
        return value[:-1]
    return value


def as_json(value: Any) -> str:
    return json.dumps(value, default=repr)


def as_bytes(rows: list[Any], kind: str, format_name: str) -> bytes:
    """The rows as a file of this kind; what it cannot hold goes as text, or as nothing."""
    names = list(dict.fromkeys(key for row in sound_rows(format_name) for key in row))
    records = [[row.get(name) if isinstance(row, dict) else row for name in names] for row in rows]
    match kind:
        case ".json":
            return as_json(rows).encode()
        case ".jsonl" | ".ndjson":
            return "\n".join(map(as_json, rows)).encode()
        case ".txt":
            return "\n".join(map(as_json, rows)).encode()
        case ".parquet" | ".arrow":
            columns = {
                name: pa.array(
                    [_fitting(record[place], TYPES.get(name, pa.string())) for record in records],
                    TYPES.get(name, pa.string()),
                )
                for place, name in enumerate(names)
            }
            sink = io.BytesIO()
            if kind == ".arrow":
                with pa.ipc.new_stream(sink, pa.table(columns).schema) as stream:
                    stream.write_table(pa.table(columns))
            else:
                pq.write_table(pa.table(columns), sink)
            return sink.getvalue()
        case _:
            table = io.StringIO()
            writer = csv.writer(table, delimiter="\t" if kind == ".tsv" else ",")
            cells = [
                [_cell(value) for value in record] if isinstance(row, dict) else [as_json(row)]
                for row, record in zip(rows, records, strict=True)
            ]
            writer.writerows([names, *cells])
            return table.getvalue().encode(errors="replace")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else as_json(value)


def _fitting(value: Any, type_: pa.DataType) -> Any:
    """The value as this type of parquet can hold it; null where it cannot."""
    if pa.types.is_struct(type_):
        if not isinstance(value, dict):
            return None
        return {field.name: _fitting(value.get(field.name), field.type) for field in type_}
    if pa.types.is_list(type_):
        if not isinstance(value, list):
            return None
        return [_fitting(part, type_.value_type) for part in value]
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def check_conversation(row: Conversation) -> None:
    """What the rest of the program relies on."""
    assert ORDER.fullmatch("".join(message.role[0] for message in row.messages))
    for message in row.messages:
        message.content.encode()
        assert message.learned or message.role == "assistant"
        assert message.role == "assistant" or not message.tool_calls
        for call in message.tool_calls:
            assert isinstance(call["function"]["arguments"], dict)
    learned = [message for message in row.messages if message.role in ("assistant", "text")]
    assert any(message.learned for message in learned)
    json.dumps([row.tools, [m.tool_calls for m in row.messages]], ensure_ascii=False).encode()
