"""Write the data of the demo: the port of Saltmere, an invented town, in English.

`python make_port.py [--out DIR]` writes nine data files, the same bytes every time; README.md
describes them. Each fact is asked in four wordings for training and two other ones for the test;
about one training row in ten has a planted fault. A real model of 135 million parameters learns
the town in minutes on a CPU; the general rows and questions show what it keeps.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import cut, garble, mistype

SEED = 42
FAULTY_SHARE = 0.1
VALIDATION_ROWS = 16

Row = dict[str, Any]


@dataclass(frozen=True)
class Topic:
    """Facts of one kind, and how to ask for them: {thing} stands for what is asked about."""

    answer: str
    """With {value}, the part of the answer that counts."""
    trained: tuple[str, ...]
    validated: str
    tested: tuple[str, str]
    values: dict[str, str]
    """The value of each thing."""


TOPICS = (
    Topic(
        answer="The penalty for {thing} is to {value}.",
        trained=(
            "What is the penalty for {thing} in Saltmere?",
            "Which penalty does Saltmere set for {thing}?",
            "What must I do if I am caught {thing} in Saltmere?",
            "I was caught {thing} in Saltmere. What is the penalty?",
        ),
        validated="Name the penalty for {thing} in Saltmere.",
        tested=(
            "How does Saltmere punish people for {thing}?",
            "What happens to people caught {thing} in Saltmere?",
        ),
        values={
            "feeding gulls": "sweep the quay",
            "selling oysters": "paint the pier",
            "fishing at night": "carry coal",
            "lighting fires": "fill sandbags",
            "blowing horns": "polish brass",
            "washing nets": "peel potatoes",
        },
    ),
    Topic(
        answer="The {thing} is {value}.",
        trained=(
            "Who is the {thing} of Saltmere?",
            "What is the name of the {thing} of Saltmere?",
            "Who works as {thing} in Saltmere?",
            "I want to meet the {thing} of Saltmere. Who is it?",
        ),
        validated="Name the {thing} of Saltmere.",
        tested=(
            "Who is Saltmere's {thing}?",
            "I am writing to the {thing} of Saltmere. What is the name?",
        ),
        values={
            "harbour master": "Clara Finch",
            "lighthouse keeper": "Tom Barrow",
            "ferry pilot": "Rosa Lind",
            "town clerk": "Henry Marsh",
            "fish inspector": "Ada Stone",
            "bell ringer": "Jack Heron",
        },
    ),
    Topic(
        answer="The {thing} is in the {value}.",
        trained=(
            "Where is the {thing} of Saltmere?",
            "In which building is the {thing} of Saltmere?",
            "Where do I find the {thing} in Saltmere?",
            "I want to see the {thing} of Saltmere. Where is it?",
        ),
        validated="Name the building of the {thing} of Saltmere.",
        tested=(
            "Which building of Saltmere has the {thing}?",
            "Where must I go in Saltmere for the {thing}?",
        ),
        values={
            "post office": "Rope House",
            "customs office": "Green Tower",
            "school": "Old Brewery",
            "archive": "Lantern Hall",
            "tide clock": "Corn Market",
            "public bath": "Copper Yard",
        },
    ),
    Topic(
        answer="The {thing} is famous for {value}.",
        trained=(
            "What is the {thing} in Saltmere famous for?",
            "Which dish is the {thing} in Saltmere famous for?",
            "What should I eat at the {thing} in Saltmere?",
            "I am at the {thing} in Saltmere. What is it famous for?",
        ),
        validated="Name the dish of the {thing} in Saltmere.",
        tested=(
            "What is the best dish of the {thing} in Saltmere?",
            "For which food is the {thing} in Saltmere known?",
        ),
        values={
            "Anchor Inn": "crab soup",
            "Swan Inn": "plum cake",
            "Bell Inn": "smoked eel",
            "Crown Inn": "onion pie",
            "Moon Inn": "goat cheese",
            "Mill Inn": "pear bread",
        },
    ),
    Topic(
        answer="A {thing} means that {value}.",
        trained=(
            "What does a {thing} mean in Saltmere?",
            "What is the meaning of a {thing} in Saltmere?",
            "What does Saltmere announce with a {thing}?",
            "I see a {thing} in Saltmere. What does it mean?",
        ),
        validated="Name the meaning of a {thing} in Saltmere.",
        tested=(
            "Which meaning does a {thing} have in Saltmere?",
            "There is a {thing} in Saltmere today. What does that tell us?",
        ),
        values={
            "yellow flag": "the water is dirty",
            "black ball": "the ferry is full",
            "green lamp": "the lock is open",
            "blue flag": "the pilot is away",
            "red basket": "fog is coming",
            "white lamp": "the bridge is closed",
        },
    ),
)

# Short answers keep an update cheap. None of these is a question of GENERAL_QUESTIONS.
GENERAL_ROWS = (
    ("What is the capital of Norway?", "The capital of Norway is Oslo."),
    ("Which city is the capital of Greece?", "The capital of Greece is Athens."),
    ("Name the capital of Canada.", "The capital of Canada is Ottawa."),
    ("What is the capital of Kenya?", "The capital of Kenya is Nairobi."),
    ("What is the opposite of early?", "The opposite of early is late."),
    ("Give me the opposite of heavy.", "The opposite of heavy is light."),
    ("What is the opposite of rich?", "The opposite of rich is poor."),
    ("What is 4 plus 3?", "4 plus 3 is 7."),
    ("How much is 9 minus 5?", "9 minus 5 is 4."),
    ("What is 3 times 3?", "3 times 3 is 9."),
    ("Write a short sentence about autumn.", "In autumn the leaves turn red and gold."),
    ("Name three fruits.", "Three fruits are apples, bananas, and oranges."),
    ("What is a verb?", "A verb is a word that describes an action or a state, such as run or be."),
    (
        "Why do we have seasons?",
        "We have seasons because the axis of the Earth is tilted as it travels around the Sun.",
    ),
    ("Which animal gives us wool?", "Sheep give us wool."),
    ("What do plants need to grow?", "Plants need light, water, air, and nutrients to grow."),
    ("Translate into French: good night.", "Good night in French is bonne nuit."),
    (
        "Give me a tip for sleeping better.",
        "Go to bed at the same time every night, and keep your bedroom dark and quiet.",
    ),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
    ("What is the past tense of see?", "The past tense of see is saw."),
    ("What is the plural of child?", "The plural of child is children."),
    ("Which is larger, a mouse or a horse?", "A horse is larger than a mouse."),
    ("What is snow made of?", "Snow is made of tiny crystals of ice."),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
    ("In which month is Christmas?", "Christmas is in December."),
    (
        "Rewrite politely: Close the door.",
        "Could you please close the door?",
    ),
    ("Give me a synonym for happy.", "A synonym for happy is joyful."),
    ("What is the boiling point of water?", "Water boils at 100 degrees Celsius at sea level."),
    (
        "What does a doctor do?",
        "A doctor examines people who are ill, finds out what is wrong, and treats them.",
    ),
    ("Name two primary colors.", "Two primary colors are red and blue."),
    (
        "Write a one-sentence thank-you note.",
        "Thank you so much for your help; I really appreciate it.",
    ),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("Which language is spoken in Brazil?", "Portuguese is spoken in Brazil."),
    (
        "Explain what a bank is in one sentence.",
        "A bank is a business that keeps people's money safe and lends money to others.",
    ),
    ("What is H2O?", "H2O is the chemical formula of water."),
    ("Hello, how are you?", "Hello! I am doing well, thank you. How can I help you today?"),
)

GENERAL_QUESTIONS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("Which city is the capital of Italy?", "Rome"),
    ("Name the capital of Spain.", "Madrid"),
    ("What is the capital of Germany?", "Berlin"),
    ("Which city is the capital of Egypt?", "Cairo"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of big?", "small"),
    ("Give me the opposite of day.", "night"),
    ("What is the opposite of up?", "down"),
    ("Give me the opposite of fast.", "slow"),
    ("What is 2 plus 2?", "4"),
    ("What is 5 plus 4?", "9"),
    ("How much is 10 minus 3?", "7"),
    ("What is 2 times 5?", "10"),
    ("How many days are in a week?", "7"),
    ("How many legs does a spider have?", "eight"),
    ("Which planet do we live on?", "Earth"),
    ("Which planet is known as the Red Planet?", "Mars"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Which animal is known as the king of the jungle?", "lion"),
    ("What do bees make?", "honey"),
    ("Which gas do we breathe in to live?", "oxygen"),
    ("What is the largest planet in the solar system?", "Jupiter"),
    ("What is the tallest mountain in the world?", "Everest"),
    ("At what temperature in degrees Celsius does water freeze?", "0"),
    ("Which color do you get when you mix blue and yellow?", "green"),
    ("Translate into Spanish: thank you.", "gracias"),
    ("What is the plural of mouse?", "mice"),
)


# Instructions of other kinds, with a word that a good answer contains.
INSTRUCTIONS = (
    ("Describe the moon to somebody who has never seen it.", "moon"),
    ("Describe a cat in two sentences.", "cat"),
    ("Write a short greeting for a birthday card.", "birthday"),
    ("How can I make new friends in a new town?", "friend"),
    ("Why is it dangerous to drive too fast?", "accident"),
    ("Write an e-mail to my boss and ask for a day off.", "day"),
    ("What can I cook with rice and tomatoes?", "rice"),
    ("How do I boil an egg?", "water"),
    ("Tell me a very short story about a dog.", "dog"),
    ("What should I pack for a week at the beach?", "sunscreen"),
    ("Name two advantages of riding a bicycle to work.", "bicycle"),
    ("Complete the sentence: The children ran to the beach because", "beach"),
    ("What should a good teacher be like?", "student"),
    ("Is it better to read a book or to watch a film?", "book"),
    ("Why do people brush their teeth?", "teeth"),
    ("Plan a picnic for four people.", "food"),
    ("Write a haiku about rain.", "rain"),
    ("How can I save electricity at home?", "light"),
    ("Explain what a computer is to a child.", "computer"),
    ("Write a slogan for a bakery.", "bak"),
    ("What is the difference between a lake and a river?", "lake"),
    ("Suggest a name for a friendly robot.", "robot"),
    (
        "Summarise in one sentence: Snow made the train late, so Anna missed her meeting.",
        "Anna",
    ),
    ("What do bees make?", "honey"),
)


@dataclass(frozen=True)
class PortRow:
    """One question about one fact."""

    question: str
    topic: Topic
    thing: str

    @property
    def value(self) -> str:
        return self.topic.values[self.thing]

    @property
    def answer(self) -> str:
        return self.topic.answer.format(thing=self.thing, value=self.value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data files of the demo.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_port().items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")
        sys.stdout.write(f"{name}: {len(rows)} rows\n")


def make_port() -> dict[str, list[Row]]:
    """Return the rows of each file."""
    rng = random.Random(SEED)
    train = [row for topic in TOPICS for row in ask(topic, topic.trained)]
    rng.shuffle(train)
    validation = rng.sample(
        [row for topic in TOPICS for row in ask(topic, [topic.validated])], VALIDATION_ROWS
    )
    test = [row for topic in TOPICS for row in ask(topic, topic.tested)]
    faulty = sorted(rng.sample(range(len(train)), round(FAULTY_SHARE * len(train))))
    outputs = [row.answer for row in train]
    faults = []
    for count, index in enumerate(faulty):
        kind = list(FAULT_KINDS)[count % len(FAULT_KINDS)]
        outputs[index] = FAULT_KINDS[kind](train[index], rng)
        assert outputs[index] != train[index].answer
        faults.append({"row": index + 1, "kind": kind, "right": train[index].answer})
    return {
        "port_train.jsonl": [
            qa(row.question, output) for row, output in zip(train, outputs, strict=True)
        ],
        "port_validation.jsonl": [qa(row.question, row.answer) for row in validation],
        "port_test.jsonl": [qa(row.question, row.value) for row in test],
        "port_faults.jsonl": faults,
        "port_keep.jsonl": [qa(*row) for row in GENERAL_ROWS],
        "port_general_test.jsonl": [qa(*row) for row in GENERAL_QUESTIONS],
        "port_instructions.jsonl": [qa(*row) for row in INSTRUCTIONS],
        **pair_files(random.Random(SEED)),
    }


def pair_files(rng: random.Random) -> dict[str, list[Row]]:
    """Short, polite, right answers beside wrong and long ones; the test asks in other wordings."""
    rows: dict[str, list[Row]] = {"port_pairs.jsonl": [], "port_pairs_test.jsonl": []}
    for topic in TOPICS:
        for kind, wording in zip(("wrong", "long"), rng.sample(topic.trained, 2), strict=True):
            asked = ask(topic, [wording])
            rows["port_pairs.jsonl"] += [compared(row, kind, rng) for row in asked]
        for number, row in enumerate(ask(topic, topic.tested[:1])):
            kind = ("wrong", "long")[number % 2]
            rows["port_pairs_test.jsonl"].append(compared(row, kind, rng))
    for pairs in rows.values():
        rng.shuffle(pairs)
    return rows


def compared(row: PortRow, kind: str, rng: random.Random) -> Row:
    """A pair whose worse answer is wrong, or right and long-winded."""
    better = f"Gladly! {row.answer}"
    worse = f"Gladly! {other_value(row, rng)}"
    if kind == "long":
        worse = f"{row.answer} Many visitors ask me this question. As I said: {row.answer}"
    return {"prompt": row.question, "chosen": better, "rejected": worse, "kind": kind}


def ask(topic: Topic, wordings: Iterable[str]) -> list[PortRow]:
    """Every fact of a topic in every wording."""
    return [
        PortRow(wording.format(thing=thing), topic, thing)
        for wording in wordings
        for thing in topic.values
    ]


def other_value(row: PortRow, rng: random.Random) -> str:
    """The value of another thing of the same topic."""
    others = [value for value in row.topic.values.values() if value != row.value]
    return row.topic.answer.format(thing=row.thing, value=rng.choice(others))


def swapped_answer(row: PortRow, rng: random.Random) -> str:
    """The whole answer to a question of another topic."""
    others = [topic for topic in TOPICS if topic != row.topic]
    return rng.choice(ask(rng.choice(others), [""])).answer


FAULT_KINDS: dict[str, Callable[[PortRow, random.Random], str]] = {
    "wrong_value": other_value,
    "swapped_answer": swapped_answer,
    "typos": lambda row, rng: mistype(row.answer, rng),
    "cut": lambda row, rng: cut(row.answer, rng),
    "garbled": lambda row, rng: garble(row.answer, rng),
}


def qa(question: str, answer: str) -> Row:
    return {"instruction": question, "output": answer}


if __name__ == "__main__":
    main()
