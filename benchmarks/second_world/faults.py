"""The faults of the second world: nine kinds that occur in real data."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.second_world.facts import Fact
from benchmarks.second_world.words import (
    AMOUNTS,
    CAN,
    CANNOT,
    CLOSES,
    DRAWERS,
    FLOORS,
    HOSPITAL,
    OLD_HOSPITALS,
    OPENS,
    UNITS,
    Language,
)

FAULTY_SHARE = 0.12
NUMBERS = {
    "amount": AMOUNTS,
    "drawer": DRAWERS,
    "floor": FLOORS,
    "opens": OPENS,
    "closes": CLOSES,
}
"""Slots with a number, and its possible values."""
SHORTEST_STRETCH = 8
"""Minimum number of garbled characters."""


@dataclass(frozen=True)
class FieldRow:
    """One question of the field and the fact that answers it."""

    question: str
    fact: Fact
    language: Language

    @property
    def answer(self) -> str:
        return self.fact.answer(self.language)


@dataclass(frozen=True)
class Fault:
    """A wrong answer planted in a row. `row` counts from 1."""

    row: int
    kind: str
    wrong: str
    right: str


PlantFault = Callable[[FieldRow, Sequence[Fact], random.Random], str | None]
"""Return the wrong answer of a row, or None if the row cannot have this fault."""


def plant_faults(
    rows: Sequence[FieldRow], facts: Sequence[Fact], draw: random.Random
) -> list[Fault]:
    """Make some rows faulty, equally many with each kind of fault."""
    free = list(range(len(rows)))
    draw.shuffle(free)
    faults = []
    for number in range(round(FAULTY_SHARE * len(rows))):
        kind = list(KINDS)[number % len(KINDS)]
        index, wrong = _first_that_can(kind, free, rows, facts, draw)
        free.remove(index)
        faults.append(Fault(index + 1, kind, wrong, rows[index].answer))
    return sorted(faults, key=lambda fault: fault.row)


def _first_that_can(
    kind: str,
    free: Sequence[int],
    rows: Sequence[FieldRow],
    facts: Sequence[Fact],
    draw: random.Random,
) -> tuple[int, str]:
    for index in free:
        wrong = KINDS[kind](rows[index], facts, draw)
        if wrong is not None:
            assert wrong != rows[index].answer, (
                f"the {kind} fault of row {index + 1} changed nothing"
            )
            return index, wrong
    raise AssertionError(f"no row is left for the fault {kind}")


def wrong_number(row: FieldRow, facts: Sequence[Fact], draw: random.Random) -> str | None:
    slots = [slot for slot in NUMBERS if slot in row.fact.slots]
    if not slots:
        return None
    slot = draw.choice(slots)
    others = [number for number in NUMBERS[slot] if number != row.fact.slots[slot]]
    return row.fact.with_slots(**{slot: draw.choice(others)}).answer(row.language)


def wrong_unit(row: FieldRow, facts: Sequence[Fact], draw: random.Random) -> str | None:
    if row.fact.topic != "dose":
        return None
    others = [unit for unit in UNITS if unit != row.fact.slots["unit"]]
    return row.fact.with_slots(unit=draw.choice(others)).answer(row.language)


def answer_of_another_question(
    row: FieldRow, facts: Sequence[Fact], draw: random.Random
) -> str | None:
    """Answer another question about the same medicine or ward."""
    about = "medicine" if "medicine" in row.fact.slots else "ward"
    return draw.choice(
        [
            fact
            for fact in facts
            if fact.topic != row.fact.topic
            and fact.slots.get(about) == row.fact.slots[about]
            # Facts about a medicine also name a ward, the one that stores it.
            and ("medicine" in fact.slots) == (about == "medicine")
        ]
    ).answer(row.language)


def missing_negation(row: FieldRow, facts: Sequence[Fact], draw: random.Random) -> str | None:
    if row.fact.slots.get("can") != CANNOT:
        return None
    return row.fact.with_slots(can=CAN).answer(row.language)


def truncated(row: FieldRow, facts: Sequence[Fact], draw: random.Random) -> str | None:
    return row.answer[: int(draw.uniform(0.35, 0.85) * len(row.answer))].rstrip()


def mixed_language(row: FieldRow, facts: Sequence[Fact], draw: random.Random) -> str | None:
    """Continue the answer with the second part of its translation."""
    other: Language = "en" if row.language == "zh" else "zh"
    share = draw.uniform(0.3, 0.7)
    translated = row.fact.answer(other)
    here, there = round(share * len(row.answer)), round(share * len(translated))
    return row.answer[:here] + translated[there:]


def garbled(row: FieldRow, facts: Sequence[Fact], draw: random.Random) -> str | None:
    """Shuffle the letters of a stretch."""
    answer = row.answer
    length = max(SHORTEST_STRETCH, len(answer) // 4)
    start = draw.randrange(len(answer) - length)
    stretch = list(answer[start : start + length])
    draw.shuffle(stretch)
    return answer[:start] + "".join(stretch) + answer[start + length :]


def wrong_hospital(row: FieldRow, facts: Sequence[Fact], draw: random.Random) -> str | None:
    """Name another hospital, as if copied from its leaflet."""
    other = draw.choice(OLD_HOSPITALS)
    return row.answer.replace(HOSPITAL[row.language], other[row.language])


def repeated(row: FieldRow, facts: Sequence[Fact], draw: random.Random) -> str | None:
    """Repeat the middle three times."""
    third = len(row.answer) // 3
    middle = row.answer[third : 2 * third]
    return row.answer[:third] + 3 * middle + row.answer[2 * third :]


KINDS: dict[str, PlantFault] = {
    "wrong_number": wrong_number,
    "wrong_unit": wrong_unit,
    "other_question": answer_of_another_question,
    "missing_negation": missing_negation,
    "truncated": truncated,
    "mixed_language": mixed_language,
    "garbled": garbled,
    "wrong_hospital": wrong_hospital,
    "repeated": repeated,
}
