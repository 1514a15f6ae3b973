"""The files of the toy world match their script, and are fit for measuring."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "data"
FIELDS = ("near", "middle", "far")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


def questions(name: str) -> set[str]:
    return {
        row["messages"][0]["content"] if "messages" in row else row["instruction"]
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


@pytest.mark.parametrize("name", ["general_train", "general_test", "legal_train", "legal_test"])
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
