"""A column that changes what a row teaches is obeyed or refused by name, never left out quietly."""

import json

import pytest

from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.formats import FORMATS, Reading, read_conversations
from yrunner.errors import DataError

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ALPACA = {"instruction": "q", "output": "a"}
ROW_OF = {
    "alpaca": ALPACA,
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "messages": {"messages": [USER, REPLY]},
    "prompt_response": {"prompt": "q", "response": "a"},
    "question_answer": {"question": "q", "answer": "a"},
    "text": {"text": "t"},
}
CONVERSATIONS = [name for name in FORMATS if name != "text"]
BAD = (
    "marks a bad answer, which only loss.kind: kto (train.stage: preference) can use; the other "
    "stages would learn it"
)
NO_FRACTION = (
    "is not 0 or 1, and rows are learned in full or not at all; remove the column to learn every "
    "row in full"
)


@pytest.fixture
def opened(write):
    """Open rows as a .jsonl file."""

    def open_rows(rows, **reading):
        path = write("a.jsonl", "\n".join(json.dumps(row) for row in rows))
        return read_conversations(path, Reading(**reading))

    return open_rows


def outcomes(opened):
    """The reason of each refused row, None for each kept one."""
    return [row.reason if isinstance(row, Refusal) else None for row in opened.rows]


def talks(opened):
    return [[(it.role, it.content) for it in row.messages] for row in opened.rows]


@pytest.mark.parametrize("format_name", CONVERSATIONS)
@pytest.mark.parametrize("column", ["label", "kto_tag", "Label"])
@pytest.mark.parametrize(("bad", "good"), [(False, True), (0, 1), ("false", "True")])
def test_a_row_that_is_marked_as_bad_is_not_learned(format_name, column, bad, good, opened):
    rows = [ROW_OF[format_name] | {column: value} for value in (bad, good)]
    file = opened(rows)
    assert file.unread == ()
    assert outcomes(file) == [f'"{column.lower()}" {BAD}', None]


def test_a_label_that_names_a_class_is_an_unread_column(opened):
    for values in ((0, 1, 2), ("sport", "law"), ("0", "7")):
        file = opened([ALPACA | {"label": value} for value in values])
        assert file.unread == ("label",)
        assert outcomes(file) == [None] * len(values)
    texts = opened([{"text": "t", "label": 0}])
    assert (texts.unread, outcomes(texts)) == (("label",), [None])
    assert outcomes(opened([{"text": "t", "label": False}])) == [f'"label" {BAD}']


def test_a_mark_in_a_table_is_read_as_in_json(write):
    path = write("a.csv", "instruction,output,label\nq,a,False\nq,b,TRUE\nq,c,\n")
    assert outcomes(read_conversations(path)) == [f'"label" {BAD}', None, None]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("column", ["weight", "loss_weight", "sample_weight", "Weight"])
def test_a_row_is_learned_in_full_or_not_at_all(format_name, column, opened):
    rows = [ROW_OF[format_name] | {column: it} for it in (1, 0.5, 1.0, None, "1.0", "0.2", 3, 0)]
    name = column.lower()
    fraction, nothing = f'"{name}" {NO_FRACTION}', f'"{name}" is 0: the row is not to be learned'
    found = outcomes(opened(rows))
    assert found == [None, fraction, None, None, None, fraction, fraction, f"{nothing}; remove it"]


def test_a_row_may_be_switched_off_and_a_split_is_no_switch(opened):
    off = '"train" is false: the row is not to be learned; remove it'
    rows = [ALPACA | {"train": value} for value in (True, False, "validation")]
    assert outcomes(opened(rows)) == [None, off, None]


@pytest.mark.parametrize("format_name", CONVERSATIONS)
@pytest.mark.parametrize(
    "column", ["system", "system_prompt", "system_message", "System_Prompt", "systemPrompt"]
)
def test_a_system_prompt_is_read_under_every_name(format_name, column, opened):
    file = opened([ROW_OF[format_name] | {column: "Be kind."}])
    assert file.unread == ()
    assert talks(file) == [[("system", "Be kind."), ("user", "q"), ("assistant", "a")]]


def test_columns_choose_among_two_system_prompts(opened):
    rows = [ALPACA | {"system_prompt": "a", "system": "b"}]
    (reason,) = outcomes(opened(rows))
    assert reason.startswith(
        'has both "system" and "system_prompt"; to use the second, set columns'
    )
    chosen = opened(rows, columns={"system": "system_prompt"})
    assert talks(chosen)[0][0] == ("system", "a")


@pytest.mark.parametrize(
    ("row", "names", "mapping", "turns"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen rejected", "response: chosen", 2),
        (
            {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY], "margin": 0.5},
            "chosen rejected margin",
            "response: chosen",
            2,
        ),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "chosen rejected", None, 2),
        (
            {"prompt": "q", "messages": [USER, REPLY], "chosen": [USER, REPLY], "rejected": []},
            "chosen",
            "messages: chosen",
            2,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            "chosen rejected",
            "prompt: conversations, response: chosen",
            2,
        ),
        (
            {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "ranking": True},
            "chosen rejected ranking",
            "output: chosen",
            2,
        ),
        ({"question": "q", "Chosen": "a", "Rejected": "b"}, "chosen rejected", None, None),
        ({"messages": [USER, REPLY], "rejected_response": "b"}, "rejected_response", None, 2),
        ({"prompt": "q", "completion": "a", "rejected": "b"}, "rejected", None, 2),
    ],
)
def test_a_file_of_pairs_names_them_and_the_way_to_its_better_answers(
    row, names, mapping, turns, opened
):
    with pytest.raises(DataError) as refused:
        opened([row] * 2)
    message = str(refused.value)
    listed = " and ".join(f'"{name}"' for name in names.split())
    assert f"a.jsonl: has {listed}: better and worse answers, which are for preference" in message
    assert message.endswith(" for this file")
    said = message.split("columns: {")[1].split("}")[0]
    assert mapping is None or said == mapping
    if turns:
        columns = dict(part.split(": ") for part in said.split(", "))
        (talk, _) = talks(opened([row] * 2, columns=columns))
        assert talk[-1] == ("assistant", "a")
        assert len(talk) == turns


def test_ranked_answers_in_one_column_are_refused(opened):
    with pytest.raises(DataError, match='has ranked answers in "output", which are for preference'):
        opened([{"instruction": "q", "output": ["good", "bad"]}])


def test_pairs_of_texts_can_be_read_as_texts(opened):
    rows = [{"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}]
    with pytest.raises(DataError, match=r"as plain text .*set columns: \{text: chosen\}"):
        opened(rows)
    assert talks(opened(rows, columns={"text": "chosen"})) == [[("text", "Human: q Assistant: a")]]


def test_a_single_pair_among_other_rows_is_a_refused_row(opened):
    rows = [ALPACA, ALPACA | {"rejected": "b"}, ALPACA]
    (_, reason, _) = outcomes(opened(rows))
    assert reason == (
        'has "rejected": better and worse answers, which are for preference training '
        "(train.stage: preference)"
    )


@pytest.mark.parametrize("column", ["image", "images", "video", "audios", "Image"])
def test_a_row_with_more_than_text_is_refused(column, opened):
    reason = f'has "{column.lower()}", which is not supported'
    for row in ROW_OF.values():
        assert outcomes(opened([row | {column: ["a.png"]}])) == [reason]
        assert outcomes(opened([row | {column: []}])) == [None]


@pytest.mark.parametrize(
    ("row", "column", "columns", "question"),
    [
        (
            {"question": "q", "context": "c", "answer": "a"},
            "context",
            {"instruction": "question", "input": "context", "output": "answer"},
            "q\nc",
        ),
        (
            {"prompt": "q", "input": "c", "completion": "a"},
            "input",
            {"instruction": "prompt", "input": "input", "output": "completion"},
            "q\nc",
        ),
        (
            {"instruction": "q", "passage": "c", "output": "a"},
            "passage",
            {"instruction": "instruction", "input": "passage", "output": "output"},
            "q\nc",
        ),
    ],
)
def test_what_a_question_needs_is_read_or_left_out_by_choice(
    row, column, columns, question, opened
):
    (reason,) = outcomes(opened([row]))
    mapping = ", ".join(f"{name}: {there}" for name, there in columns.items())
    asking = next(iter(row))
    assert reason == (
        f'has "{column}", which this format does not read; to read it, set columns: {{{mapping}}}; '
        f"to leave it out, set columns: {{{asking}: {asking}}}"
    )
    assert talks(opened([row], columns=columns))[0][0] == ("user", question)
    assert talks(opened([row], columns={asking: asking}))[0][0] == ("user", "q")


def test_a_history_beside_messages_is_not_lost(opened):
    (reason,) = outcomes(opened([{"messages": [USER, REPLY], "history": [["x", "y"]]}]))
    assert reason.startswith('has "history", which this format does not read; to leave it out, set')


def test_harmless_columns_are_named_and_nothing_else(opened):
    row = ALPACA | {"id": 1, "source": "web", "score": 0.3, "rating": 4, "category": "x"}
    file = opened([row])
    assert file.unread == ("category", "id", "rating", "score", "source")
    assert outcomes(file) == [None]


@pytest.mark.parametrize(
    "header", ["Instruction,Output", " instruction , output", "INSTRUCTION,OUTPUT"]
)
def test_a_header_may_be_written_in_capitals_and_with_blanks(header, write):
    path = write("a.csv", f"{header}\nq,a\n")
    file = read_conversations(path)
    assert (file.format, file.unread) == ("alpaca", ())
    assert talks(file) == [[("user", "q"), ("assistant", "a")]]


def test_columns_of_the_recipe_name_a_column_as_the_file_does(opened):
    rows = [{"Question": "q", "Answer": "bad", "Better": "good"}]
    chosen = opened(rows, columns={"answer": "Better"})
    assert talks(chosen) == [[("user", "q"), ("assistant", "good")]]


def test_a_bare_list_of_turns_is_a_row_of_messages(write):
    path = write("a.jsonl", f"{json.dumps([USER, REPLY])}\n{json.dumps([USER, REPLY])}\n")
    file = read_conversations(path)
    assert file.format == "messages"
    assert [row.origin.row for row in file.rows] == [1, 2]
