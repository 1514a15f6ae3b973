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


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(*contents: str) -> list[dict[str, str]]:
    return [_said(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def _shared(*contents: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": it} for n, it in enumerate(contents)]


def _spoken(*contents: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {it}" for n, it in enumerate(contents))


PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpaca_ranking": (
        "alpaca",
        {"instruction": "谁管灯塔?", "input": "now", "system": "s", "history": [["a", "b"]],
         "chosen": "市政厅。", "rejected": "nobody"},
    ),
    "ranked_output": ("alpaca", {"instruction": "Who?", "input": "", "output": ["me", "you"]}),
    "sharegpt_ranking": (
        "sharegpt",
        {"conversations": _shared("a", "b", "Who?"), "chosen": {"from": "gpt", "value": "me"},
         "rejected": {"from": "gpt", "value": "you"}},
    ),
    "texts": ("prompt_response", {"prompt": "Who?", "chosen": "me", "rejected": "you"}),
    "lists": (
        "prompt_response",
        {"prompt": _turns("a", "b", "Who?"), "chosen": [_said("assistant", "me")],
         "rejected": [_said("assistant", "you")]},
    ),
    "implicit": (
        "messages", {"chosen": _turns("a", "b", "c", "d"), "rejected": _turns("a", "b", "c", "e")}
    ),
    "spoken": (
        "text",
        {"chosen": _spoken("a", "b", "c", "d"), "rejected": _spoken("a", "b", "c", "e")},
    ),
    "rejected_response": (
        "messages", {"messages": _turns("a", "b", "c", "d"), "rejected_response": "e"}
    ),
    "rejected_messages": (
        "messages", {"messages": _turns("a", "b"), "rejected_messages": _turns("a", "c")}
    ),
    "question": (
        "question_answer", {"system": "s", "question": "Who?", "chosen": "me", "rejected": "you"}
    ),
    "openai": (
        "messages",
        {"input": {"messages": _turns("Who?")}, "preferred_output": [_said("assistant", "me")],
         "non_preferred_output": [_said("assistant", "you")]},
    ),
    "kto_texts": ("prompt_response", {"prompt": "Who?", "completion": "me", "label": "true"}),
    "kto_messages": ("messages", {"messages": _turns("a", "b", "c", "d"), "kto_tag": "false"}),
    "kto_alpaca": ("alpaca", {"instruction": "Who?", "output": "me", "label": "0"}),
}  # fmt: skip
"""Rows of better and worse answers: their format, and one row."""
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_text": ("prompt_response", {"prompt": "1 加 1?", "answer": "2"}),
    "prompt_turns": ("prompt_response", {"prompt": _turns("a", "b", "1 + 1?"), "answer": "2"}),
    "prompt_and_completion": (
        "prompt_response", {"prompt": _turns("1 + 1?"), "completion": [_said("assistant", "2")]}
    ),
    "prompt_question": ("question_answer", {"question": "1 + 1?", "answer": "1 + 1 = 2 #### 2"}),
    "prompt_query": ("question_answer", {"query": "1 + 1?", "response": "2", "system": "s"}),
    "prompt_alpaca": (
        "alpaca",
        {"instruction": "add", "input": "1 and 1", "history": [["a", "b"]], "output": "2"},
    ),
    "prompt_messages": ("messages", {"messages": _turns("a", "b", "1 + 1?"), "answer": "2"}),
    "prompt_replied": ("messages", {"messages": _turns("a", "b", "1 + 1?", "2")}),
    "prompt_sharegpt": ("sharegpt", {"conversations": _shared("1 + 1?", "2")}),
}  # fmt: skip
"""Rows of prompts, whose answer is 2: their format, and one row."""
ROWS_OF = PAIRS | PROMPTS
NOT_IN_TABLES = ("prompt_alpaca", "alpaca_ranking", "ranked_output", "openai")
"""Cells of csv and tsv files hold turns as JSON, but no other lists and objects."""


def sound_rows(format_name: str) -> list[dict[str, Any]]:
    if format_name in ROWS_OF:
        return [ROWS_OF[format_name][1]]
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
                name: pa.array([_fitting(record[place], type_) for record in records], type_)
                for place, (name, type_) in enumerate(_types(names, format_name).items())
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


def _types(names: list[str], format_name: str) -> dict[str, pa.DataType]:
    if format_name not in ROWS_OF:
        return {name: TYPES.get(name, pa.string()) for name in names}
    return {name: _type_of(value) for name, value in ROWS_OF[format_name][1].items()}


def _type_of(value: Any) -> pa.DataType:
    if isinstance(value, list):
        return pa.list_(_type_of(value[0]))
    if isinstance(value, dict):
        is_turn = value.keys() & {"role", "from"}
        own = pa.struct([(key, _type_of(part)) for key, part in value.items()])
        return TURN if is_turn else own
    return pa.string()


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


def check_answers(row: tuple[Conversation, ...]) -> None:
    """What the rest of the program relies on: sound conversations with one prompt."""
    for talk in row:
        check_conversation(talk)
        asked = [number for number, it in enumerate(talk.messages, start=1) if it.role == "user"]
        replies = [it for it in talk.messages[asked[-1] :] if it.role == "assistant"]
        assert any(it.learned for it in replies)
        earlier = [it for it in talk.messages[: asked[-1]] if it.role == "assistant"]
        assert not any(it.learned for it in earlier)
    if len(row) == 1:
        assert row[0].is_desirable is not None
        return
    assert [talk.is_desirable for talk in row] == [True, False]
    prompts = [
        [it.content.strip() for it in talk.messages if it.role in ("user", "system")]
        for talk in row
    ]
    assert prompts[0] == prompts[1]
    assert row[0].messages != row[1].messages


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
