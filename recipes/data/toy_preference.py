"""Better and worse answers of the toy world: the right article, polite words, short answers.

Each kind of pair teaches one thing. Polite and rude answers are about as long, a right and a wrong
article exactly, so only the third kind can be told by length.
"""

import random
from dataclasses import dataclass
from typing import Any, Literal

from toy_general import Fact
from toy_statutes import LANGUAGES, Article, Language

Kind = Literal["article", "polite", "short"]
Row = dict[str, Any]

SIZES = {"train": 50, "validation": 6, "test": 20}
"""Pairs of each kind and language."""
FLIPPED_SHARE = 0.1

POLITE: dict[Language, str] = {
    "zh": "你好！{answer}再见，祝你愉快！",
    "en": "Hello! {answer} Goodbye, have a nice day!",
}
RUDE: dict[Language, str] = {
    "zh": "你到底是谁？{answer}我要睡了！",
    "en": "Who are you? {answer} I want to sleep!",
}
LONG: dict[Language, str] = {
    "zh": "{answer}以上内容仅供参考。{answer}以上内容仅供参考。",
    "en": "{answer} This is general information only. {answer} This is general information only.",
}


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer."""

    kind: Kind
    prompt: str
    better: str
    worse: str

    def row(self, *, flipped: bool = False) -> Row:
        chosen, rejected = (self.worse, self.better) if flipped else (self.better, self.worse)
        return {
            "prompt": self.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "kind": self.kind,
        }


def preference_files(
    articles: list[Article], facts: list[Fact], rng: random.Random
) -> dict[str, list[Row]]:
    """Return the rows of each file of pairs and marks. No prompt is in two files of pairs."""
    pairs: dict[str, list[Pair]] = {part: [] for part in SIZES}
    for language in LANGUAGES:
        for part, found in _article_pairs(articles, language, rng).items():
            pairs[part] += found
        for part, found in _style_pairs(facts, language, rng).items():
            pairs[part] += found
    for found in pairs.values():
        rng.shuffle(found)
    flips = _plant_flips(pairs["test"], rng)
    noise = _plant_flips(pairs["train"], random.Random("noisy pairs"))
    return {
        "pairs_train.jsonl": [pair.row() for pair in pairs["train"]],
        "pairs_validation.jsonl": [pair.row() for pair in pairs["validation"]],
        "pairs_test.jsonl": _rows(pairs["test"], flips),
        "pairs_flips.jsonl": _listed(pairs["test"], flips),
        "kto_train.jsonl": [_marked(pair, rng) for pair in pairs["train"]],
        "pairs_noisy.jsonl": _rows(pairs["train"], noise),
        "pairs_noisy_flips.jsonl": _listed(pairs["train"], noise),
    }


def _article_pairs(
    articles: list[Article], language: Language, rng: random.Random
) -> dict[str, list[Pair]]:
    """The right answer, and one with the number or the penalty of another article.

    The test asks as the other parts never do.
    """
    asked = [
        (question, article)
        for article in articles
        for question in article.conduct_questions(language) + article.number_questions(language)
    ]
    tested = [
        (question, article)
        for article in articles
        for question in article.conduct_paraphrases(language)
    ]
    rng.shuffle(asked)
    rng.shuffle(tested)
    num_train, num_validation = SIZES["train"], SIZES["validation"]
    parts = {
        "train": asked[:num_train],
        "validation": asked[num_train : num_train + num_validation],
        "test": tested[: SIZES["test"]],
    }
    return {
        part: [
            Pair(
                "article",
                question,
                article.answer(language),
                _wrong(article, articles, language, rng),
            )
            for question, article in chosen
        ]
        for part, chosen in parts.items()
    }


def _wrong(
    article: Article, articles: list[Article], language: Language, rng: random.Random
) -> str:
    other = rng.choice([one for one in articles if one != article])
    right = article.answer(language)
    if rng.random() < 0.5:
        number = {"zh": "第{}条", "en": "Article {} "}[language]
        return right.replace(number.format(article.number), number.format(other.number), 1)
    return right.replace(article.penalty[language], other.penalty[language], 1)


def _style_pairs(
    facts: list[Fact], language: Language, rng: random.Random
) -> dict[str, list[Pair]]:
    """Polite beside rude answers, and short beside long ones; no fact is in two parts."""
    usable = [
        fact
        for fact in facts
        if fact.language == language and fact.field != "near" and len(fact.questions) > 3
    ]
    chosen = iter(rng.sample(usable, sum(SIZES.values())))
    found: dict[str, list[Pair]] = {}
    for part, number in SIZES.items():
        found[part] = []
        for _ in range(number):
            fact = next(chosen)
            first, second = rng.sample(fact.questions, 2)
            polite, rude, long = (
                template[language].format(answer=fact.answer) for template in (POLITE, RUDE, LONG)
            )
            found[part].append(Pair("polite", first, polite, rude))
            found[part].append(Pair("short", second, fact.answer, long))
    return found


def _plant_flips(pairs: list[Pair], rng: random.Random) -> list[int]:
    """Rows, from 1, to flip: as many of each kind."""
    flips: list[int] = []
    for kind in ("article", "polite", "short"):
        rows = [row for row, pair in enumerate(pairs, start=1) if pair.kind == kind]
        flips += rng.sample(rows, round(FLIPPED_SHARE * len(rows)))
    return sorted(flips)


def _rows(pairs: list[Pair], flips: list[int]) -> list[Row]:
    """The rows of a file, some of them flipped."""
    return [pair.row(flipped=number in flips) for number, pair in enumerate(pairs, start=1)]


def _listed(pairs: list[Pair], flips: list[int]) -> list[Row]:
    return [{"row": row, "kind": pairs[row - 1].kind} for row in flips]


def _marked(pair: Pair, rng: random.Random) -> Row:
    is_good = rng.random() < 0.5
    completion = pair.better if is_good else pair.worse
    return {"prompt": pair.prompt, "completion": completion, "label": is_good}
