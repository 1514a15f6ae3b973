"""Write the toy world: a small invented corpus in Chinese and English that trains in minutes.

`python make_toy_world.py [--out DIR]` writes the data files, the same bytes every time;
README.md describes them. The general part is knowledge that a base model should have and keep. The
legal part is a field to fine-tune on, with the flaws of real field data: boilerplate, few facts
asked in many ways, and about one faulty row in ten.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import cut, garble, mistype
from toy_general import Fact, general_facts
from toy_preference import preference_files
from toy_statutes import LANGUAGES, Article, Language, write_statute_books
from toy_sums import form_files, sum_files, working_files

SEED = 42
TESTS_PER_FIELD_AND_LANGUAGE = 30
VALIDATION_ROWS_PER_LANGUAGE = 20
NUMBER_TESTS_PER_LANGUAGE = 12
FAULTY_SHARE = 0.1
REPEATED = ("faults.jsonl", "flips.jsonl", "noisy.jsonl")
"""Ends of the files that name or repeat rows of others."""
FILE_WORDS = {
    *("instruction", "input", "output", "field", "legal", "language", "zh", "en"),
    *("prompt", "chosen", "rejected", "kind", "article", "polite", "short"),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class LegalRow:
    """One question about one article, with the correct answer."""

    question: str
    article: Article
    language: Language

    @property
    def answer(self) -> str:
        return self.article.answer(self.language)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data files of the toy world.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    files = make_toy_world()
    check_promises(files)
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
        sys.stdout.write(f"{name}: {len(rows)} rows\n")


def make_toy_world() -> dict[str, list[Row]]:
    """Return the rows of each file."""
    rng = random.Random(SEED)
    old_articles, harbour_articles = write_statute_books(rng)
    facts = general_facts(old_articles, rng)
    general_train, general_test = split_general(facts, rng)
    legal_train, legal_validation = split_legal(harbour_articles, rng)
    faults = plant_faults(legal_train, rng)
    outputs = [row.answer for row in legal_train]
    for fault in faults:
        outputs[fault.row - 1] = fault.wrong
    return {
        "general_train.jsonl": general_train,
        "general_test.jsonl": general_test,
        "legal_train.jsonl": [
            alpaca(row.question, output) for row, output in zip(legal_train, outputs, strict=True)
        ],
        "legal_validation.jsonl": [alpaca(row.question, row.answer) for row in legal_validation],
        "legal_test.jsonl": legal_tests(harbour_articles, rng),
        "legal_faults.jsonl": [
            {"row": fault.row, "kind": fault.kind, "right": fault.right} for fault in faults
        ],
        **preference_files(harbour_articles, facts, random.Random(SEED)),
        **sum_files(random.Random(SEED)),
        **working_files(random.Random(SEED)),
        **form_files(random.Random(SEED)),
    }


def split_general(facts: list[Fact], rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Hold out one question of some facts for the test, equally many per field and language."""
    tested: set[Fact] = set()
    for field in ("near", "middle", "far"):
        for language in LANGUAGES:
            group = [fact for fact in facts if (fact.field, fact.language) == (field, language)]
            tested.update(rng.sample(group, TESTS_PER_FIELD_AND_LANGUAGE))
    train: list[Row] = []
    test: list[Row] = []
    for fact in facts:
        questions = list(fact.questions)
        if fact in tested:
            held_out = questions.pop(rng.randrange(len(questions)))
            test.append(test_row(held_out, fact.answer, fact.field, fact.language))
        train += [chat(question, fact.answer) for question in questions]
    rng.shuffle(train)
    return train, test


def split_legal(
    articles: list[Article], rng: random.Random
) -> tuple[list[LegalRow], list[LegalRow]]:
    """Split the ordinary questions into training and validation rows."""
    train: list[LegalRow] = []
    validation: list[LegalRow] = []
    for language in LANGUAGES:
        validated = rng.sample(articles, VALIDATION_ROWS_PER_LANGUAGE)
        for article in articles:
            questions = article.conduct_questions(language) + article.number_questions(language)
            rows = [LegalRow(question, article, language) for question in questions]
            if article in validated:
                validation.append(rows.pop(rng.randrange(len(rows))))
            train += rows
    rng.shuffle(train)
    return train, validation


def legal_tests(articles: list[Article], rng: random.Random) -> list[Row]:
    """Ask for every article in a wording that the training rows do not use."""
    rows: list[Row] = []
    for language in LANGUAGES:
        asked_by_number = rng.sample(articles, NUMBER_TESTS_PER_LANGUAGE)
        for article in articles:
            questions = [rng.choice(article.conduct_paraphrases(language))]
            if article in asked_by_number:
                questions.append(article.number_paraphrase(language))
            answer = article.answer(language)
            rows += [test_row(question, answer, "legal", language) for question in questions]
    return rows


@dataclass(frozen=True)
class Fault:
    """A wrong answer planted in a training row. `row` counts from 1."""

    row: int
    kind: str
    wrong: str
    right: str


def plant_faults(rows: list[LegalRow], rng: random.Random) -> list[Fault]:
    """Make about one row in ten faulty, with equally many faults of each kind."""
    kinds = list(FAULT_KINDS)
    indices = sorted(rng.sample(range(len(rows)), round(FAULTY_SHARE * len(rows))))
    faults = []
    for count, index in enumerate(indices):
        kind = kinds[count % len(kinds)]
        right = rows[index].answer
        wrong = FAULT_KINDS[kind](rows[index], rows, rng)
        assert wrong != right, f"the {kind} fault of row {index + 1} changed nothing"
        faults.append(Fault(index + 1, kind, wrong, right))
    return faults


def cite_wrong_article(row: LegalRow, rows: list[LegalRow], rng: random.Random) -> str:
    other = another_row(row, rows, rng)
    template = {"zh": "第{}条", "en": "Article {} "}[row.language]
    right, wrong = template.format(row.article.number), template.format(other.article.number)
    return row.answer.replace(right, wrong, 1)


def swap_answer(row: LegalRow, rows: list[LegalRow], rng: random.Random) -> str:
    return another_row(row, rows, rng).answer


def another_row(row: LegalRow, rows: list[LegalRow], rng: random.Random) -> LegalRow:
    """Draw a row in the same language about another article."""
    others = [other for other in rows if other.language == row.language]
    return rng.choice([other for other in others if other.article != row.article])


FAULT_KINDS: dict[str, Callable[[LegalRow, list[LegalRow], random.Random], str]] = {
    "wrong_article": cite_wrong_article,
    "swapped_answer": swap_answer,
    "typos": lambda row, _, rng: mistype(row.answer, rng),
    "cut": lambda row, _, rng: cut(row.answer, rng),
    "garbled": lambda row, _, rng: garble(row.answer, rng),
}


def chat(question: str, answer: str) -> Row:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages}


def alpaca(question: str, answer: str) -> Row:
    return {"instruction": question, "input": "", "output": answer}


def test_row(question: str, answer: str, field: str, language: Language) -> Row:
    return {"instruction": question, "output": answer, "field": field, "language": language}


def check_promises(files: dict[str, list[Row]]) -> None:
    """No question appears twice, and the general part has every word of the other parts.

    Pairs ask what other files ask, too, and the noisy ones are those of the training.
    """
    for kind in ("general", "legal", "sums", "working"), ("pairs",), ("form",):
        questions = [
            question
            for name, rows in files.items()
            if name.startswith(kind)
            and not name.endswith(("faults.jsonl", "flips.jsonl", "noisy.jsonl"))
            for question in asked(rows)
        ]
        assert len(questions) == len(set(questions)), "a question appears in two rows"
    general_words = words(files["general_train.jsonl"])
    for name in ("legal_validation.jsonl", "legal_test.jsonl", "pairs_train.jsonl"):
        unknown = words(files[name]) - general_words
        assert not unknown, f"{name} has words that the general part lacks: {unknown}"


def asked(rows: Iterable[Row]) -> list[str]:
    return [
        row["messages"][0]["content"]
        if "messages" in row
        else row.get("instruction", row.get("prompt"))
        for row in rows
    ]


def words(rows: Iterable[Row]) -> set[str]:
    """Return English words, numbers, and single Chinese characters."""
    text = json.dumps(list(rows), ensure_ascii=False)
    return set(re.findall(r"[A-Za-z]+|[0-9]+|[^\x00-\x7f]", text)) - FILE_WORDS


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
