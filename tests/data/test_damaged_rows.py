"""Whatever a file holds: each row is kept or refused, and nothing unexpected is raised."""

import csv
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yrunner.data.pipeline import Rules, Source, prepare, read_conversations
from yrunner.data.report import as_json
from yrunner.errors import DataError

DAMAGES = [
    None, 0, -1.5, 10**30, float("nan"), True, "", " ", "\x00", "\ud800", "<|im_end|>", [], {},
    [[]], ["q", "a"], [["q", "a"]], {"role": "user"}, [None], b"\xff", "[[1]]", "x" * 300,
]  # fmt: skip
ROWS = [
    {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "system": "s"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"text": "第一条"},
]


def damaged(value, chance):
    """The value with some of its parts taken out, swapped or replaced."""
    if chance.random() < 0.15:
        return chance.choice(DAMAGES)
    if isinstance(value, dict):
        keys = [key for key in value if chance.random() > 0.1]
        names = {key: chance.choice(["x", "role", "\ud800"]) for key in keys}
        return {
            (names[key] if chance.random() < 0.05 else key): damaged(value[key], chance)
            for key in keys
        }
    if isinstance(value, list):
        parts = [damaged(part, chance) for part in value if chance.random() > 0.1]
        return parts + parts[:1] if chance.random() < 0.1 else parts
    return value


def as_bytes(rows, kind, folder):
    """The rows as a file of this kind; values that it cannot hold go as text."""
    match kind:
        case "json":
            return json.dumps(rows, default=repr).encode()
        case "jsonl":
            return "\n".join(json.dumps(row, default=repr) for row in rows).encode()
        case "txt":
            return "\n".join(map(str, rows)).encode(errors="replace")
        case "csv":
            table = io.StringIO()
            names = list(ROWS[0])
            records = [row.values() if isinstance(row, dict) else [row] for row in rows]
            csv.writer(table).writerows([names, *records])
            return table.getvalue().encode(errors="replace")
        case _:
            columns = {key: [] for key in ("instruction", "output", "text", "messages")}
            for row in rows:
                for key, column in columns.items():
                    value = row.get(key) if isinstance(row, dict) else row
                    column.append(value if key == "messages" else ascii(value))
            columns["messages"] = [
                [ascii(turn) for turn in turns] if isinstance(turns, list) else None
                for turns in columns["messages"]
            ]
            pq.write_table(pa.table(columns), folder / "rows.parquet")
            return (folder / "rows.parquet").read_bytes()


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt", "parquet"])
@pytest.mark.parametrize("format_name", ["alpaca", "messages", "text"])
def test_of_2000_damaged_rows_each_is_kept_or_refused(kind, format_name, tmp_path, tokenizer):
    """And of as many damaged files each is read or refused: nothing else is ever raised."""
    chance = random.Random(f"{kind} {format_name}")
    num_read = num_kept = 0
    sound = next(row for row in ROWS if format_name in (*row, "alpaca"))
    for number in range(10):
        rows = [damaged(sound, chance) for _ in range(200)]
        content = bytearray(as_bytes(rows, kind, tmp_path))
        for _ in range(number % 3):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path = tmp_path / f"a.{kind}"
        path.write_bytes(content)
        source = Source(path, format=format_name)
        try:
            prepared = prepare([source], tokenizer, Rules(64, invalid="drop", too_long="cut"))
        except DataError as error:
            assert str(path) in str(error)
            continue
        (report,) = prepared.reports
        assert report.rows == report.kept + len(report.refusals) == len(read_all(source))
        assert len(prepared.train) == report.kept
        num_read += report.rows
        num_kept += report.kept
        json.dumps(as_json([report]), ensure_ascii=False).encode()
    assert num_read > 300
    assert num_kept > 20 or kind in ("csv", "txt", "parquet")


def read_all(source):
    return list(read_conversations(source)[1])
