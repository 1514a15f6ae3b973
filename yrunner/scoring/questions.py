"""Compare the questions of rows: which ask for the same thing, and do their answers agree?

Questions are compared by the rare tokens they share, as in search engines (TF-IDF): a name that
few rows mention tells more than the words all questions are made of.

Where a fact is stated in several rows, most of them answer in the same words. So of two rows on one
subject whose answers differ in a few tokens, one is probably wrong, however likely the model finds
both. A single wrong value hardly moves the mean of a row; its pair gives it away.
"""

# E = examples, N = target tokens of a row, V = different tokens, S = size of a vector

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

QUESTION_SIZE = 512
"""Size of the random projection of a question: its cosines are off by less than 0.05."""
SUBJECT = 2 / 3
"""The tokens of a question that are rarer than this share of its rarest one name its subject."""
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


def question_vectors(examples: Sequence[TokenizedExample]) -> Tensor:
    """A vector of length 1 for each question, whose products are cosines; [E, S], float16.

    The tokens that are not learned are the question. Each counts once, with the logarithm of the
    share of rows that have it. Zero where a row has no question, or only what every row has.
    """
    if not len(examples):
        return torch.empty(0, QUESTION_SIZE, dtype=torch.float16)
    asked = [_asked(example) for example in examples]
    sizes = torch.tensor([len(ids) for ids in asked])
    tokens, place, count = np.unique(np.concatenate(asked), return_inverse=True, return_counts=True)
    # The same for every run: the questions of one corpus give the same vectors.
    random = torch.Generator().manual_seed(0)
    direction_VS = torch.randn((len(tokens), QUESTION_SIZE), generator=random)
    rarity_V = torch.from_numpy(np.log(len(asked) / count)).float()
    starts_E = sizes.cumsum(dim=0) - sizes
    question_ES = embedding_bag(
        torch.from_numpy(place), direction_VS * rarity_V[:, None], starts_E, mode="sum"
    )
    return normalize(question_ES, dim=1).half()


def subjects(examples: Sequence[TokenizedExample]) -> list[bytes]:
    """What each question is about: its rare tokens, in a form to compare for equality.

    Rarity is that of `question_vectors`. Two questions have the same subject if each rare token of
    one is in the other. Empty without a question, or with only what every row has.
    """
    asked = [_asked(example) for example in examples]
    if not asked:
        return []
    tokens, count = np.unique(np.concatenate(asked), return_counts=True)
    found = []
    for ids in asked:
        rarity = np.log(len(asked) / count[np.searchsorted(tokens, ids)])
        found.append(ids[rarity > SUBJECT * rarity.max(initial=0.0)].tobytes())
    return found


def _asked(example: TokenizedExample) -> NDArray[np.int64]:
    """The different tokens of an example that are not learned.

    Without the first, which nothing predicts: of a document it is text like any other.
    """
    ids, labels = np.array([example.input_ids, example.labels], np.int64)
    return np.unique(ids[1:][labels[1:] == IGNORE_INDEX])


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
    asked, asked_there = _question(one), _question(other)
    if asked == asked_there:
        return False
    _, here, there = _difference(asked, asked_there)
    return max(len(here), len(there)) <= A_NUMBER


def _question(example: TokenizedExample) -> list[int]:
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
