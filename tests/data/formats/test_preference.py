"""Better and worse answers are found in every form that data files have for them."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.formats import Reading
from yrunner.data.formats.preference import has_end_by_hand, read_answers
from yrunner.errors import DataError


def said(role, content):
    return {"role": role, "content": content}


Q, GOOD, BAD = said("user", "q"), said("assistant", "good"), said("assistant", "bad")
BEFORE = [said("system", "s"), said("user", "q1"), said("assistant", "a1")]
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}
WORSE_GPT = {"from": "gpt", "value": "bad"}
SPOKEN = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q\n\nAssistant:"

SHORT = [("user", "q")]
LONG = [("user", "q1"), ("assistant", "a1"), ("user", "q")]
LONG_WITH_SYSTEM = [("system", "s"), *LONG]

PAIRS = {
    "alpaca ranking": ("alpaca", {"instruction": "q", "chosen": "good", "rejected": "bad"}, SHORT),
    "alpaca with everything": (
        "alpaca",
        {
            "instruction": "q", "input": "", "system": "s", "history": [["q1", "a1"]],
            "chosen": "good", "rejected": "bad",
        },
        LONG_WITH_SYSTEM,
    ),
    "older LLaMA-Factory": ("alpaca", {"instruction": "q", "output": ["good", "bad"]}, SHORT),
    "ranked responses": ("prompt_response", {"prompt": "q", "response": ["good", "bad"]}, SHORT),
    "sharegpt ranking": (
        "sharegpt", {"conversations": [HUMAN], "chosen": GPT, "rejected": WORSE_GPT}, SHORT
    ),
    "sharegpt with lists": (
        "sharegpt", {"conversations": [HUMAN], "chosen": [GPT], "rejected": [WORSE_GPT]}, SHORT
    ),
    "sharegpt with texts": (
        "sharegpt", {"conversations": [HUMAN], "chosen": "good", "rejected": "bad"}, SHORT
    ),
    "sharegpt with its answer": (
        "sharegpt", {"conversations": [HUMAN, GPT], "chosen": "good", "rejected": "bad"}, SHORT
    ),
    "texts": ("prompt_response", {"prompt": "q", "chosen": "good", "rejected": "bad"}, SHORT),
    "lists": ("prompt_response", {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}, SHORT),
    "lists of many turns": (
        "prompt_response", {"prompt": [*BEFORE, Q], "chosen": [GOOD], "rejected": [BAD]},
        LONG_WITH_SYSTEM,
    ),
    "one message": ("prompt_response", {"prompt": Q, "chosen": GOOD, "rejected": BAD}, SHORT),
    "implicit prompt": ("messages", {"chosen": [Q, GOOD], "rejected": [Q, BAD]}, SHORT),
    "implicit prompt of many turns": (
        "messages",
        {"chosen": [*BEFORE, Q, GOOD], "rejected": [*BEFORE, Q, BAD]},
        LONG_WITH_SYSTEM,
    ),
    "everything twice": (
        "messages",
        {
            "prompt": "q", "messages": [Q, GOOD], "chosen": [Q, GOOD], "rejected": [Q, BAD],
            "score_chosen": 8.0,
        },
        SHORT,
    ),
    "one answer without its prompt": (
        "prompt_response", {"prompt": None, "chosen": [Q, GOOD], "rejected": "bad"}, SHORT
    ),
    "spoken texts": ("text", {"chosen": SPOKEN + " good", "rejected": SPOKEN + " bad"}, LONG),
    "spoken prompt": (
        "prompt_response", {"prompt": SPOKEN, "chosen": "good", "rejected": "bad"}, LONG
    ),
    "ms-swift": ("messages", {"messages": [Q, GOOD], "rejected_response": "bad"}, SHORT),
    "ms-swift with turns": (
        "messages", {"messages": [*BEFORE, Q, GOOD], "rejected_messages": [*BEFORE, Q, BAD]},
        LONG_WITH_SYSTEM,
    ),
    "messages with texts": (
        "messages", {"messages": [Q], "chosen": "good", "rejected": "bad"}, SHORT
    ),
    "an answer and a worse one": (
        "prompt_response", {"prompt": "q", "completion": "good", "rejected": "bad"}, SHORT
    ),
    "alpaca and a worse one": (
        "alpaca", {"instruction": "q", "output": "good", "rejected_response": "bad"}, SHORT
    ),
    "question and system": (
        "question_answer",
        {"system": "s", "question": "q", "history": [["q1", "a1"]], "chosen": "good",
         "rejected": "bad"},
        LONG_WITH_SYSTEM,
    ),
    "response_j and response_k": (
        "question_answer", {"question": "q", "response_j": "good", "response_k": "bad"}, SHORT
    ),
    "OpenAI": (
        "messages",
        {"input": {"messages": [Q], "tools": []}, "preferred_output": [GOOD],
         "non_preferred_output": [BAD]},
        SHORT,
    ),
    "lists of one text": (
        "prompt_response", {"prompt": "q", "chosen": ["good"], "rejected": ["bad"]}, SHORT
    ),
    "capitals": ("prompt_response", {"Prompt": "q", "Chosen": "good", "Rejected": "bad"}, SHORT),
}  # fmt: skip

MARKED = {
    "texts": ("prompt_response", {"prompt": "q", "completion": "x"}, SHORT),
    "lists": ("prompt_response", {"prompt": [Q], "completion": [said("assistant", "x")]}, SHORT),
    "messages": ("messages", {"messages": [*BEFORE, Q, said("assistant", "x")]}, LONG_WITH_SYSTEM),
    "sharegpt": ("sharegpt", {"conversations": [HUMAN, {"from": "gpt", "value": "x"}]}, SHORT),
    "alpaca": ("alpaca", {"instruction": "q", "output": "x"}, SHORT),
    "question": ("question_answer", {"question": "q", "answer": "x"}, SHORT),
}


@pytest.fixture
def opened(write):
    """Open rows as a .jsonl file."""

    def open_rows(*rows, rated=False, **reading):
        path = write("a.jsonl", "\n".join(json.dumps(row) for row in rows))
        return read_answers(path, Reading(**reading), rated=rated)

    return open_rows


def talks_of(file):
    """The turns of each answer of each row, or the reason of a refused one."""
    return [
        row.reason
        if isinstance(row, Refusal)
        else [[(it.role, it.content) for it in talk.messages] for talk in row]
        for row in file.rows
    ]


def pair_after(prompt):
    return [[*prompt, ("assistant", "good")], [*prompt, ("assistant", "bad")]]


def learned(talk):
    return [it.content for it in talk.messages if it.role == "assistant" and it.learned]


@pytest.mark.parametrize(("format_name", "row", "prompt"), PAIRS.values(), ids=PAIRS)
def test_a_pair_is_found_in_every_form(format_name, row, prompt, opened):
    for reading in ({}, {"format": format_name}):
        file = opened(row, **reading)
        assert file.format == format_name
        (answers,) = file.rows
        assert [talk.is_desirable for talk in answers] == [True, False]
        assert [learned(talk) for talk in answers] == [["good"], ["bad"]]
        found = [[(it.role, it.content.strip()) for it in talk.messages] for talk in answers]
        assert found == pair_after(prompt)


@pytest.mark.parametrize(("format_name", "row", "prompt"), PAIRS.values(), ids=PAIRS)
def test_a_file_of_pairs_gives_kto_two_rated_rows_each(format_name, row, prompt, opened):
    file = opened(row, row, rated=True)
    for answers in file.rows:
        assert [(talk.is_desirable, learned(talk)) for talk in answers] == [
            (True, ["good"]),
            (False, ["bad"]),
        ]


@pytest.mark.parametrize("mark", ["label", "kto_tag", "Label"])
@pytest.mark.parametrize(
    ("good", "bad"),
    [(True, False), (1, 0), ("true", "False"), (1, -1), (1.0, 0.0), ("Good", "bad"), ("yes", "no")],
)
@pytest.mark.parametrize(("format_name", "row", "prompt"), MARKED.values(), ids=MARKED)
def test_a_mark_is_found_beside_every_answer(format_name, row, prompt, good, bad, mark, opened):
    file = opened(row | {mark: good}, row | {mark: bad}, rated=True)
    assert (file.format, file.unread) == (format_name, ())
    rows = list(file.rows)
    assert [talk.is_desirable for (talk,) in rows] == [True, False]
    for (talk,) in rows:
        assert [(it.role, it.content) for it in talk.messages] == [*prompt, ("assistant", "x")]
        assert learned(talk) == ["x"]


def as_csv(rows, delimiter=","):
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def as_parquet(rows):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_arrow(rows):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


TEXT_ROWS = [{"prompt": "q", "chosen": "good", "rejected": "bad"}] * 2
TURN_ROWS = [{"chosen": [*BEFORE, Q, GOOD], "rejected": [*BEFORE, Q, BAD]}] * 2
WRITERS = {
    "a.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "b.json": lambda rows: json.dumps({"data": rows}).encode(),
    "a.jsonl.gz": lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "a.csv": as_csv,
    "b.csv": lambda rows: as_csv(rows, ";"),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("rows", "prompt"), [(TEXT_ROWS, SHORT), (TURN_ROWS, LONG_WITH_SYSTEM)])
def test_pairs_are_read_from_every_kind_of_file(name, rows, prompt, write):
    if "sv" in name:
        # A cell of a table holds turns as JSON.
        rows = [
            {key: it if isinstance(it, str) else json.dumps(it) for key, it in row.items()}
            for row in rows
        ]
    file = read_answers(write(name, WRITERS[name](rows)), Reading())
    assert talks_of(file) == [pair_after(prompt)] * 2


def test_columns_of_the_recipe_name_the_answers(opened):
    row = {"ask": "q", "better": "good", "worse": "bad", "id": 1}
    columns = {"question": "ask", "chosen": "better", "rejected": "worse"}
    file = opened(row, columns=columns)
    assert (file.format, file.unread) == ("question_answer", ("id",))
    assert talks_of(file) == [pair_after(SHORT)]
    swapped = opened(
        {"prompt": "q", "chosen": "bad", "rejected": "good"},
        columns={"chosen": "rejected", "rejected": "chosen"},
    )
    assert talks_of(swapped) == [pair_after(SHORT)]
    marked = opened(
        {"prompt": "q", "completion": "x", "liked": "1"}, columns={"label": "liked"}, rated=True
    )
    assert [talk.is_desirable for row in marked.rows for talk in row] == [True]
    with pytest.raises(DataError, match=r'columns has "answr", but the format prompt_response has'):
        opened(*TEXT_ROWS, columns={"answr": "x"})


def test_unread_columns_are_named_an_answer_beside_a_pair_among_them(opened):
    row = {"question": "q", "answer": "5", "chosen": "good", "rejected": "bad", "margin": 2}
    assert opened(row).unread == ("answer", "margin")


TOOL_TURN = said("tool", "r")
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
TOOL_ROW = {
    "tools": [{"name": "f"}],
    "chosen": [Q, CALL, TOOL_TURN, GOOD],
    "rejected": [Q, BAD],
}


def test_an_answer_may_call_tools_before_it_ends(opened):
    (answers,) = opened(TOOL_ROW).rows
    assert [[it.learned for it in talk.messages if it.role == "assistant"] for talk in answers] == [
        [True, True],
        [True],
    ]
    assert all(talk.tools for talk in answers)
    same_call = TOOL_ROW | {"rejected": [Q, CALL, TOOL_TURN, BAD]}
    (answers,) = opened(same_call).rows
    assert [learned(talk) for talk in answers] == [["good"], ["bad"]], "the call is context"


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"rejected": "good"}, "equal_answers", "both answers are the same"),
        ({"rejected": " good\n"}, "equal_answers", "both answers are the same"),
        ({"rejected": ""}, "empty", '"rejected" is empty'),
        ({"chosen": " \n"}, "empty", '"chosen" is empty'),
        ({"chosen": None}, "empty", '"chosen" is empty'),
        ({"rejected": []}, "empty", '"rejected" is empty'),
        ({"prompt": ""}, "empty", '"prompt" is empty'),
        ({"prompt": None}, "empty", '"prompt" is empty'),
        ({"chosen": 5}, "wrong_type", '"chosen" is a number, not a list of messages'),
        ({"chosen": ["x", "y"]}, "wrong_type", '"chosen" has 2 answers; write a row for each'),
        ({"chosen": ["x", 5]}, "wrong_type", '"chosen": message 1 is text, not an object'),
        ({"chosen": [said("bot2", "x")]}, "roles", '"chosen": message 1 has role "bot2"'),
        ({"chosen": [GOOD, GOOD]}, "roles", '"chosen": message 3 (assistant) cannot follow'),
        ({"rejected": "a\ud800"}, "characters", '"rejected": message 2 (assistant): character 2'),
        ({"chosen": [GOOD | {"train": False}]}, "no_targets", "excluded, by train: false"),
        ({"chosen": [said("user", "z"), GOOD]}, "different_prompts", "with another prompt"),
        ({"image": "a.png"}, "wrong_type", 'has "image", which is not supported'),
        ({"weight": 0.5}, "wrong_type", '"weight" is not 0 or 1'),
        ({"context": "c"}, "wrong_type", 'has "context", which this format does not read'),
        ({"chosen_response": "x"}, "wrong_type", 'has both "chosen" and "chosen_response"'),
        (
            {"chosen": "[{'role': 'assistant', 'content': 'x'}]"},
            "wrong_type",
            '"chosen" holds messages that are not valid JSON',
        ),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_the_reason(change, kind, reason, opened):
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    _, refusal, _ = opened(row, row | change, row).rows
    assert isinstance(refusal, Refusal)
    assert (refusal.origin.row, refusal.kind) == (2, kind)
    assert reason in refusal.reason


@pytest.mark.parametrize(
    ("chosen", "rejected", "number"),
    [
        ([Q, GOOD], [said("user", "other"), BAD], 1),
        ([said("system", "s"), Q, GOOD], [Q, BAD], 1),
        ([Q, GOOD, Q, GOOD], [Q, BAD, Q, GOOD], 2),
        ([Q, GOOD], [Q, GOOD, Q, BAD], 3),
    ],
)
def test_answers_to_different_prompts_are_no_pair(chosen, rejected, number, opened):
    (refusal,) = opened({"chosen": chosen, "rejected": rejected}).rows
    assert refusal.kind == "different_prompts"
    assert refusal.reason.endswith(f"they differ from message {number} on")


def test_a_missing_column_is_named_as_the_recipe_names_it(opened):
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    lines = [row, {"prompt": "q", "chosen": "x"}, {"prompt": "q", "rejected": "x"}, {"prompt": "q"}]
    _, *reasons, _, _ = talks_of(opened(*lines, row, row))
    assert reasons == ['has no "rejected"', 'has no "chosen"', 'has no "rejected"']
    named = [{"prompt": "q", "w": "x", "l": "y"}, {"prompt": "q", "w": "x"}]
    columns = {"chosen": "w", "rejected": "l"}
    assert talks_of(opened(*named, columns=columns))[1] == 'has no "l"'
    nobody = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert talks_of(opened(nobody))[0].startswith('has no "prompt", and its answers do not name')


def test_lines_that_cannot_be_read_do_not_hide_the_pairs_of_a_file(write):
    lines = ["{", json.dumps({"prompt": "q", "chosen": "good", "rejected": "bad"}), "{", "["]
    first, pair, *others = talks_of(read_answers(write("a.jsonl", "\n".join(lines)), Reading()))
    assert pair == pair_after(SHORT)
    assert all("invalid JSON" in reason for reason in (first, *others))


@pytest.mark.parametrize(
    "answer",
    [
        '{"content": "x"}', '{"role": "admin", "content": "x"}', '[{"role": "admin"}]', "[]", "{}",
        '[{"role": "user", "content": "x"}', '{"value": 3}', "[{'from': 'a', 'to': 'b'}]",
    ],
)  # fmt: skip
def test_an_answer_may_be_json(answer, opened):
    ((better, _),) = talks_of(opened({"prompt": "q", "chosen": answer, "rejected": "x"}))
    assert better[-1] == ("assistant", answer)


def test_blanks_around_a_message_do_not_make_another_prompt(opened):
    spaced = said("user", " q\n")
    (answers,) = opened({"chosen": [Q, GOOD], "rejected": [spaced, BAD]}).rows
    assert [talk.messages[0].content for talk in answers] == ["q", "q"]


def test_three_ranked_answers_are_not_a_pair(opened):
    (reason,) = talks_of(opened({"instruction": "q", "output": ["a", "b", "c"]}))
    assert reason == '"output" has 3 ranked answers; keep two, the better one first'


@pytest.mark.parametrize(
    ("row", "rated", "message"),
    [
        (
            {"prompt": "q", "response": "a"},
            False,
            "row 1: has no better and worse answers; its columns are prompt, response. Map them "
            "with columns: {chosen: ..., rejected: ...}, or set train.stage to sft for single",
        ),
        (
            {"prompt": "q", "completion": "a", "label": False},
            False,
            "row 1: has no better and worse answers; its columns are completion, label, prompt. "
            'To learn from "label", set train.stage to preference and loss.kind to kto',
        ),
        (
            {"prompt": "q", "response": "a", "label": "sport"},
            True,
            'row 1: "label" is "sport", not true or false, and no worse answer; its columns are '
            "label, prompt, response. Write true or false into label",
        ),
        (
            {"prompt": "q", "response": "a"},
            True,
            "row 1: has no better and worse answers, and no mark (label or kto_tag); its columns",
        ),
        ([1, 2], False, "row 1: has no better and worse answers; its columns are none"),
    ],
)
def test_a_file_without_pairs_is_refused_with_a_row_and_a_remedy(row, rated, message, opened):
    with pytest.raises(DataError) as refused:
        opened(row, row, rated=rated)
    assert f"a.jsonl {message}" in str(refused.value)


def test_a_row_without_its_mark_is_refused(opened):
    row = {"prompt": "q", "completion": "a", "label": True}
    rows = [row, {"prompt": "q", "completion": "a"}, row | {"label": 7}, row | {"rejected": "b"}]
    _, *reasons, _, _ = talks_of(opened(*rows, row, row, rated=True))
    assert reasons == [
        'has no "label" or "kto_tag", which says whether its answer is good',
        '"label" is a number, not true or false',
        "has better and worse answers, but the other rows have marks",
    ]


def test_an_end_mark_of_any_model_is_seen_behind_an_answer(opened):
    for end in ("</s>", "<|im_end|>", "<|eot_id|> \n", "<end_of_turn>", "<｜end▁of▁sentence｜>"):
        row = {"prompt": "q", "chosen": f"good{end}", "rejected": "a <b> c"}
        assert [[has_end_by_hand(talk) for talk in it] for it in opened(row).rows] == [
            [True, False]
        ]
