"""Find rows that contradict each other: they ask about the same, and answer nearly alike.

Where a fact is stated in several rows, most of them answer in the same words. So of two rows on one
subject whose answers differ in a few tokens, one is probably wrong, however likely the model finds
both. A single wrong value hardly moves the mean of a row; its pair gives it away.
"""

# N = target tokens of a row

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations

from torch import Tensor

from yrunner.data.conversation import TokenizedExample
from yrunner.scoring.questions import subjects

ALIKE = 0.7
"""Share of their tokens, in the same order, from which two answers are compared."""
MOST_OF_A_SUBJECT = 32
"""Rows; what more of them ask about is a task, not a subject."""
LONGEST_ANSWER = 512
"""Targets; the comparison of longer texts would take too long."""
A_NUMBER = 3
"""Tokens; two questions that differ in one place of at most so many ask about different things."""
WEIGHT = 0.8
"""What a contradiction of strength 1 adds to the `outlier` score of its row."""


@dataclass(frozen=True)
class Contradiction:
    """A row that answers otherwise than another one on its subject."""

    against: int
    """Index of the other example; of several, the one whose answer is most alike."""
    strength: float
    """From 0 to 1: how alike the answers are, times the majority of the rows with such an answer
    against this one, times the share of such pairs in the corpus that agree."""
    targets: tuple[int, ...]
    """Indices of the row's targets that the other one lacks, or before which it has more."""
    said: tuple[int, ...]
    """Token ids from the first to the last difference."""
    instead: tuple[int, ...]
    """Those of the other row."""


def find_contradictions(
    examples: Sequence[TokenizedExample], groups: Sequence[str]
) -> dict[int, Contradiction]:
    """The rows that contradict another one, by their index.

    A row that as many others agree with as differ from it is not among them: they are. Examples of
    one of the `groups`, the parts and copies of a row, are not compared. In a corpus that says most
    things in several ways, a difference means little, and has little strength.
    """
    agreeing: Counter[int] = Counter()
    differing: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for rows in _rows_by_subject(examples):
        answers = {row: _answer(examples[row]) for row in rows}
        for one, other in combinations(rows, 2):
            if groups[one] == groups[other] or _ask_otherwise(examples[one], examples[other]):
                continue
            likeness = _likeness(answers[one], answers[other])
            if likeness == 1:
                agreeing.update((one, other))
            elif likeness >= ALIKE:
                differing[one].append((likeness, other))
                differing[other].append((likeness, one))
    num_differing = sum(map(len, differing.values()))
    share_agreeing = agreeing.total() / max(1, agreeing.total() + num_differing)
    found = {}
    for row, others in differing.items():
        majority = (len(others) - agreeing[row]) / (len(others) + agreeing[row])
        likeness, against = max(others, key=lambda each: each[0])
        strength = likeness * majority * share_agreeing
        if strength > 0:
            difference = _difference(_answer(examples[row]), _answer(examples[against]))
            found[row] = Contradiction(against, strength, *difference)
    return found


def with_contradictions(
    deviations: Sequence[Tensor], contradictions: Mapping[int, Contradiction]
) -> list[Tensor]:
    """The deviations of each row's targets, shape [N] each, raised where it contradicts another.

    The mean of a row rises by `WEIGHT` times the strength, and its differing targets share that.
    """
    raised = list(deviations)
    for row, found in contradictions.items():
        deviation_N = deviations[row].clone()
        more = WEIGHT * found.strength * len(deviation_N) / len(found.targets)
        deviation_N[list(found.targets)] += more
        raised[row] = deviation_N
    return raised


def _rows_by_subject(examples: Sequence[TokenizedExample]) -> list[list[int]]:
    """The rows of each subject that several, but not too many, rows ask about."""
    rows: dict[bytes, list[int]] = defaultdict(list)
    for row, subject in enumerate(subjects(examples)):
        if subject:
            rows[subject].append(row)
    return [found for found in rows.values() if 1 < len(found) <= MOST_OF_A_SUBJECT]


def _ask_otherwise(one: TokenizedExample, other: TokenizedExample) -> bool:
    """Whether two questions differ in a word or a number only, as those on articles 4 and 14."""
    asked, asked_there = _asked(one), _asked(other)
    if asked == asked_there:
        return False
    _, here, there = _difference(asked, asked_there)
    return max(len(here), len(there)) <= A_NUMBER


def _asked(example: TokenizedExample) -> list[int]:
    learned = set(example.target_positions)
    return [token for place, token in enumerate(example.input_ids) if place not in learned]


def _answer(example: TokenizedExample) -> list[int]:
    return [example.input_ids[position] for position in example.target_positions]


def _likeness(one: list[int], other: list[int]) -> float:
    """Twice the common tokens over all, from 0 to 1; 0 for what is not worth comparing."""
    if not (one and other) or max(len(one), len(other)) > LONGEST_ANSWER:
        return 0.0
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    # Upper bounds that are computed faster.
    if matcher.real_quick_ratio() < ALIKE or matcher.quick_ratio() < ALIKE:
        return 0.0
    return matcher.ratio()


def _difference(
    one: list[int], other: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """`targets`, `said` and `instead` of a contradiction."""
    operations = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    differing = [places for kind, *places in operations if kind != "equal"]
    targets = {
        place
        for start, end, *_ in differing
        # Where only the other row says something, the target before which it says it.
        for place in (range(start, end) if end > start else [min(start, len(one) - 1)])
    }
    (start, _, other_start, _), (_, end, _, other_end) = differing[0], differing[-1]
    return tuple(sorted(targets)), tuple(one[start:end]), tuple(other[other_start:other_end])
