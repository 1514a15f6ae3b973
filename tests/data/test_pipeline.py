"""No row disappears: each is kept, or counted with file, row and reason."""

import json
from pathlib import Path

import pytest

from tests.data.conftest import decoded_targets, tokenizer_of
from yrunner.data.conversation import Conversation
from yrunner.data.pipeline import Prepared, Rules, Source, prepare, read_conversations
from yrunner.data.report import as_json
from yrunner.errors import DataError, ModelError, YRunnerError

RULES = Rules(max_length=64)
GOOD = {"instruction": "q", "output": "a"}


def jsonl(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def prepare_file(path, tokenizer, **rules):
    return prepare([Source(path)], tokenizer, Rules(**{"max_length": 64, **rules}))


def check_message(prepared, path, **rules):
    with pytest.raises(YRunnerError) as refused:
        prepared.check(Rules(**{"max_length": 64, **rules}))
    return str(refused.value).replace(f"{path.parent}/", "")


def test_no_row_disappears_each_is_kept_or_refused_with_its_place(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, "{", {**GOOD, "output": ""}, "", GOOD, [1]))
    prepared = prepare_file(path, tokenizer)
    (report,) = prepared.reports
    assert (report.rows, report.kept, report.format, report.cut) == (5, 2, "alpaca", 0)
    assert [(it.origin.row, it.kind, it.reason) for it in report.refusals] == [
        (2, "invalid", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (3, "invalid", '"output" is empty, there is nothing to learn'),
        (6, "invalid", "is a list, not an object with named fields"),
    ]
    assert [example.origin.row for example in prepared.train] == [1, 5]
    assert report.targets == 2 * len(tokenizer("a<|im_end|>")["input_ids"])
    assert report.tokens == sum(len(example.input_ids) for example in prepared.train)


def test_what_the_user_reads_of_faulty_rows_says_where_what_and_what_to_do(write, tokenizer):
    rows = [GOOD, "{", GOOD, {**GOOD, "output": ""}, {**GOOD, "output": ""}]
    path = write("a.jsonl", jsonl(*rows))
    assert check_message(prepare_file(path, tokenizer), path) == (
        "a.jsonl row 2: not JSON: Expecting property name enclosed in double quotes at column 2\n"
        'a.jsonl row 4: "output" is empty, there is nothing to learn (and 1 row more like it)\n'
        "3 rows cannot be learned from. Mend the rows, or leave them out with data.invalid: drop"
    )


def test_of_many_reasons_the_first_are_shown_and_the_rest_is_counted(write, tokenizer):
    rows = [{"messages": [{"role": f"bot{number}", "content": ""}]} for number in range(30)]
    path = write("a.jsonl", jsonl(*rows))
    lines = check_message(prepare_file(path, tokenizer), path).splitlines()
    assert len(lines) == 12
    assert lines[10] == "... and 20 rows more"
    assert lines[11].startswith("30 rows cannot be learned from. Mend")


def test_long_rows_are_refused_by_default(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "output": "7" * 100}))
    prepared = prepare_file(path, tokenizer)
    (refusal,) = prepared.reports[0].refusals
    length = int(refusal.reason.split()[1])
    assert length > 100
    assert check_message(prepared, path) == (
        f"a.jsonl row 2: has {length} tokens, data.max_length is 64\n"
        "1 row cannot be learned from. Raise data.max_length, or leave long rows out with "
        "data.too_long: drop, or cut their ends off with data.too_long: cut"
    )


def test_a_row_of_exactly_the_longest_length_is_kept(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD))
    length = prepare_file(path, tokenizer).reports[0].tokens
    assert prepare_file(path, tokenizer, max_length=length).reports[0].kept == 1
    assert prepare_file(path, tokenizer, max_length=length - 1).reports[0].kept == 0


def test_long_rows_can_be_dropped_and_are_counted(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "output": "7" * 100}))
    prepared = prepare_file(path, tokenizer, too_long="drop")
    prepared.check(Rules(max_length=64, too_long="drop"))
    assert prepared.reports[0].refused_by_kind == {"too_long": 1}
    assert len(prepared.train) == 1


def test_long_rows_can_be_cut_and_are_counted(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "output": "7" * 100}))
    prepared = prepare_file(path, tokenizer, too_long="cut")
    prepared.check(Rules(max_length=64, too_long="cut"))
    assert (prepared.reports[0].kept, prepared.reports[0].cut) == (2, 1)
    assert len(prepared.train[1].input_ids) == 64
    assert set(decoded_targets(prepared.train[1], tokenizer)) == {"7"}


def test_a_row_that_has_nothing_to_learn_once_it_is_cut_is_refused(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, {**GOOD, "instruction": "7" * 100}))
    prepared = prepare_file(path, tokenizer, too_long="cut")
    (refusal,) = prepared.reports[0].refusals
    assert refusal.kind == "invalid"
    assert refusal.reason.startswith("no token is left to learn of its 1")
    assert refusal.reason.endswith(" when it is cut to data.max_length 64")
    assert prepared.reports[0].cut == 0


def test_texts_are_refused_under_sft(write, tokenizer):
    path = write("a.txt", "one\ntwo\n")
    assert prepare_file(path, tokenizer).reports[0].kept == 2
    with pytest.raises(DataError, match=r"plain texts.*sft.*\. Set train\.stage to cpt"):
        prepare_file(path, tokenizer, texts_allowed=False)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt"])
def test_a_file_without_rows_is_refused(kind, write, tokenizer):
    with pytest.raises(DataError, match=r"holds no rows\. Remove it from the recipe"):
        prepare_file(write(f"a.{kind}", "\n"), tokenizer)


def test_a_file_of_which_no_line_can_be_read_shows_the_first(write, tokenizer):
    path = write("a.jsonl", "question: a\nanswer: b\n")
    with pytest.raises(DataError, match=r"a\.jsonl row 1: not JSON: Expecting value at column 1"):
        prepare_file(path, tokenizer)


def test_an_unknown_format_says_how_to_name_the_columns(write, tokenizer):
    with pytest.raises(DataError) as refused:
        prepare_file(write("a.jsonl", jsonl({"question": "q", "reply": "a"})), tokenizer)
    assert str(refused.value).endswith(
        "a.jsonl: fits no format that is known; its columns are question, reply. Set its format "
        "in the recipe, or name its columns as in columns: {instruction: question, output: answer}"
    )


def test_a_misspelt_name_in_columns_is_refused(write, tokenizer):
    source = Source(write("a.jsonl", jsonl(GOOD)), columns={"sytem": "persona"})
    with pytest.raises(DataError) as refused:
        prepare([source], tokenizer, RULES)
    assert (
        'columns has "sytem", but the format alpaca has instruction, output, input, system, history'
    ) in str(refused.value)


def test_dropping_every_row_stops_the_run_and_says_why(write, tokenizer):
    path = write("a.jsonl", jsonl({**GOOD, "output": ""}))
    prepared = prepare_file(path, tokenizer, invalid="drop")
    assert check_message(prepared, path, invalid="drop") == (
        'a.jsonl row 1: "output" is empty, there is nothing to learn\n'
        "no row is left to learn from. Mend the rows"
    )


def test_dropping_every_row_of_the_validation_stops_the_run(write, tokenizer):
    good = Source(write("a.jsonl", jsonl(GOOD)))
    bad = Source(write("b.jsonl", jsonl({**GOOD, "output": "7" * 100})), "validation")
    prepared = prepare([good, bad], tokenizer, Rules(64, too_long="drop"))
    with pytest.raises(YRunnerError, match=r"validate on\. Mend the rows, or raise data\.max_l"):
        prepared.check(Rules(64, too_long="drop"))


def test_rows_of_several_files_keep_their_order_and_purpose(write, tokenizer):
    sources = [
        Source(write("a.jsonl", jsonl(GOOD, GOOD))),
        Source(write("b.jsonl", jsonl(GOOD)), "validation"),
        Source(write("c.csv", "instruction,output\nq,a\n")),
    ]
    prepared = prepare(sources, tokenizer, RULES)
    assert [example.origin.file.name for example in prepared.train] == ["a.jsonl"] * 2 + ["c.csv"]
    assert [example.origin.file.name for example in prepared.validation] == ["b.jsonl"]
    prepared.check(RULES)


def test_the_report_as_json_names_every_refused_row(write, tokenizer):
    path = write("a.jsonl", jsonl(GOOD, "{", {**GOOD, "output": "\ud800"}))
    (file,) = as_json(prepare_file(path, tokenizer).reports)["files"]
    assert (file["rows"], file["kept"], file["refused"]) == (3, 1, {"invalid": 2})
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


@pytest.mark.parametrize("num_rows", [2, 3, 10, 101])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_setting_validation_aside_moves_rows_and_loses_none(num_rows, share, examples):
    rows = [examples[number % len(examples)] for number in range(num_rows)]
    prepared = Prepared(train=list(rows))
    prepared.set_validation_aside(share, seed=1)
    assert prepared.train and prepared.validation
    assert sorted(map(id, prepared.train + prepared.validation)) == sorted(map(id, rows))
    expected = min(max(1, round(num_rows * share)), num_rows - 1)
    assert len(prepared.validation) == expected


def test_the_same_seed_sets_the_same_rows_aside(examples):
    def aside(seed):
        prepared = Prepared(train=list(examples))
        prepared.set_validation_aside(0.3, seed)
        return [example.origin.row for example in prepared.validation]

    assert aside(1) == aside(1) != aside(2)


def test_a_single_row_cannot_be_set_aside(examples):
    with pytest.raises(YRunnerError, match=r"needs two rows or more.*there is 1\. Add rows, or"):
        Prepared(train=examples[:1]).set_validation_aside(0.1, seed=1)


def test_conversations_come_with_their_places(write):
    source = Source(write("a.jsonl", jsonl(GOOD, "{")))
    format_name, rows = read_conversations(source)
    first, second = rows
    assert format_name == "alpaca"
    assert isinstance(first, Conversation)
    assert (first.origin.row, second.origin.row) == (1, 2)
    assert isinstance(second.origin.file, Path)
