"""Sums of three numbers with their working shown: what reinforcement learning practises.

The base knows the sums of two numbers up to 5. A few worked rows show how to write the working and
the answer between tags; the other rows have the right answer only.
"""

import itertools
import random
from typing import Any

from toy_general import LARGEST_ADDEND, SUM_WAYS
from toy_statutes import LANGUAGES, Language

Row = dict[str, Any]

STARTING_SUMS, VALIDATION_SUMS, TEST_SUMS = 30, 10, 30
"""Sums of each language in these files; the rest is for training."""
STEP: dict[Language, str] = {
    "zh": "{first}加{second}等于{sum}。",
    "en": "{first} plus {second} is {sum}.",
}
PLUS: dict[Language, str] = {"zh": "加", "en": " plus "}
WORKED = "<reasoning>\n{working}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def sum_files(rng: random.Random) -> dict[str, list[Row]]:
    """Return the rows of each file. No sum is in two of them."""
    files: dict[str, list[Row]] = {"start": [], "validation": [], "test": [], "train": []}
    for language in LANGUAGES:
        addends = range(1, LARGEST_ADDEND + 1)
        sums = list(itertools.product(addends, repeat=3))
        rng.shuffle(sums)
        rest = iter(sums)
        for name, number in (("start", STARTING_SUMS), ("validation", VALIDATION_SUMS),
                             ("test", TEST_SUMS), ("train", len(sums))):  # fmt: skip
            for numbers in itertools.islice(rest, number):
                questions = SUM_WAYS[language].questions
                asked = questions if name == "train" else [rng.choice(questions)]
                files[name] += [_row(name, question, numbers, language) for question in asked]
    for rows in files.values():
        rng.shuffle(rows)
    return {f"sums_{name}.jsonl": rows for name, rows in files.items()}


def _row(name: str, question: str, numbers: tuple[int, ...], language: Language) -> Row:
    prompt = question.format(thing=PLUS[language].join(map(str, numbers)))
    answer = str(sum(numbers))
    if name == "start":
        worked = WORKED.format(working=_working(numbers, language), answer=answer)
        return {"prompt": prompt, "response": worked}
    row = {"prompt": prompt, "answer": answer}
    # `yrun eval` looks for the answer between its tags.
    return (
        row | {"response": f"<answer>{answer}</answer>", "language": language}
        if name == "test"
        else row
    )


def _working(numbers: tuple[int, ...], language: Language) -> str:
    first, second, third = numbers
    steps = ((first, second, first + second), (first + second, third, sum(numbers)))
    space = {"zh": "", "en": " "}[language]
    return space.join(
        STEP[language].format(first=one, second=other, sum=total) for one, other, total in steps
    )
