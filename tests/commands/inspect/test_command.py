"""`yrun inspect` shows what the training will see, and why a row is not learned from."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import questions, write_jsonl
from yrunner.cli import main
from yrunner.commands.inspect.command import inspect
from yrunner.errors import DataError, YRunnerError

TUNED = Path("tuned.yaml")


def show(capfd, *overrides: str, number: int = 3, row: str | None = None) -> str:
    """What is printed, without a terminal."""
    inspect(TUNED, list(overrides), number=number, row=row)
    return capfd.readouterr().out


def rows_of(shown: str) -> list[int]:
    return [
        int(number) for number in re.findall(r"^── train\.jsonl row (\d+)", shown, re.MULTILINE)
    ]


def test_the_first_examples_are_those_of_the_first_update(project, capfd):
    shown = show(capfd, "train.order=as_written", number=4)
    assert sorted(rows_of(shown)) == [1, 2, 3, 4], "the batch size is 4"
    learned = re.findall(r"⟦(.*?)⟧", shown)
    assert learned[0] == "learned", "the legend stands before the examples"
    answers = {f"{answer}<|im_end|>" for _, answer in questions(4)}
    assert set(learned[1:]) == answers
    assert "\x1b" not in shown


def test_shuffled_rows_come_in_another_order_and_each_of_them_once(project, capfd):
    shown = show(capfd, number=100)
    assert sorted(rows_of(shown)) == list(range(1, 17))
    assert rows_of(shown) != list(range(1, 17))
    assert rows_of(show(capfd, number=5)) == rows_of(shown)[:5]


def test_token_batches_are_numbered_and_an_example_is_shown_once(project, capfd):
    shown = show(capfd, "train.token_batch=5", number=100)
    assert sorted(rows_of(shown)) == list(range(1, 17))
    assert " token batches of 5" in shown
    assert "⟦¹" in shown
    assert "⟦²" in shown


def test_one_row_is_found_by_the_end_of_its_path(project, capfd):
    question, answer = questions(20)[17]
    for place in (
        "validation.jsonl",
        f"{project.name}/validation.jsonl",
        str(project / "validation.jsonl"),
    ):
        shown = show(capfd, row=f"{place}:2")
        assert "── validation.jsonl row 2 · " in shown
        assert question in shown
        assert f"⟦{answer}<|im_end|>⟧" in shown


def test_a_row_that_is_too_long_is_shown_cut_with_the_reason(project, capfd):
    row = next(n for n, (_, answer) in enumerate(questions(16), start=1) if answer.count(".") == 5)
    shown = show(capfd, "data.max_length=24", row=f"train.jsonl:{row}")
    assert re.search(r"not trained on: has \d+ tokens; data\.max_length is 24$", shown, re.M)
    assert re.search(r"── train\.jsonl row \d+ · 24 tokens, ", shown)
    assert re.search(r"✂ \d+ tokens cut off", shown)


def test_what_is_cut_for_the_training_is_told_with_each_example(project, capfd):
    whole = show(capfd, "train.order=as_written", number=4)
    lengths = dict(re.findall(r"row (\d+) · (\d+) tokens", whole))
    limit = max(map(int, lengths.values())) - 5
    options = ("data.too_long=cut", f"data.max_length={limit}", "train.order=as_written")
    shown = show(capfd, *options, number=4)
    cut = [int(length) - limit for length in lengths.values() if int(length) > limit]
    assert sorted(map(int, re.findall(r"✂ (\d+) tokens cut off", shown))) == sorted(cut)
    longest = max(lengths, key=lambda row: int(lengths[row]))
    assert "✂ 5 tokens cut off" in show(capfd, *options, row=f"train.jsonl:{longest}")


def test_what_stands_between_question_and_answer_is_shown_with_and_without_arguments(
    project, change, capfd
):
    change("tuned.yaml", model__chat_template="qwen3")
    between = '"<|im_end|>\\n<|im_start|>assistant\\n'
    assert f"between question and answer stands {between}" in show(capfd)
    shown = show(capfd, "model.template_args={enable_thinking: false}")
    empty = "<think>\\n\\n</think>\\n\\n"
    assert f'stands {between}{empty}"; without model.template_args {between}"' in shown
    assert "⟦<think>" not in shown, "an empty block is a part of the prompt"


def test_a_row_that_cannot_be_used_is_shown_as_it_stands_with_the_reason(project, capfd):
    rows = [{"instruction": "Fine?", "output": "Yes."}, {"instruction": "问", "output": 5}]
    path = write_jsonl(project / "train.jsonl", rows)
    path.write_text(path.read_text("utf-8") + "{broken\n", "utf-8")
    shown = show(capfd, row="train.jsonl:2")
    assert re.search(r"^── train\.jsonl row 2 · not trained on: .*output", shown)
    assert json.loads(shown[shown.index("{") :]) == rows[1]
    assert "row 3 · not trained on: invalid JSON" in show(capfd, row="train.jsonl:3")


@pytest.mark.parametrize("place", ["train.jsonl", "train.jsonl:0", "train.jsonl:x", ":3", ""])
def test_a_place_without_a_file_and_a_row_is_refused(project, place):
    with pytest.raises(YRunnerError, match=r"Write it like train\.jsonl:12"):
        inspect(TUNED, [], number=3, row=place)


def test_an_unknown_file_or_row_is_answered_with_those_that_are_there(project, change):
    with pytest.raises(
        YRunnerError, match=r"no data file tests\.jsonl\. Choose one of train\.jsonl, validation"
    ):
        inspect(TUNED, [], number=3, row="tests.jsonl:1")
    with pytest.raises(DataError, match=r"train\.jsonl row 17: .* Choose one from 1 to 16"):
        inspect(TUNED, [], number=3, row="train.jsonl:17")
    train = project / "train.jsonl"
    train.write_text("\n" + train.read_text("utf-8"), "utf-8")
    with pytest.raises(DataError, match=r"line is empty\. Choose one from 1 to 17 \(16 rows\)"):
        inspect(TUNED, [], number=3, row="train.jsonl:1")


def test_a_name_that_fits_two_files_is_refused_with_both(project, change, capfd):
    for folder in ("old", "new"):
        (project / folder).mkdir()
        write_jsonl(project / folder / "a.jsonl", [{"instruction": folder, "output": "b"}])
    change("tuned.yaml", data__train=[{"file": "old/a.jsonl"}, {"file": "new/a.jsonl"}])
    with pytest.raises(
        YRunnerError, match=r"2 data files .* end in a\.jsonl\. Write more of .*new/"
    ):
        inspect(TUNED, [], number=3, row="a.jsonl:1")
    assert "user↵\nnew" in show(capfd, row="new/a.jsonl:1")


def test_the_command_takes_overrides_and_options_in_any_order(project, capfd, monkeypatch):
    arguments = ["inspect", "tuned.yaml", "-n", "1", "train.token_batch=4"]
    monkeypatch.setattr("sys.argv", ["yrun", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capfd.readouterr().out
    assert len(rows_of(shown)) == 1
    assert " token batches of 4" in shown
