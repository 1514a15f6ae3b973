"""No row disappears: each is kept, or counted with file, row and reason."""

import json
from pathlib import Path

import pytest

from tests.data.conftest import decoded_targets, tokenizer_of
from yrunner.data.conversation import Conversation
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, prepare
from yrunner.data.dataset.row_report import as_json
from yrunner.data.formats.formats import Reading, read_conversations
from yrunner.errors import DataError, ModelError, YRunnerError

RULES = Rules(max_length=64)
GOOD = {"instruction": "q", "output": "a"}
EXPECTED_NAME = "Expecting property name enclosed in double quotes"


def jsonl(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def prepare_all(sources, tokenizer, rules=RULES, **options):
    cache = Cache(sources[0].files[0].parent / ".prepared")
    return prepare(sources, tokenizer, rules, cache, **options)


def prepare_file(path, tokenizer, **rules):
    return prepare_all([Source((path,))], tokenizer, Rules(**{"max_length": 64, **rules}))


def check(prepared, too_long="refuse", invalid="refuse"):
    prepared.check(too_long=too_long, invalid=invalid)


def check_message(prepared, path, **policy):
    with pytest.raises(YRunnerError) as refused:
        check(prepared, **policy)
    return str(refused.value).replace(f"{path.parent}/", "")


def test_no_row_disappears_each_is_kept_or_refused_with_its_place(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, "{", {**GOOD, "output": ""}, "", GOOD, [1]))
    prepared = prepare_file(path, tokenizer)
    (report,) = prepared.reports
    assert (report.rows, report.kept, report.format, report.cut) == (5, 2, "alpaca", 0)
    assert [(it.origin.row, it.kind, it.reason) for it in report.refusals] == [
        (
            2,
            "unreadable",
            "invalid JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        (3, "empty", '"output" is empty, so there is nothing to train on'),
        (6, "not_an_object", "is a list, not an object with named fields"),
    ]
    assert [example.origin.row for example in prepared.train] == [1, 5]
    assert report.targets == 2 * len(tokenizer("a<|im_end|>")["input_ids"])
    assert report.tokens == sum(len(example.input_ids) for example in prepared.train)


def test_what_the_user_reads_of_faulty_rows_says_where_what_and_what_to_do(write, tokenizer):
    rows = [GOOD, "{", GOOD, {**GOOD, "output": ""}, {**GOOD, "output": ""}]
    path = write("a.jsonl", jsonl(*rows))
    assert check_message(prepare_file(path, tokenizer), path) == (
        "a.jsonl row 2: invalid JSON: Expecting property name enclosed in double quotes at "
        "column 2\n"
        'a.jsonl row 4: "output" is empty, so there is nothing to train on (and 1 row like it)\n'
        "3 rows cannot be used (empty: 2, unreadable: 1). Fix the rows, or drop them "
        "with data.invalid: drop"
    )


def test_of_many_reasons_the_first_are_shown_and_the_rest_is_counted(write, tokenizer):
    rows = [{"messages": [{"role": f"bot{number}", "content": ""}]} for number in range(30)]
    path = write("a.jsonl", jsonl(*rows))
    lines = check_message(prepare_file(path, tokenizer), path).splitlines()
    assert len(lines) == 12
    assert lines[10] == "... and 20 rows more"
    assert lines[11].startswith("30 rows cannot be used (roles out of order: 30). Fix")


def test_long_rows_are_refused_by_default(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "output": "7" * 100}))
    prepared = prepare_file(path, tokenizer)
    (refusal,) = prepared.reports[0].refusals
    length = int(refusal.reason.split()[1])
    assert length > 100
    assert check_message(prepared, path) == (
        f"a.jsonl row 2: has {length} tokens; data.max_length is 64\n"
        "1 row cannot be used (too long: 1). Raise data.max_length, or drop long rows "
        "with data.too_long: drop, or truncate them with data.too_long: cut"
    )


def test_a_row_of_exactly_the_longest_length_is_kept(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD))
    length = prepare_file(path, tokenizer).reports[0].tokens
    assert prepare_file(path, tokenizer, max_length=length).reports[0].kept == 1
    assert prepare_file(path, tokenizer, max_length=length - 1).reports[0].kept == 0


def test_long_rows_can_be_dropped_and_are_counted(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "output": "7" * 100}))
    prepared = prepare_file(path, tokenizer, too_long="drop")
    check(prepared, too_long="drop")
    assert prepared.reports[0].refused_by_kind == {"too_long": 1}
    assert len(prepared.train) == 1


def test_long_rows_can_be_cut_and_are_counted(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "output": "7" * 100}))
    prepared = prepare_file(path, tokenizer, too_long="cut")
    check(prepared, too_long="cut")
    assert (prepared.reports[0].kept, prepared.reports[0].cut) == (2, 1)
    assert len(prepared.train[1].input_ids) == 64
    assert set(decoded_targets(prepared.train[1], tokenizer)) == {"7"}


def test_a_row_that_has_nothing_to_learn_once_it_is_cut_is_refused(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "instruction": "7" * 100}))
    prepared = prepare_file(path, tokenizer, too_long="cut")
    (refusal,) = prepared.reports[0].refusals
    assert refusal.kind == "no_targets"
    assert refusal.reason.startswith("has no targets in the first 64 of its 1")
    assert refusal.reason.endswith("12 tokens")
    assert prepared.reports[0].cut == 0


@pytest.mark.parametrize("name", ["\ud800", "a\x00b", "a\nb", "x" * 1000])
def test_an_unread_column_may_have_any_name(name, write, tokenizer):
    prepared = prepare_file(write("a.jsonl", jsonl(GOOD | {name: 1})), tokenizer)
    (unread,) = prepared.reports[0].unread
    assert unread.isprintable()
    assert len(unread) < 50
    assert prepared.reports[0].kept == 1


def test_texts_are_refused_under_sft(write, tokenizer):
    path = write("a.txt", "one\ntwo\n")
    assert prepare_file(path, tokenizer).reports[0].kept == 2
    with pytest.raises(DataError, match=r"plain texts.*sft.*\. Set train\.stage to cpt"):
        prepare_file(path, tokenizer, texts_allowed=False)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt"])
def test_a_file_without_rows_is_refused(kind, write, tokenizer):
    with pytest.raises(DataError, match=r"has no rows\. Remove it from the recipe"):
        prepare_file(write(f"a.{kind}", "\n"), tokenizer)


def test_a_file_of_which_no_line_can_be_read_shows_the_first(write, tokenizer):
    path = write("a.jsonl", "question: a\nanswer: b\n")
    with pytest.raises(
        DataError, match=r"a\.jsonl row 1: invalid JSON: Expecting value at column 1"
    ):
        prepare_file(path, tokenizer)


def test_an_unknown_format_says_how_to_name_the_columns(write, tokenizer):
    with pytest.raises(DataError) as refused:
        prepare_file(write("a.jsonl", jsonl({"question": "q", "reply": "a"})), tokenizer)
    assert str(refused.value).endswith(
        "a.jsonl: matches no known format; its columns are question, reply. Set its format "
        "in the recipe, or map its columns, for example "
        "columns: {instruction: question, output: answer}"
    )


def test_a_misspelt_name_in_columns_is_refused(write, tokenizer):
    reading = Reading(columns={"sytem": "persona"})
    with pytest.raises(DataError) as refused:
        prepare_all([Source((write("a.jsonl", jsonl(GOOD)),), reading=reading)], tokenizer)
    assert (
        'columns has "sytem", but the format alpaca has instruction, output, input, history, system'
    ) in str(refused.value)


def test_dropping_every_row_stops_the_run_and_says_why(write, tokenizer):
    path = write("a.jsonl", jsonl({**GOOD, "output": ""}))
    prepared = prepare_file(path, tokenizer, invalid="drop")
    assert check_message(prepared, path, invalid="drop") == (
        'a.jsonl row 1: "output" is empty, so there is nothing to train on\n'
        "no rows are left to train on (empty: 1). Fix the rows"
    )


def test_dropping_every_row_of_the_validation_stops_the_run(write, tokenizer):
    good = Source((write("a.jsonl", jsonl(GOOD)),))
    bad = Source((write("b.jsonl", jsonl({**GOOD, "output": "7" * 100})),), "validation")
    prepared = prepare_all([good, bad], tokenizer, Rules(64, too_long="drop"))
    with pytest.raises(YRunnerError, match=r"validate on \(too long: 1\)\. Fix the rows, or r"):
        check(prepared, too_long="drop")


def test_rows_of_several_files_keep_their_order_and_purpose(write, tokenizer):
    sources = [
        Source((write("a.jsonl", jsonl(GOOD, GOOD)), write("d.jsonl", jsonl(GOOD)))),
        Source((write("b.jsonl", jsonl(GOOD)),), "validation"),
        Source((write("c.csv", "instruction,output\nq,a\n"),)),
    ]
    prepared = prepare_all(sources, tokenizer)
    names = [example.origin.file.name for example in prepared.train]
    assert names == ["a.jsonl", "a.jsonl", "d.jsonl", "c.csv"]
    assert [example.origin.file.name for example in prepared.validation] == ["b.jsonl"]
    check(prepared)


def test_the_report_as_json_names_every_refused_row(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, "{", {**GOOD, "output": "\ud800"}))
    (file,) = as_json(prepare_file(path, tokenizer).reports, [])["files"]
    assert (file["rows"], file["kept"]) == (3, 1)
    assert file["refused"] == {"unreadable": 1, "characters": 1}
    assert [refusal["row"] for refusal in file["refusals"]] == [2, 3]
    json.dumps(file, ensure_ascii=False).encode()


def test_more_rows_than_are_read_at_once_all_come_through(write, tokenizer):
    rows = [GOOD if number % 3 else {**GOOD, "output": ""} for number in range(2500)]
    (report,) = prepare_file(write("a.jsonl", jsonl(*rows)), tokenizer).reports
    assert (report.rows, report.kept) == (2500, 1666)
    assert [it.origin.row for it in report.refusals] == list(range(1, 2501, 3))


def test_a_template_without_an_end_mark_stops_the_run_even_where_rows_may_be_dropped(write):
    path = write("a.jsonl", jsonl(GOOD))
    with pytest.raises(ModelError, match=r"never learn to stop\. Set model\.chat_template"):
        prepare_file(path, tokenizer_of("no_end_mark"), invalid="drop")


def numbered(num_rows):
    return jsonl(*({"instruction": f"q{n}", "output": f"a{n}"} for n in range(num_rows)))


def rows_of(examples):
    return [example.origin.row for example in examples]


@pytest.fixture
def prepare_rows(write, tokenizer):
    def prepare_many(num_rows, seed=0, **source):
        sources = [Source((write("a.jsonl", numbered(num_rows)),), **source)]
        return prepare_all(sources, tokenizer, seed=seed)

    return prepare_many


@pytest.mark.parametrize("num_rows", [2, 3, 10, 101])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_setting_validation_aside_moves_rows_and_loses_none(num_rows, share, prepare_rows):
    prepared = prepare_rows(num_rows)
    prepared.set_validation_aside(share, seed=1)
    train, validation = rows_of(prepared.train), rows_of(prepared.validation)
    assert train and validation
    assert sorted(train + validation) == list(range(1, num_rows + 1))
    assert train == sorted(train)
    assert len(validation) == min(max(1, round(num_rows * share)), num_rows - 1)
    assert prepared.reports[0].set_aside == len(validation)


def test_the_same_seed_sets_the_same_rows_aside(prepare_rows):
    def aside(seed):
        prepared = prepare_rows(40)
        prepared.set_validation_aside(0.3, seed)
        return rows_of(prepared.validation)

    assert aside(1) == aside(1) != aside(2)


def test_a_single_row_cannot_be_set_aside(prepare_rows):
    with pytest.raises(YRunnerError, match=r"needs at least two rows.*there is 1\. Add rows, or"):
        prepare_rows(1).set_validation_aside(0.1, seed=1)


@pytest.mark.parametrize(("source", "number"), [({"take": 7}, 7), ({"share": 0.25}, 5)])
def test_part_of_a_file_can_be_taken_and_the_rest_is_counted(prepare_rows, source, number):
    prepared = prepare_rows(20, **source)
    taken = rows_of(prepared.train)
    assert len(taken) == number
    assert taken == sorted(set(taken))
    assert prepared.reports[0].not_taken == 20 - number
    assert taken == rows_of(prepare_rows(20, **source).train)
    assert taken != rows_of(prepare_rows(20, seed=1, **source).train)


def test_a_share_is_taken_of_all_files_of_an_entry_together(write, tokenizer):
    files = (write("a.jsonl", numbered(30)), write("b.jsonl", numbered(10)))
    prepared = prepare_all([Source(files, take=20)], tokenizer)
    left = [report.not_taken for report in prepared.reports]
    assert len(prepared.train) == 20 == sum(left)
    assert all(left)


def test_more_than_there_is_cannot_be_taken(prepare_rows):
    with pytest.raises(DataError, match=r"take is 21, but only 20 rows can be used\. Lower take"):
        prepare_rows(20, take=21)


@pytest.mark.parametrize("max_length", [2, 3, 7, 50])
def test_a_long_text_is_split_and_every_target_is_kept_once(write, tokenizer, max_length):
    path = write("a.txt", "one two three four five six seven\nshort\n")
    whole = prepare_file(path, tokenizer, max_length=1000).train
    prepared = prepare_file(path, tokenizer, max_length=max_length, too_long="split")
    check(prepared)
    (report,) = prepared.reports
    assert (report.rows, report.kept, report.cut) == (2, 2, 0)
    assert report.examples == len(prepared.train)
    assert max(prepared.train.lengths) <= max_length
    for row in (1, 2):
        pieces = [piece for piece in prepared.train if piece.origin.row == row]
        learned = [label for piece in pieces for label in piece.labels if label >= 0]
        assert learned == [label for label in whole[row - 1].labels if label >= 0]
    assert prepared.findings == []


def test_a_long_conversation_is_not_split_but_refused(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "output": "7" * 100}))
    prepared = prepare_file(path, tokenizer, too_long="split")
    assert "has 1" in check_message(prepared, path, too_long="split")


def test_progress_counts_every_byte_once_whether_read_or_found(write, tokenizer):
    path = write("a.jsonl", numbered(3000))
    for _ in range(2):
        seen: list[int] = []
        prepare_all([Source((path,))], tokenizer, advance=seen.append)
        assert sum(seen) == path.stat().st_size


def test_conversations_come_with_their_places(write):
    opened = read_conversations(write("a.jsonl", jsonl({**GOOD, "id": 7, "topic": "x"}, "{")))
    first, second = opened.rows
    assert (opened.format, opened.unread) == ("alpaca", ("id", "topic"))
    assert isinstance(first, Conversation)
    assert (first.origin.row, second.origin.row) == (1, 2)
    assert isinstance(second.origin.file, Path)
