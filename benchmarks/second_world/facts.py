"""The facts of the second world: the formularies of the hospitals, and general facts."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.second_world.words import (
    AMOUNTS,
    ANSWERS,
    CAN,
    CANNOT,
    CLOSES,
    DOCTORS,
    DRAWERS,
    FLOORS,
    FOODS,
    FORMS,
    HOSPITAL,
    MEDICINES,
    OLD_HOSPITALS,
    OPENS,
    QUESTIONS,
    REGIONS,
    TIMES,
    UNITS,
    WARDS,
    Language,
    Text,
)

MEDICINES_OF_AN_OLD_HOSPITAL = 10
WARDS_OF_AN_OLD_HOSPITAL = 5


@dataclass(frozen=True)
class Fact:
    """One answer and its questions."""

    topic: str
    slots: Mapping[str, Text | int]

    def questions(self, language: Language) -> list[str]:
        return [self._say(question, language) for question in QUESTIONS[self.topic][language]]

    def answer(self, language: Language) -> str:
        return self._say(ANSWERS[self.topic][language], language)

    def with_slots(self, **changed: Text | int) -> "Fact":
        """Return the same fact with other values."""
        return Fact(self.topic, {**self.slots, **changed})

    def _say(self, template: str, language: Language) -> str:
        words = {
            name: value if isinstance(value, int) else value[language]
            for name, value in self.slots.items()
        }
        return template.format(**words)


def field_facts(draw: random.Random) -> list[Fact]:
    """Make the formulary of the field: all medicines and all wards of one hospital."""
    return _formulary(HOSPITAL, MEDICINES, WARDS, draw)


def general_facts(draw: random.Random) -> list[Fact]:
    """Make parts of the formularies of other hospitals, and facts that hold everywhere.

    This teaches the base the words and sentences of the field, but none of its facts.
    """
    facts = []
    for hospital in OLD_HOSPITALS:
        medicines = draw.sample(MEDICINES, MEDICINES_OF_AN_OLD_HOSPITAL)
        facts += _formulary(hospital, medicines, draw.sample(WARDS, WARDS_OF_AN_OLD_HOSPITAL), draw)
    facts += [
        Fact("region", {"hospital": hospital, "region": draw.choice(REGIONS)})
        for hospital in (*OLD_HOSPITALS, HOSPITAL)
    ]
    facts += [
        Fact("unit", {"form": form, "unit": unit}) for form, unit in zip(FORMS, UNITS, strict=True)
    ]
    return facts


def _formulary(
    hospital: Text, medicines: Sequence[Text], wards: Sequence[Text], draw: random.Random
) -> list[Fact]:
    facts = []
    for medicine in medicines:
        about: dict[str, Text | int] = {"hospital": hospital, "medicine": medicine}
        form = draw.randrange(len(FORMS))
        dose = {"form": FORMS[form], "unit": UNITS[form]}
        dose |= {"amount": draw.choice(AMOUNTS), "times": draw.choice(TIMES)}
        store = {"ward": draw.choice(WARDS), "drawer": draw.choice(DRAWERS)}
        food = {"food": draw.choice(FOODS), "can": draw.choice([CAN, CANNOT])}
        facts += [Fact("dose", about | dose), Fact("store", about | store)]
        facts.append(Fact("food", about | food))
    for ward in wards:
        about = {"hospital": hospital, "ward": ward}
        hours = {"opens": draw.choice(OPENS), "closes": draw.choice(CLOSES)}
        head = {"doctor": draw.choice(DOCTORS), "floor": draw.choice(FLOORS)}
        facts += [Fact("hours", about | hours), Fact("head", about | head)]
    return facts
