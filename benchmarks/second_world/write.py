"""Write the second world: the formulary of an invented hospital, with known faults.

    python -m benchmarks.second_world.write [--out outputs/second-world]

It shares nothing with the toy world of `recipes/data`: other seed, other entities, other kinds of
fault. Nothing in yrunner was tuned on it; its two recipes use the settings of the toy world.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.second_world.facts import Fact, field_facts, general_facts
from benchmarks.second_world.faults import FieldRow, plant_faults
from benchmarks.second_world.words import LANGUAGES

SEED = 20_261
MIN_ROWS = 1000
QUESTIONS_OF_A_GENERAL_FACT = 3
TESTED_SHARE = 0.05
HERE = Path(__file__).parent
RECIPES = ("second_base.yaml", "second_field.yaml")

Row = dict[str, Any]


def main() -> None:
    """Write the files and print the number of rows of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/second-world"))
    for name, rows in write_second_world(parser.parse_args().out).items():
        print(f"{name}: {len(rows)} rows")


def write_second_world(folder: Path) -> dict[str, list[Row]]:
    """Write data and recipes to `folder`; return the rows of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = make_second_world()
    check_promises(files)
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")
    for name in RECIPES:
        shutil.copyfile(HERE / name, folder / name)
    return files


def make_second_world() -> dict[str, list[Row]]:
    """Return the rows of each file."""
    draw = random.Random(SEED)
    general_train, general_test = split_general(general_facts(draw), draw)
    facts = field_facts(draw)
    rows = [
        FieldRow(question, fact, language)
        for fact in facts
        for language in LANGUAGES
        for question in fact.questions(language)
    ]
    draw.shuffle(rows)
    faults = plant_faults(rows, facts, draw)
    answers = [row.answer for row in rows]
    for fault in faults:
        answers[fault.row - 1] = fault.wrong
    return {
        "general_train.jsonl": general_train,
        "general_test.jsonl": general_test,
        "field_train.jsonl": [
            alpaca(row.question, answer) for row, answer in zip(rows, answers, strict=True)
        ],
        "field_faults.jsonl": [
            {"row": fault.row, "kind": fault.kind, "right": fault.right} for fault in faults
        ],
    }


def split_general(facts: list[Fact], draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Take some questions of each fact for training, and for a few facts one more for the test."""
    train, test = [], []
    for fact in facts:
        for language in LANGUAGES:
            questions = fact.questions(language)
            draw.shuffle(questions)
            answer = fact.answer(language)
            asked = questions[:QUESTIONS_OF_A_GENERAL_FACT]
            train += [alpaca(question, answer) for question in asked]
            left = questions[QUESTIONS_OF_A_GENERAL_FACT:]
            if left and draw.random() < TESTED_SHARE:
                test.append(alpaca(left[0], answer))
    draw.shuffle(train)
    return train, test


def check_promises(files: dict[str, list[Row]]) -> None:
    """Enough rows, no question twice, and no word in the field that the base does not know."""
    assert len(files["field_train.jsonl"]) >= MIN_ROWS, "the field has too few rows"
    tables = [rows for name, rows in files.items() if name != "field_faults.jsonl"]
    questions = [row["instruction"] for rows in tables for row in rows]
    assert len(questions) == len(set(questions)), "a question appears in two rows"
    correct = [row["right"] for row in files["field_faults.jsonl"]]
    unknown = words(correct) - words(row["output"] for row in files["general_train.jsonl"])
    assert not unknown, f"the general part lacks {unknown}"


def words(texts: Iterable[str]) -> set[str]:
    """Return words between spaces, and single Chinese characters."""
    return {
        piece
        for text in texts
        for word in text.replace(".", " ").replace(",", " ").split()
        for piece in ([word] if word.isascii() else word)
    }


def alpaca(question: str, answer: str) -> Row:
    return {"instruction": question, "input": "", "output": answer}


if __name__ == "__main__":
    main()
