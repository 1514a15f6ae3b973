"""Whatever a file holds: each row is kept or refused, and nothing unexpected is raised."""

import json
import random
from dataclasses import replace
from typing import get_args

import pytest

from tests.data.damage import (
    NOT_IN_TABLES,
    PAIRS,
    PROMPTS,
    as_bytes,
    check_answers,
    check_conversation,
    damaged,
    sound_rows,
)
from yrunner.data.chat.tokenize import tokenize_conversations
from yrunner.data.conversation import Conversation, FaultKind, FaultyRow, Message
from yrunner.data.dataset.row_report import Refusal
from yrunner.data.formats.columns import Need
from yrunner.data.formats.formats import FORMATS, Reading, known_columns, read_conversations
from yrunner.data.formats.preference import read_answers
from yrunner.data.formats.prompts import read_prompts
from yrunner.data.numbers import last_number
from yrunner.data.readers.files import READERS
from yrunner.errors import DataError

NUM_ROWS = 10_000


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_of_10000_damaged_rows_each_is_kept_or_refused_with_its_place(kind, format_name, tmp_path):
    chance = random.Random(f"{kind} {format_name}")
    sound = sound_rows(format_name)
    rows = [damaged(sound[number % len(sound)], chance) for number in range(NUM_ROWS)]
    path = tmp_path / f"rows{kind}"
    path.write_bytes(as_bytes(rows, kind, format_name))
    results = read_conversations(path, Reading(format=format_name)).rows
    fates = list(results)
    assert [fate.origin.file for fate in fates] == [path] * NUM_ROWS
    assert [fate.origin.row for fate in fates] == list(range(1, NUM_ROWS + 1))
    for fate in fates:
        if isinstance(fate, Refusal):
            assert fate.kind in get_args(FaultKind)
            assert fate.reason.isprintable(), fate.reason
        else:
            check_conversation(fate)
    kept = sum(isinstance(fate, Conversation) for fate in fates)
    assert kept < NUM_ROWS or kind == ".txt"
    assert kept > NUM_ROWS / 10 or not can_hold(kind, format_name)


def can_hold(kind: str, format_name: str) -> bool:
    """Whether files of this kind can hold rows of this format as they are."""
    if kind == ".txt":
        return format_name == "text"
    return kind not in (".csv", ".tsv") or format_name not in ("sharegpt", "messages")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_of_damaged_files_each_is_read_or_refused_with_its_name(kind, format_name, tmp_path):
    chance = random.Random(f"{kind} {format_name}")
    whole = as_bytes(sound_rows(format_name) * 5, kind, format_name)
    path = tmp_path / f"rows{kind}"
    for number in range(40):
        content = bytearray(whole)
        for _ in range(1 + number % 4):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.randrange(len(content))] if number % 4 == 3 else content)
        columns = {chance.choice(known_columns(format_name)): "x"} if number % 5 == 4 else {}
        try:
            results = read_conversations(path, Reading(columns=columns)).rows
            for fate in results:
                assert isinstance(fate, Refusal | Conversation)
        except DataError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_is_kept_of_damaged_rows_is_tokenized_or_refused(format_name, tmp_path, tokenizer):
    chance = random.Random(format_name)
    path = tmp_path / "rows.jsonl"
    rows = [damaged(row, chance) for row in sound_rows(format_name) * 40]
    path.write_bytes(as_bytes(rows, ".jsonl", format_name))
    results = read_conversations(path, Reading(format=format_name)).rows
    kept = [row for row in results if isinstance(row, Conversation)]
    examples = tokenize_conversations(kept, tokenizer)
    assert len(examples) == len(kept) > 20
    for row, example in zip(kept, examples, strict=True):
        assert isinstance(example, FaultyRow) or example.origin == row.origin


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (kind, shape)
        for kind in READERS
        for shape in PAIRS
        if kind != ".txt" and not (kind in (".csv", ".tsv") and shape in NOT_IN_TABLES)
    ],
)
def test_of_500_damaged_pairs_each_is_kept_or_refused_with_its_place(kind, shape, tmp_path):
    chance = random.Random(f"{kind} {shape}")
    format_name, row = PAIRS[shape]
    path = tmp_path / f"rows{kind}"
    path.write_bytes(as_bytes([damaged(row, chance) for _ in range(500)], kind, shape))
    for reading in (Reading(format=format_name), Reading()):
        opened = read_answers(path, reading, rated=shape.startswith("kto"))
        assert opened.format == format_name
        fates = list(opened.rows)
        kept = [fate for fate in fates if not isinstance(fate, Refusal)]
        origins = [fate.origin if isinstance(fate, Refusal) else fate[0].origin for fate in fates]
        assert [(origin.file, origin.row) for origin in origins] == [
            (path, number) for number in range(1, 501)
        ]
        for fate in fates:
            if isinstance(fate, Refusal):
                assert fate.kind in get_args(FaultKind)
                assert fate.reason.isprintable(), fate.reason
            else:
                check_answers(fate)
        assert 10 < len(kept) < 500


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (kind, shape)
        for kind in READERS
        for shape in PROMPTS
        if kind != ".txt" and not (kind in (".csv", ".tsv") and shape in NOT_IN_TABLES)
    ],
)
def test_of_500_damaged_prompts_each_is_kept_or_refused_with_its_place(kind, shape, tmp_path):
    chance = random.Random(f"{kind} {shape}")
    format_name, row = PROMPTS[shape]
    path = tmp_path / f"rows{kind}"
    path.write_bytes(as_bytes([damaged(row, chance) for _ in range(500)], kind, shape))
    needs = [Need("answer", "exact", "texts"), Need("answer", "number", "number")]
    for reading in (Reading(format=format_name), Reading()):
        opened = read_prompts(path, reading, needs)
        assert opened.format == format_name
        fates = list(opened.rows)
        kept = [fate for fate in fates if not isinstance(fate, Refusal)]
        origins = [fate.origin if isinstance(fate, Refusal) else fate[0].origin for fate in fates]
        assert [(origin.file, origin.row) for origin in origins] == [
            (path, number) for number in range(1, 501)
        ]
        for fate in fates:
            if isinstance(fate, Refusal):
                assert fate.kind in get_args(FaultKind)
                assert fate.reason.isprintable(), fate.reason
            else:
                (prompt,) = fate
                reply = Message("assistant", "2")
                check_conversation(replace(prompt, messages=(*prompt.messages, reply)))
                assert prompt.messages[-1].content.strip()
                json.dumps(prompt.columns, default=str)
        assert 10 < len(kept) < 500
        answers = [last_number(fate[0].columns["answer"]) for fate in kept]
        assert answers.count(2) * 2 > len(answers) and None not in answers
