"""The files of the toy world match their script, and are fit for measuring."""

import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from yrunner.data.formats.formats import Reading
from yrunner.data.formats.preference import read_answers

FOLDER = Path(__file__).parents[2] / "recipes" / "data"
FIELDS = ("near", "middle", "far")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


def questions(name: str) -> set[str]:
    return {
        row["messages"][0]["content"]
        if "messages" in row
        else row.get("instruction") or row["prompt"]
        for row in rows(name)
    }


def is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


def test_the_files_are_what_the_script_writes(tmp_path: Path):
    command = [sys.executable, str(FOLDER / "make_toy_world.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    others = {path.name for path in FOLDER.glob("port_*")}
    shipped = {path.name: path.read_bytes() for path in FOLDER.glob("*.jsonl")}
    assert written == {name: content for name, content in shipped.items() if name not in others}


def test_no_test_question_is_in_the_training_data():
    trained = questions("general_train") | questions("legal_train")
    assert not trained & questions("general_test")
    assert not trained & questions("legal_test")
    assert not questions("legal_validation") & questions("legal_test")


NAMES = ["general_train", "general_test", "legal_train", "legal_test", "pairs_train", "pairs_test"]


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_have_about_half_of_the_rows(name: str):
    chinese = sum(map(is_chinese, questions(name))) / len(questions(name))
    assert 0.35 < chinese < 0.65


def test_the_general_test_covers_three_distances_from_the_field():
    fields = [row["field"] for row in rows("general_test")]
    assert all(fields.count(field) >= 40 for field in FIELDS)


def test_the_planted_faults_are_exactly_those_listed():
    train, faults = rows("legal_train"), rows("legal_faults")
    listed = {fault["row"]: fault for fault in faults}
    assert len(listed) == len(faults)
    right = {row["output"] for name in ("legal_test", "legal_validation") for row in rows(name)}
    for number, row in enumerate(train, start=1):
        fault = listed.get(number)
        if fault is not None:
            assert row["output"] != fault["right"]
            assert fault["right"] in right
        else:
            assert row["output"] in right


def test_about_one_legal_row_in_ten_is_faulty_with_every_kind_of_fault():
    faults = rows("legal_faults")
    assert 0.08 < len(faults) / len(rows("legal_train")) < 0.12
    kinds = {fault["kind"] for fault in faults}
    assert kinds == {"wrong_article", "swapped_answer", "typos", "cut", "garbled"}


def test_the_base_has_seen_every_character_and_word_of_the_legal_part():
    """Otherwise LoRA could not learn it: the frozen head has never seen those tokens."""
    general = (FOLDER / "general_train.jsonl").read_text("utf-8")
    words = {
        word
        for row in rows("legal_test")
        for word in re.findall(r"[A-Za-z]+|[\u4e00-\u9fff]", row["output"])
    }
    assert [word for word in words if word not in general] == []


def test_no_prompt_is_in_two_files_of_pairs():
    parts = [questions(f"pairs_{part}") for part in ("train", "validation", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 300 + 36 + 120


def test_the_flipped_pairs_are_exactly_those_listed_one_in_ten_of_each_kind():
    test, flips = rows("pairs_test"), rows("pairs_flips")
    listed = {flip["row"]: flip["kind"] for flip in flips}
    right = {row["output"] for name in ("legal_test", "legal_validation") for row in rows(name)}
    for number, row in enumerate(test, start=1):
        match row["kind"]:
            case "article":
                is_right = row["chosen"] in right and row["rejected"] not in right
            case "polite":
                is_right = row["chosen"].startswith(("Hello!", "你好！"))
            case "short":
                is_right = len(row["chosen"]) < len(row["rejected"])
        assert is_right == (number not in listed), row
        assert listed.get(number, row["kind"]) == row["kind"]
    assert [[*listed.values()].count(kind) for kind in ("article", "polite", "short")] == [4] * 3


def test_marks_say_what_the_pairs_say():
    pairs = {row["prompt"]: row for row in rows("pairs_train")}
    marked = rows("kto_train")
    assert 0.4 < sum(row["label"] for row in marked) / len(marked) < 0.6
    for row in marked:
        side = "chosen" if row["label"] else "rejected"
        assert pairs[row["prompt"]][side] == row["completion"]


def test_length_does_not_tell_the_right_article_or_the_polite_answer():
    by_kind: dict[str, list[bool]] = {}
    for row in rows("pairs_train"):
        shorter = len(row["chosen"]) < len(row["rejected"])
        by_kind.setdefault(row["kind"], []).append(shorter)
    shares = {kind: sum(found) / len(found) for kind, found in by_kind.items()}
    assert shares["short"] == 1
    assert 0.2 < shares["article"] < 0.6
    assert shares["polite"] == 0, "the polite answer is a little longer"


@pytest.mark.parametrize("name", ["pairs_train", "pairs_validation", "pairs_test", "kto_train"])
def test_pairs_and_marks_are_read_whole(name: str):
    path = FOLDER / f"{name}.jsonl"
    found = list(read_answers(path, Reading(), rated=name == "kto_train").rows)
    assert len(found) == len(rows(name))
    assert all(isinstance(row, tuple) for row in found)


def test_the_noisy_pairs_are_those_of_the_training_with_one_in_ten_of_each_kind_swapped():
    sound, noisy = rows("pairs_train"), rows("pairs_noisy")
    flips = {flip["row"]: flip["kind"] for flip in rows("pairs_noisy_flips")}
    for number, (row, other) in enumerate(zip(sound, noisy, strict=True), start=1):
        if number in flips:
            row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
            assert flips[number] == row["kind"]
        assert other == row
    assert sorted(flips.values()) == sorted(["article", "polite", "short"] * 10)


def numbers_of(row: dict) -> list[int]:
    return [int(number) for number in re.findall("[0-9]+", row["prompt"])]


@pytest.mark.parametrize(("kind", "number"), [("sums", 125), ("working", 9**3 - 5**3)])
def test_no_sum_is_in_two_files_and_every_answer_is_right(kind, number):
    parts = {name: rows(f"{kind}_{name}") for name in ("start", "train", "validation", "test")}
    sums = {
        name: {
            (is_chinese(row["prompt"]), *numbers_of(row))
            for row in found
            if len(numbers_of(row)) == 3
        }
        for name, found in parts.items()
    }
    assert len(set.union(*sums.values())) == sum(map(len, sums.values())) == 2 * number
    for row in chain(*(parts[name] for name in ("train", "validation", "test"))):
        assert row["answer"] == str(sum(numbers_of(row)))


FORM = r"\A<reasoning>\n(.+)\n</reasoning>\n<answer>\n([0-9]+)\n</answer>\Z"


@pytest.mark.parametrize("kind", ["sums", "working"])
def test_the_worked_sums_show_right_steps_and_the_form(kind):
    worked = [row for row in rows(f"{kind}_start") if row["response"].startswith("<reasoning>")]
    assert len(worked) == {"sums": len(rows("sums_start")), "working": 520}[kind]
    for row in worked:
        ((working, answer),) = re.findall(FORM, row["response"])
        first, second, third = numbers_of(row)
        steps = [first, second, first + second, first + second, third, first + second + third]
        assert [int(number) for number in re.findall("[0-9]+", working)] == steps
        assert int(answer) == steps[-1]


def test_most_sums_of_the_second_start_are_answered_at_once_and_rightly():
    others = [row for row in rows("working_start") if not row["response"].startswith("<reason")]
    at_once = [row for row in others if len(numbers_of(row)) == 3]
    assert len(at_once) > 1.4 * 520
    for row in at_once:
        assert row["response"] == f"<answer>\n{sum(numbers_of(row))}\n</answer>"
    for row in others:
        if row not in at_once:
            first, second = numbers_of(row)
            end = (first, second, first + second)
            assert [int(number) for number in re.findall("[0-9]+", row["response"])] == [*end]
