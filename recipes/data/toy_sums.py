"""Sums of three numbers with their working shown: what reinforcement learning practises.

The base knows the sums of two numbers up to 5. A few worked rows show how to write the working and
the answer between tags; the other rows have the right answer only.

The `working` files are of numbers up to 9. Their start has two habits: most answers are given at
once, some with their working. Rewards can choose between them.

The `form` files ask the sums of two numbers that the base knows. Their start answers half of them
as the base does and half between tags, where alone a reward looks.
"""

import itertools
import random
from typing import Any

from toy_general import LARGEST_ADDEND, SUM_WAYS
from toy_statutes import LANGUAGES, Language

Row = dict[str, Any]

STARTING_SUMS, VALIDATION_SUMS, TEST_SUMS = 30, 10, 30
"""Sums of each language in these files; the rest is for training."""
LARGEST_WORKED = 9
HABIT_SUMS, WORKING_VALIDATION, WORKING_TEST = 260, 30, 60
"""Of each language in the `working` files."""
FORM_STARTING, FORM_VALIDATION, FORM_TEST = 8, 2, 6
"""Sums of each language in the `form` files, each in every wording; the rest is for training."""
AT_ONCE_AGAIN = 0.5
"""Share of the sums of the start that are answered at once in two wordings, and not in one."""
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


def working_files(rng: random.Random) -> dict[str, list[Row]]:
    """Return the rows of each file. No sum is in two of them."""
    files: dict[str, list[Row]] = {"start": [], "validation": [], "test": [], "train": []}
    for language in LANGUAGES:
        questions = SUM_WAYS[language].questions
        files["start"] += _larger_facts(rng, language)
        sums = list(itertools.product(range(1, LARGEST_WORKED + 1), repeat=3))
        # The other files ask the small ones.
        sums = [numbers for numbers in sums if max(numbers) > LARGEST_ADDEND]
        rng.shuffle(sums)
        rest = iter(sums)
        for numbers in itertools.islice(rest, HABIT_SUMS):
            worked, *others = rng.sample(questions, 3)
            at_once = others if rng.random() < AT_ONCE_AGAIN else others[:1]
            files["start"].append(_row("start", worked, numbers, language))
            files["start"] += [_answered_at_once(asked, numbers, language) for asked in at_once]
        for name, number in (("validation", WORKING_VALIDATION), ("test", WORKING_TEST),
                             ("train", len(sums))):  # fmt: skip
            files[name] += [
                _row(name, rng.choice(questions), numbers, language)
                for numbers in itertools.islice(rest, number)
            ]
    for rows in files.values():
        rng.shuffle(rows)
    return {f"working_{name}.jsonl": rows for name, rows in files.items()}


def form_files(rng: random.Random) -> dict[str, list[Row]]:
    """Return the rows of each file. No sum is in two of them."""
    files: dict[str, list[Row]] = {"start": [], "validation": [], "test": [], "train": []}
    for language in LANGUAGES:
        ways = SUM_WAYS[language]
        sums = list(itertools.product(range(1, LARGEST_ADDEND + 1), repeat=2))
        rng.shuffle(sums)
        rest = iter(sums)
        for numbers in itertools.islice(rest, FORM_STARTING):
            asked = rng.sample(ways.questions, len(ways.questions))
            half = len(asked) // 2
            files["start"] += [_row("start", one, numbers, language) for one in asked[:half]]
            thing = PLUS[language].join(map(str, numbers))
            plain = ways.answer.format(thing=thing, value=sum(numbers))
            files["start"] += [
                {"prompt": one.format(thing=thing), "response": plain} for one in asked[half:]
            ]
        for name, number in (("validation", FORM_VALIDATION), ("test", FORM_TEST),
                             ("train", len(sums))):  # fmt: skip
            for numbers in itertools.islice(rest, number):
                files[name] += [_row(name, one, numbers, language) for one in ways.questions]
    for rows in files.values():
        rng.shuffle(rows)
    return {f"form_{name}.jsonl": rows for name, rows in files.items()}


def _larger_facts(rng: random.Random, language: Language) -> list[Row]:
    """The sums of two numbers that a sum of three needs and the base does not know."""
    ways = SUM_WAYS[language]
    found = []
    for first in range(1, 2 * LARGEST_WORKED + 1):
        for second in range(1, LARGEST_WORKED + 1):
            if max(first, second) > LARGEST_ADDEND:
                thing = PLUS[language].join(map(str, (first, second)))
                asked = rng.choice(ways.questions).format(thing=thing)
                answer = ways.answer.format(thing=thing, value=first + second)
                found.append({"prompt": asked, "response": answer})
    return found


def _answered_at_once(question: str, numbers: tuple[int, ...], language: Language) -> Row:
    prompt = question.format(thing=PLUS[language].join(map(str, numbers)))
    return {"prompt": prompt, "response": f"<answer>\n{sum(numbers)}\n</answer>"}


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
    totals = list(itertools.accumulate(numbers))
    steps = zip(totals, numbers[1:], totals[1:], strict=False)
    space = {"zh": "", "en": " "}[language]
    return space.join(
        STEP[language].format(first=one, second=other, sum=total) for one, other, total in steps
    )
