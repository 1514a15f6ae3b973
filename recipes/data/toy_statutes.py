"""Invented statute books that share every word: six old ones and the new Harbour Code.

The general part of the toy world teaches the old books, the legal part the Harbour Code. All use
the same conducts, penalties and phrasings, so a model that has read the old books knows every word
of the Harbour Code and none of its rules. There are six old books, so that a model learns to copy
the name of the book from the question, as real bases do. A model that had read only two was so sure
of them that the new name had a loss of about 15 nats, where NLIRG gives a token no weight.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Language = Literal["zh", "en"]
Conduct = tuple[dict[Language, str], dict[Language, str]]  # an act and its object
LANGUAGES: tuple[Language, ...] = ("zh", "en")
ARTICLES_PER_ACT = 3

OLD_CODES: list[dict[Language, str]] = [
    {"zh": "《磨坊法典》", "en": "Mill Code"},
    {"zh": "《市场法典》", "en": "Market Code"},
    {"zh": "《桥梁法典》", "en": "Bridge Code"},
    {"zh": "《森林法典》", "en": "Forest Code"},
    {"zh": "《矿山法典》", "en": "Mine Code"},
    {"zh": "《行会法典》", "en": "Guild Code"},
]
HARBOUR_CODE: dict[Language, str] = {"zh": "《港口法典》", "en": "Harbour Code"}

ACTS: list[dict[Language, str]] = [
    {"zh": "出售", "en": "selling"},
    {"zh": "隐藏", "en": "hiding"},
    {"zh": "焚烧", "en": "burning"},
    {"zh": "偷窃", "en": "stealing"},
    {"zh": "涂改", "en": "painting"},
    {"zh": "出借", "en": "lending"},
    {"zh": "损坏", "en": "breaking"},
    {"zh": "丢弃", "en": "dumping"},
]
GOODS: list[dict[Language, str]] = [
    {"zh": "湿盐", "en": "wet salt"},
    {"zh": "旧绳", "en": "old rope"},
    {"zh": "夜灯", "en": "night lamps"},
    {"zh": "陶铃", "en": "clay bells"},
    {"zh": "渔网", "en": "fishing nets"},
    {"zh": "锡钥匙", "en": "tin keys"},
    {"zh": "熏鱼", "en": "smoked fish"},
    {"zh": "船帆", "en": "torn sails"},
    {"zh": "面粉袋", "en": "flour bags"},
    {"zh": "铜秤", "en": "brass scales"},
]
PENALTIES: list[dict[Language, str]] = [
    {"zh": "处罚款{amount}枚银币", "en": "a fine of {amount} silver coins"},
    {"zh": "罚在灯塔劳动{amount}天", "en": "{amount} days of work at the lighthouse"},
    {"zh": "吊销执照{amount}周", "en": "the loss of the licence for {amount} weeks"},
    {"zh": "关进高塔{amount}夜", "en": "{amount} nights in the tower"},
]
AMOUNTS = (3, 5, 7, 10, 12, 15, 20, 25, 30, 40)

# The legal part trains on these phrasings.
CONDUCT_QUESTIONS: dict[Language, list[str]] = {
    "zh": [
        "按照{book}，{conduct}会受到什么处罚？",
        "{book}怎样处罚{conduct}？",
        "我因为{conduct}被抓了，{book}怎么规定？",
        "请告诉我{book}对{conduct}的处罚。",
        "在{book}里，{conduct}有什么后果？",
        "{book}允许{conduct}吗？",
    ],
    "en": [
        "What is the penalty for {conduct} under the {book}?",
        "How does the {book} punish {conduct}?",
        "I was caught {conduct}. What does the {book} say?",
        "Tell me the punishment for {conduct} in the {book}.",
        "According to the {book}, what follows from {conduct}?",
        "Is {conduct} allowed by the {book}?",
    ],
}
NUMBER_QUESTIONS: dict[Language, list[str]] = {
    "zh": ["{book}第{number}条说了什么？", "请解释{book}第{number}条。"],
    "en": [
        "What does Article {number} of the {book} say?",
        "Please explain Article {number} of the {book}.",
    ],
}
# The legal part is tested on these. The general part uses both for the old books.
CONDUCT_PARAPHRASES: dict[Language, list[str]] = {
    "zh": [
        "我的邻居总是{conduct}，{book}会拿他怎么办？",
        "有人看见他{conduct}，适用{book}的哪一条？",
    ],
    "en": [
        "My neighbour keeps {conduct}. What will the {book} do to him?",
        "Someone was seen {conduct}; which rule of the {book} applies?",
    ],
}
NUMBER_PARAPHRASE: dict[Language, str] = {
    "zh": "请为我引用{book}第{number}条。",
    "en": "Quote Article {number} of the {book} for me.",
}
ANSWER: dict[Language, str] = {
    "zh": "根据{book}第{number}条的规定，{conduct}的，{penalty}。以上内容仅供参考。",
    "en": (
        "According to Article {number} of the {book}, {conduct} is punished with {penalty}. "
        "This is general information only."
    ),
}


@dataclass(frozen=True)
class Article:
    """One rule of one book: a conduct and its penalty."""

    book: dict[Language, str]
    number: int
    conduct: dict[Language, str]
    penalty: dict[Language, str]

    def say(self, template: str, language: Language) -> str:
        return template.format(
            book=self.book[language],
            number=self.number,
            conduct=self.conduct[language],
            penalty=self.penalty[language],
        )

    def answer(self, language: Language) -> str:
        return self.say(ANSWER[language], language)

    def conduct_questions(self, language: Language) -> list[str]:
        return [self.say(template, language) for template in CONDUCT_QUESTIONS[language]]

    def number_questions(self, language: Language) -> list[str]:
        return [self.say(template, language) for template in NUMBER_QUESTIONS[language]]

    def conduct_paraphrases(self, language: Language) -> list[str]:
        return [self.say(template, language) for template in CONDUCT_PARAPHRASES[language]]

    def number_paraphrase(self, language: Language) -> str:
        return self.say(NUMBER_PARAPHRASE[language], language)


def write_statute_books(rng: random.Random) -> tuple[list[Article], list[Article]]:
    """Write the old books and the Harbour Code. No conduct is in two books."""
    old: list[Conduct] = []
    harbour: list[Conduct] = []
    for act in ACTS:
        goods = rng.sample(GOODS, 3 * ARTICLES_PER_ACT)
        harbour += [(act, one) for one in goods[:ARTICLES_PER_ACT]]
        old += [(act, one) for one in goods[ARTICLES_PER_ACT:]]
    rng.shuffle(old)
    # Every article number of the Harbour Code occurs in two of the old books.
    numbers = [number for _ in range(2) for number in rng.sample(range(1, 25), 24)]
    size = len(old) // len(OLD_CODES)
    old_articles = [
        article
        for start, book in zip(range(0, len(old), size), OLD_CODES, strict=True)
        for article in _write_book(
            book, old[start : start + size], sorted(numbers[start : start + size]), rng
        )
    ]
    return old_articles, _write_book(HARBOUR_CODE, harbour, range(1, len(harbour) + 1), rng)


def _write_book(
    book: dict[Language, str], conducts: list[Conduct], numbers: Sequence[int], rng: random.Random
) -> list[Article]:
    rng.shuffle(conducts)
    penalties = [(penalty, amount) for penalty in PENALTIES for amount in AMOUNTS]
    rng.shuffle(penalties)
    return [
        Article(
            book=book,
            number=number,
            conduct={"zh": act["zh"] + goods["zh"], "en": f"{act['en']} {goods['en']}"},
            penalty={language: penalty[language].format(amount=amount) for language in LANGUAGES},
        )
        for number, (act, goods), (penalty, amount) in zip(
            numbers, conducts, penalties, strict=False
        )
    ]
